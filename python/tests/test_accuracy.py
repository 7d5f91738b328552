"""Warnings of averages that are far from what was asked for: reason, remedy, and once."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import bits, train

from posthoc_ema import PostHocEMA

SPARSE = {"snapshot_growth": None, "checkpoint_every": 1000}


def ramped(run_dir: Path, steps: int, **options: object) -> tuple[PostHocEMA, torch.nn.Module]:
    """Tracks a model whose parameters are the share of the training."""
    model = torch.nn.Linear(4, 2)
    ema = PostHocEMA.from_model(model, run_dir, **options)

    def step(i: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(i / steps)

    train(ema, model, steps, step)
    return ema, model


def raised(act: object) -> list[warnings.WarningMessage]:
    """Returns the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()  # type: ignore[operator]
    return caught


def test_too_few_snapshots_are_warned_of_once(run_dir: Path) -> None:
    ema, model = ramped(run_dir, 1000, **SPARSE)

    def evaluate() -> None:
        with ema.model(model, 0.15) as averaged:
            assert float(averaged.weight.detach().mean()) == pytest.approx(0.676, abs=0.01)

    [found] = raised(evaluate)
    assert found.category is RuntimeWarning and found.filename == __file__
    text = str(found.message)
    assert "sigma_rel 0.15 at step 1000 has a relative error of" in text
    assert "averages of step 1000 alone are too few so far" in text and "snapshot_growth" in text
    # The next evaluations of the same target, also after more training, are quiet.
    assert not raised(evaluate)
    train(ema, model, 10)
    assert not raised(lambda: ema.synthesize([0.15]))
    with ema.state_dict(0.15):
        pass
    # Another target is not, nor is another run.
    assert len(raised(lambda: ema.synthesize([0.16, 0.14, 0.15]))) == 1
    assert ema.plan([0.15])[0].warning is not None and ema.plan([0.05])[0].warning is None


@pytest.mark.parametrize("way", ["synthesize", "model", "state_dict", "write", "switch_", "sweep"])
def test_every_way_to_an_average_warns_once(run_dir: Path, tmp_path: Path, way: str) -> None:
    ema, model = ramped(run_dir, 1000, **SPARSE)

    def act() -> None:
        if way == "synthesize":
            ema.synthesize([0.12, 0.15, 0.18])
        elif way == "write":
            ema.write([0.12, 0.15, 0.18], tmp_path / "averages")
        elif way == "switch_":
            ema.switch_(model, 0.15)
        elif way == "sweep":
            ema.sweep(lambda state_dict: float(state_dict["weight"].mean()), [0.12, 0.15, 0.18])
        else:
            with getattr(ema, way)(*([model] if way == "model" else []), 0.15):
                pass

    [found] = raised(act)
    assert found.filename == __file__, found
    assert ("and 2 more targets of more than 5%" in str(found.message)) == (way in ("synthesize", "write", "sweep"))


def test_step_between_snapshots_names_the_nearest(run_dir: Path) -> None:
    ramped(run_dir, 5000, **SPARSE)[0].close()
    run = PostHocEMA.from_path(run_dir)
    with pytest.warns(
        RuntimeWarning, match="step 4990 has .*: the step lies between snapshots: ask for step 5000, the nearest"
    ):
        [average] = run.synthesize([0.15], step=4990)
    assert float(average["weight"].mean()) == pytest.approx(0.495, abs=0.01)
    with pytest.warns(RuntimeWarning, match="7.7%: averages of 5 steps, 1000 to 5000, are too few so far"):
        [average] = run.synthesize([0.15], step=5000)
    assert float(average["weight"].mean()) == pytest.approx(0.818, abs=0.01)


def test_length_outside_of_the_tracked_ones_names_them(run_dir: Path) -> None:
    ramped(run_dir, 2000, sigma_rels=(0.1, 0.2), update_every=1)[0].close()
    with pytest.warns(RuntimeWarning, match="outside of the tracked sigma_rel 0.1 to 0.2: ask for one within"):
        PostHocEMA.from_path(run_dir).synthesize([0.01])


def test_accurate_averages_are_quiet(run_dir: Path) -> None:
    ema, _ = ramped(run_dir, 1000)
    assert not raised(lambda: ema.synthesize([0.05, 0.1, 0.15, 0.2, 0.28]))


def test_warning_that_is_an_exception_restores_the_model(run_dir: Path) -> None:
    ema, model = ramped(run_dir, 1000, **SPARSE)
    before = bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="too few"), ema.model(model, 0.15):
            pass
    assert bits(model) == before and model.training


def test_program_in_python_prints_its_own_warning_once(run_dir: Path, tmp_path: Path) -> None:
    ramped(run_dir, 1000, **SPARSE)[0].close()
    arguments = ["synthesize", str(run_dir), "--sigma-rel", "0.15", "-o", str(tmp_path / "average.safetensors")]
    command = [sys.executable, "-W", "error", "-m", "posthoc_ema", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("too few so far") == 1 and done.stderr.startswith("warning: sigma_rel 0.15")
