"""Early snapshots: the schedule, its option, and short trainings."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import train

import posthoc_ema
from posthoc_ema import KarrasEMA, PostHocEMA

EARLY = [100, 120, 140, 170, 210, 250, 300, 360, 430, 520, 620, 740, 890]


def ramp(model: torch.nn.Module, step: int) -> None:
    """Sets every parameter to the share of a training of 1,000 steps."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step / 1000)


def stored(run_dir: Path) -> list[int]:
    return sorted(int(path.name.split(".")[1]) for path in run_dir.glob("0.*.safetensors"))


def saved_growth(run_dir: Path) -> float | None:
    """Returns the factor that the live state has."""
    with (run_dir / "state.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["state"])["settings"]["schedule"].get("snapshot_growth")


def test_quick_start_of_pytorch_posthoc_ema_ends_at_its_average(run_dir: Path) -> None:
    model = torch.nn.Linear(4, 2)
    ema = PostHocEMA.from_model(model, str(run_dir))
    for step in range(1, 1001):
        ramp(model, step)
        ema.update_(model)
    # sigma_rel 0.15 of a ramp of 1,000 steps, updated every 10 steps from step 100 on, by definition.
    with ema.model(model, sigma_rel=0.15) as averaged:
        assert averaged.weight.detach().numpy() == pytest.approx(0.824, abs=0.02)
    assert float(model.weight.detach().max()) == 1.0
    ema.close()
    with PostHocEMA.from_path(str(run_dir), model).state_dict(sigma_rel=0.15) as state_dict:
        assert state_dict["weight"].numpy() == pytest.approx(0.824, abs=0.02)
    assert stored(run_dir) == [*EARLY, 1000]


@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_early_snapshots_are_switched_off(run_dir: Path, off: float | None) -> None:
    model = torch.nn.Linear(2, 2)
    ema = PostHocEMA.from_model(model, run_dir, snapshot_growth=off, checkpoint_every=500)
    train(ema, model, 1000)
    assert stored(run_dir) == [500, 1000] and saved_growth(run_dir) is None


def test_resumed_run_keeps_its_factor(run_dir: Path) -> None:
    model = torch.nn.Linear(2, 2)
    for options, expected in [
        ({"snapshot_growth": None}, None),
        ({"resume": True}, None),
        ({"resume": True, "snapshot_growth": 1.5}, 1.5),
        ({"resume": True}, 1.5),
        ({"resume": True, "snapshot_growth": 0}, None),
    ]:
        ema = PostHocEMA.from_model(model, run_dir, **options)
        train(ema, model, 100)
        ema.save()
        assert saved_growth(run_dir) == expected
        ema.close()


@pytest.mark.parametrize("growth", [1.0, 1.001, -2, float("nan"), float("inf")])
def test_factor_that_is_too_small_is_an_error(run_dir: Path, growth: float) -> None:
    with pytest.raises(ValueError, match="snapshot_growth: .*at least 1.01 is needed; 0 switches it off"):
        PostHocEMA.from_model(torch.nn.Linear(2, 2), run_dir, snapshot_growth=growth)
    with pytest.raises(ValueError, match="snapshot_growth"):
        posthoc_ema.plan([0.15], steps=1000, snapshot_growth=growth)


def test_plan_and_advice_know_early_snapshots() -> None:
    def worst(**options: float | None) -> float:
        targets = [0.05 + 0.01 * i for i in range(24)]
        return max(plan.relative_error for plan in posthoc_ema.plan(targets, steps=1000, max_checkpoints=99, **options))

    assert worst() == pytest.approx(0.040, abs=5e-4)
    assert worst(snapshot_growth=None) == pytest.approx(0.453, abs=5e-4)
    [one] = posthoc_ema.plan([0.15], steps=1000)
    assert [weight.step for weight in one.weights if weight.index == 0] == [*EARLY, 1000]
    for growth in (1.2, None):
        best = posthoc_ema.advise(steps=3000, parameters=10**6, disk=1e8, snapshot_growth=growth)[1]
        schedule = {"checkpoint_every": best.checkpoint_every, "max_checkpoints": best.max_checkpoints}
        found = posthoc_ema.plan(
            [best.sigma_rel], steps=3000, profiles=best.profiles, snapshot_growth=growth, **schedule
        )
        # The advised error is the largest of the last tenth of the training, not only of its end.
        assert 0.1 * best.relative_error < found[0].relative_error < 1.1 * best.relative_error


def test_average_in_memory_stores_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    model = torch.nn.Linear(2, 2)
    average = KarrasEMA(model, sigma_rel=0.15, update_every=1)
    for _ in range(300):
        average.update()
    assert average.ema_model is not None
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}
