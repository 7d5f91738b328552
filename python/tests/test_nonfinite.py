"""Updates with NaN or infinity in the parameters."""

from pathlib import Path

import pytest
import torch

from posthoc_ema import PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 100}


def run(directory: Path, bad_steps: set[int], **options: object) -> tuple[list[int], torch.Tensor]:
    """Trains for 12 steps, with NaN in the parameters at some, and returns the steps that raised and an average."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    ema = PostHocEMA.from_model(model, directory, **OPTIONS, **options)
    raised = []
    for step in range(1, 13):
        model.weight.data += 0.1 * torch.randn(3, 4)
        good = model.weight.detach().clone()
        if step in bad_steps:
            model.weight.data[1, 2] = float("nan")
        try:
            ema.update_(model)
        except RuntimeError as error:
            assert f"tensor `weight`: the parameter is NaN at element 6 at step {step}" in str(error)
            raised.append(step)
        model.weight.data.copy_(good)
    assert ema.step == 12
    average = ema.synthesize([0.15])[0]["weight"]
    ema.finish()
    return raised, average


def test_nan_raises_or_skips_its_update_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raised, default = run(tmp_path / "default", {3, 4, 9})
    assert raised == [3, 4, 9]
    assert torch.isfinite(default).all()
    capfd.readouterr()
    raised, skipped = run(tmp_path / "skip", {3, 4, 9}, on_nonfinite="skip")
    assert raised == []
    assert torch.equal(skipped, default)
    assert capfd.readouterr().err.count("is left out") == 2
    _, whole = run(tmp_path / "whole", set())
    assert not torch.equal(whole, default)


def test_unknown_reaction_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_nonfinite = 'warn'"):
        PostHocEMA.from_model(torch.nn.Linear(1, 1), tmp_path, on_nonfinite="warn")
    assert not list(tmp_path.iterdir())
