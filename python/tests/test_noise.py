"""Predicted errors of plans, and regularisations against the rounding of stored snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from posthoc_ema import PostHocEMA, plan
from posthoc_ema.utils import sigma_rel_to_gamma


def drifting(run_dir: Path, steps: int = 400) -> tuple[PostHocEMA, torch.nn.Linear, dict[float, np.ndarray]]:
    """Trains a slowly drifting model with snapshots in float16; returns exact averages of sigma_rel 0.01 and 0.02."""
    model = torch.nn.Linear(40, 40, bias=False)
    ema = PostHocEMA.from_model(
        model,
        run_dir,
        update_every=1,
        update_after_step=0,
        checkpoint_every=20,
        checkpoint_dtype=torch.float16,
        snapshot_growth=None,
    )
    slope = torch.randn_like(model.weight) * 1e-6
    seen = []
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(slope)
        ema.update_(model)
        seen.append(model.weight.detach().double().numpy().copy())
    ema.finish()
    times = np.arange(steps + 1) / steps
    exact = {}
    for sigma_rel in (0.01, 0.02):
        masses = np.diff(times ** (sigma_rel_to_gamma(sigma_rel) + 1))
        exact[sigma_rel] = np.tensordot(masses, np.stack(seen), axes=1)
    return ema, model, exact


def test_auto_lowers_the_rounding_error(run_dir: Path, tmp_path: Path) -> None:
    _, model, exact = drifting(run_dir)
    run = PostHocEMA.from_path(run_dir)
    targets = list(exact)
    size = float(np.sqrt(np.mean(model.weight.detach().double().numpy() ** 2)))

    def errors(averages: list[dict[str, torch.Tensor]]) -> list[float]:
        pairs = zip(averages, exact.values(), strict=True)
        return [float(np.sqrt(np.mean((a["weight"].double().numpy() - e) ** 2))) / size for a, e in pairs]

    off, auto = run.synthesize(targets), run.synthesize(targets, noise="auto")
    plans, chosen = run.plan(targets), run.plan(targets, noise="auto")
    for before, after, plain, quiet in zip(errors(off), errors(auto), plans, chosen, strict=True):
        assert after < before / 3
        assert quiet.rho > plain.rho == 0.0 and quiet.noise_gain < plain.noise_gain
        for found, planned in ((before, plain), (after, quiet)):
            assert planned.predicted is not None
            assert 0.5 < planned.predicted.total / found < 2
            together = np.hypot(planned.predicted.profile, planned.predicted.rounding)
            assert abs(together / planned.predicted.total - 1) < 1e-12

    # Every method takes the same argument and gives the same average.
    files = run.write(targets, tmp_path / "out", noise="auto")
    for file, average in zip(files, auto, strict=True):
        assert torch.equal(load_file(file)["weight"], average["weight"])
    with run.state_dict(targets[0], noise="auto") as state_dict:
        assert torch.equal(state_dict["weight"], auto[0]["weight"])
    with run.model(model, targets[0], noise="auto") as averaged:
        assert torch.equal(averaged.weight, auto[0]["weight"])
    (by_number,) = run.plan(targets[:1], noise=chosen[0].rho)
    assert by_number == chosen[0]


def test_plan_in_training_predicts_what_is_measured(run_dir: Path) -> None:
    """Trains a small network by SGD, and compares averages made between two snapshots with exact ones."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ema = PostHocEMA.from_model(
        model, run_dir, update_every=1, update_after_step=0, checkpoint_every=100, checkpoint_dtype=torch.float32
    )
    seen = []
    targets = [0.03, 0.1, 0.2]
    for step in range(1, 761):
        inputs = torch.randn(16, 8)
        loss = ((model(inputs) - inputs.sin().sum(1, keepdim=True)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_(model)
        seen.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]).numpy())
        if step == 150:
            assert all(plan.predicted is not None for plan in ema.plan(targets))
    times = np.arange(761) / 760
    size = float(np.sqrt(np.mean(seen[-1] ** 2)))
    plans = ema.plan(targets)
    for target, planned, average in zip(targets, plans, ema.synthesize(targets), strict=True):
        exact = np.diff(times ** (sigma_rel_to_gamma(target) + 1)) @ np.stack(seen)
        made = torch.cat([average[name].double().flatten() for name, _ in model.named_parameters()]).numpy()
        error = float(np.sqrt(np.mean((made - exact) ** 2))) / size
        assert planned.at == 760 and planned.predicted is not None
        assert 0.5 < planned.predicted.total / error < 2, (target, planned.predicted, error)
        assert f"predicted error {planned.predicted.total:.2g} of the weights" in str(planned)
        assert repr(planned.predicted) in repr(planned)
    ema.finish()


def test_plan_says_why_nothing_is_predicted(run_dir: Path) -> None:
    ema, model, _ = drifting(run_dir, 130)
    (now,) = ema.plan([0.1])
    assert now.predicted is not None and now.no_prediction is None
    with pytest.raises(ValueError, match="stored snapshots.*from_path"):
        ema.plan([0.1], noise="auto")
    with pytest.raises(ValueError, match="stored snapshots"), ema.model(model, 0.1, noise="auto"):
        pass
    # A stored step has a prediction, and three steps are enough for it.
    assert ema.plan([0.1], step=60, noise="auto")[0].predicted is not None
    (early,) = ema.plan([0.1], step=40, noise="auto")
    assert (early.predicted, early.rho) == (None, 0.0)
    assert early.no_prediction is not None and "averages of 2 steps" in early.no_prediction
    assert early.no_prediction in str(early) and repr(early.no_prediction) in repr(early)
    (before,) = plan([0.1], steps=10_000)
    assert before.predicted is None and "before training" in str(before)


def test_movement_or_another_run_predicts_before_training(run_dir: Path) -> None:
    _, _, _ = drifting(run_dir)
    (walked,) = plan([0.15], steps=20_000, movement="walk:0.3")
    (further,) = plan([0.15], steps=20_000, movement="walk:0.6", checkpoint_dtype=torch.bfloat16)
    assert walked.predicted is not None and further.predicted is not None
    assert abs(further.predicted.profile / walked.predicted.profile - 2) < 1e-9
    assert further.predicted.rounding > 1e4 * walked.predicted.rounding
    (alike,) = plan([0.15], steps=20_000, like=run_dir, noise="auto")
    assert alike.predicted is not None and alike.predicted.total > 0
    for options, message in (
        ({"movement": "run"}, "movement: `run` is not a kind of movement"),
        ({"movement": "walk", "like": run_dir}, "give one of them"),
        ({"noise": "auto"}, "give movement or like"),
    ):
        with pytest.raises(ValueError, match=message):
            plan([0.15], steps=20_000, **options)


@pytest.mark.parametrize("noise", ["on", -1.0, float("nan")])
def test_invalid_noise_is_refused(run_dir: Path, noise: float) -> None:
    drifting(run_dir, 80)
    with pytest.raises(ValueError, match="noise.*(off, auto or a number|0 or more)"):
        PostHocEMA.from_path(run_dir).plan([0.1], noise=noise)
