"""Sweeps: evaluations of many lengths, their record, and the best average."""

from __future__ import annotations

import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bits, train
from safetensors.torch import load_file

from posthoc_ema import PostHocEMA, Profile, Swept

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 25, "max_checkpoints": 100}
LIST = [0.05, 0.08, 0.11, 0.14, 0.17, 0.2, 0.23, 0.26]
OPTIMUM = 0.137


class Ramp(torch.nn.Module):
    """Weight that equals the step, so that each length has another average; dropout shows the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.dropout = torch.nn.Dropout()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))


@pytest.fixture
def model() -> Ramp:
    return Ramp()


@pytest.fixture
def ema(model: Ramp, run_dir: Path) -> PostHocEMA:
    def step(i: int) -> None:
        with torch.no_grad():
            model.weight.fill_(float(i))

    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 500, step)
    ema.finish()
    ema.close()
    return PostHocEMA.from_path(run_dir)


def weight(state_dict: dict[str, Any]) -> float:
    return float(state_dict["weight"][0])


class Score:
    """Squared distance from the average of the optimum; records the averages it was called with."""

    def __init__(self, ema: PostHocEMA):
        self.optimum = weight(ema.synthesize([OPTIMUM])[0])
        self.calls: list[float] = []

    def __call__(self, state_dict: dict[str, Any]) -> float:
        self.calls.append(weight(state_dict))
        return (self.calls[-1] - self.optimum) ** 2


def check(swept: Swept, ema: PostHocEMA, refine: int = 6) -> None:
    """Checks that the refinement is close to the optimum, and that the best average is that of its profile."""
    found = swept.best.profile.as_sigma_rel
    assert found is not None and abs(found - OPTIMUM) <= 0.06 / 1.38**refine
    assert len(swept.results) == len(LIST) + refine
    assert swept.best.score == min(trial.score for trial in swept.results if trial.score is not None)
    assert weight(swept.best.state_dict) == weight(ema.synthesize([swept.best.profile])[0])
    assert [trial.refined for trial in swept.results] == [False] * len(LIST) + [True] * refine
    assert swept.at == 500 and swept.edge is None


def test_state_dicts_are_evaluated_and_the_best_is_returned(ema: PostHocEMA) -> None:
    score = Score(ema)
    reported: list[tuple[int, int]] = []
    swept = ema.sweep(score, LIST, batch=3, progress=lambda done, planned: reported.append((done, planned)))
    check(swept, ema)
    assert reported == [(i, 14) for i in range(1, 15)]
    assert swept.best.path is None
    for trial, average in zip(swept.results, score.calls):
        # One pass for several targets has the bits of one pass for each.
        assert average == weight(ema.synthesize([trial.profile])[0])
        plan = ema.plan([trial.profile])[0]
        assert (trial.relative_error, trial.noise_gain) == (plan.relative_error, plan.noise_gain)
        assert trial.seconds >= 0.0 and trial.error is None


def test_sigma_rels_extend_targets_and_scores_can_be_maximized(ema: PostHocEMA) -> None:
    score = Score(ema)
    swept = ema.sweep(lambda state: -score(state), [Profile.half_life(5.0)], sigma_rels=LIST, minimize=False, refine=2)
    assert len(swept.results) == 11 and swept.results[0].profile == Profile.half_life(5.0)
    assert swept.results[0].length == ("half_life", pytest.approx(5.0))
    assert not swept.minimize and swept.best.score == max(trial.score or -np.inf for trial in swept.results)


@pytest.mark.parametrize("live", [False, True])
def test_model_is_evaluated_in_place_and_restored(ema: PostHocEMA, model: Ramp, run_dir: Path, live: bool) -> None:
    score = Score(ema)
    if live:
        ema = PostHocEMA.from_model(model, run_dir, **OPTIONS, resume=True)
    model.train()
    before, gradient = bits(model), torch.ones(3)
    model.weight.grad = gradient

    def evaluate(averaged: Ramp) -> torch.Tensor:
        assert averaged is model and not averaged.training and not averaged.dropout.training
        value = torch.tensor(score(averaged.state_dict()))
        with torch.no_grad():
            averaged.weight.add_(7.0)
            averaged.calls.add_(1)
        averaged.half()
        averaged.train()
        if len(score.calls) == 3:
            raise ValueError("out of luck")
        return value

    swept = ema.sweep(evaluate, LIST, model=model)
    assert bits(model) == before and model.training and model.dropout.training
    assert model.weight.grad is gradient and model.weight.dtype is torch.float32
    assert [trial.error for trial in swept.results if trial.error] == ["ValueError: out of luck"]
    assert len(swept.results) == 14 and swept.at == 500
    assert score.calls[0] == pytest.approx(weight(ema.synthesize([LIST[0]])[0]), rel=1e-6)
    ema.close()


def test_newest_average_of_a_tracker_can_be_swept(model: Ramp, run_dir: Path, tmp_path: Path) -> None:
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 20)
    swept = ema.sweep(weight, [0.1, 0.2, 0.25], out=tmp_path / "sweep", refine=1)
    assert swept.at == 20 and len(swept.results) == 4
    # It is in no snapshot, so no file is written.
    assert swept.best.path is None and not (tmp_path / "sweep/best.safetensors").exists()
    assert (tmp_path / "sweep/sweep.json").exists()


def test_failures_are_recorded_and_the_sweep_continues(ema: PostHocEMA) -> None:
    outcomes: list[Any] = [
        RuntimeError("CUDA out of memory"),
        None,
        float("nan"),
        "many",
        3,
        True,
        np.float32(0.5),
        [1, 2],
    ]
    remaining = iter(outcomes)

    def evaluate(state_dict: dict[str, Any]) -> Any:
        outcome = next(remaining)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    swept = ema.sweep(evaluate, LIST, refine=0)
    errors = [trial.error for trial in swept.results]
    assert errors[0] == "RuntimeError: CUDA out of memory"
    assert errors[1] is not None and "returned None: it must return one number" in errors[1]
    assert errors[2] is not None and "the score is NaN" in errors[2]
    assert errors[3] is not None and "'many'" in errors[3] and errors[7] is not None
    assert errors[4:7] == [None] * 3 and [trial.score for trial in swept.results[4:7]] == [3.0, 1.0, 0.5]
    assert swept.best.score == 0.5


def test_first_exception_is_the_cause_if_all_fail(ema: PostHocEMA, tmp_path: Path) -> None:
    def evaluate(state_dict: dict[str, Any]) -> float:
        raise KeyError("layer")

    with pytest.raises(RuntimeError, match="all 2 evaluations failed: sigma_rel 0.1: KeyError") as raised:
        ema.sweep(evaluate, [0.1, 0.2], out=tmp_path / "sweep")
    assert isinstance(raised.value.__cause__, KeyError)
    # The sweep has released its directory.
    with pytest.raises(RuntimeError, match="all 2"):
        ema.sweep(evaluate, [0.1, 0.2], out=tmp_path / "sweep")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupted_sweep_continues(ema: PostHocEMA, tmp_path: Path, interrupt: type[BaseException]) -> None:
    score, out = Score(ema), tmp_path / "sweep"

    def evaluate(state_dict: dict[str, Any]) -> float:
        if len(score.calls) == 4 and not interrupted:
            interrupted.append(True)
            raise interrupt
        if len(score.calls) == 2 and not failed:
            failed.append(True)
            raise ValueError("once")
        return score(state_dict)

    interrupted: list[bool] = []
    failed: list[bool] = []
    with pytest.raises(interrupt):
        ema.sweep(evaluate, LIST, out=out)
    document = json.loads((out / "sweep.json").read_text())
    resume = partial(ema.sweep, evaluate, LIST, out=out, name=document["evaluation"])
    assert len(document["trials"]) == 5 and document["trials"][2]["error"] == "ValueError: once"
    assert document["evaluation"].endswith("test_interrupted_sweep_continues.<locals>.evaluate")
    swept = resume()
    # No average was evaluated twice.
    assert len(score.calls) == len(set(score.calls)) == 14
    assert len(swept.results) == 14 and not any(trial.error for trial in swept.results)
    assert swept.best.path == out / "best.safetensors"
    assert weight(load_file(swept.best.path)) == weight(swept.best.state_dict)
    again = resume()
    assert len(score.calls) == 14 and again.results == swept.results and again.best.score == swept.best.score


def test_invalid_sweeps_are_refused(ema: PostHocEMA, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    ema.sweep(weight, [0.1, 0.2], out=out, refine=0)
    for options, part in [
        ({"minimize": False}, "has another direction"),
        ({"step": 450}, "is at another step"),
    ]:
        with pytest.raises(ValueError, match=part):
            ema.sweep(weight, [0.1], out=out, **options)
    with pytest.raises(ValueError, match="has another evaluation"):
        ema.sweep(partial(Score(ema)), [0.1], out=out)
    for inside in (run_dir, run_dir / "sweep"):
        with pytest.raises(ValueError, match="give one outside of"):
            ema.sweep(weight, [0.1], out=inside)
    assert not (run_dir / "sweep").exists()
    for options, part in [
        ({}, "nothing to evaluate"),
        ({"targets": [0.3]}, "plain mean"),
        ({"targets": [0.1], "step": 501}, "after the last snapshot"),
        ({"targets": [0.1], "refine": -1}, "refine"),
        ({"targets": [0.1], "batch": 0}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=part):
            ema.sweep(weight, **options)


def shifted(state_dict: dict[str, Any], by: float = 0.0) -> float:
    return weight(state_dict) + by


def test_scores_of_another_evaluation_are_not_reused(
    ema: PostHocEMA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def within(state_dict: dict[str, Any]) -> float:
        return weight(state_dict)

    for number, (first, second) in enumerate(
        [
            (weight, lambda state: -weight(state)),
            (lambda state: weight(state), lambda state: -weight(state)),
            (partial(shifted, by=1.0), partial(shifted, by=2.0)),
            (shifted, partial(shifted, by=2.0)),
            (within, within),
            (Score(ema), Score(ema)),
            (Score(ema).__call__, Score(ema).__call__),
        ]
    ):
        out = tmp_path / f"sweep{number}"
        ema.sweep(first, [0.1, 0.2], out=out, refine=0)
        assert caplog.text == ""
        with pytest.raises(ValueError, match="another evaluation|give name="):
            ema.sweep(second, [0.1, 0.2], out=out, refine=0)
        # A given name declares them to be the same.
        name = json.loads((out / "sweep.json").read_text())["evaluation"]
        swept = ema.sweep(second, [0.1, 0.2, 0.25], out=out, refine=0, name=name)
        assert len(swept.results) == 3 and "the 2 scores" in caplog.text and name in caplog.text
        caplog.clear()
        with pytest.raises(ValueError, match="has another evaluation"):
            ema.sweep(second, [0.1, 0.2], out=out, refine=0, name="mine")
    # A function with a unique name continues, which is logged.
    ema.sweep(shifted, [0.1], out=tmp_path / "named", refine=0)
    ema.sweep(shifted, [0.1], out=tmp_path / "named", refine=0)
    assert caplog.record_tuples == [("posthoc_ema", logging.WARNING, caplog.messages[0])]


def test_average_that_its_dtype_cannot_hold_fails_alone(ema: PostHocEMA, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize = ema.synthesize

    def overflowing(targets: list[Profile], *positional: Any, **options: Any) -> list[dict[str, Any]]:
        if Profile.sigma_rel(0.1) in targets:
            raise ValueError("tensor `weight` overflows F16")
        return synthesize(targets, *positional, **options)

    monkeypatch.setattr(ema, "synthesize", overflowing)
    swept = ema.sweep(weight, [0.05, 0.1, 0.2], refine=0)
    assert [trial.error for trial in swept.results] == [None, "ValueError: tensor `weight` overflows F16", None]


def test_evaluation_may_change_the_working_directory(
    ema: PostHocEMA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)

    def evaluate(state_dict: dict[str, Any]) -> float:
        os.chdir(tmp_path / "other")
        return weight(state_dict)

    swept = ema.sweep(evaluate, [0.1, 0.2], out="sweep", refine=0)
    assert swept.best.path == tmp_path / "sweep/best.safetensors" and swept.best.path.exists()
    assert (tmp_path / "sweep/sweep.json").exists() and not list((tmp_path / "other").iterdir())


def test_record_has_the_format_of_the_command_line(ema: PostHocEMA, tmp_path: Path) -> None:
    ema.sweep(weight, [0.1, 0.2], out=tmp_path / "sweep", refine=1)
    document = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert document["posthoc_ema_sweep"] == 1 and document["goal"] == "minimize" and document["at"] == 500
    assert set(document["trials"][0]) == {"profile", "score", "relative_error", "noise_gain", "seconds", "refined"}


def test_best_at_an_end_is_marked(ema: PostHocEMA) -> None:
    assert ema.sweep(weight, LIST, refine=0).edge == "longest"
    assert ema.sweep(weight, LIST, refine=1, minimize=False).edge == "shortest"


def test_best_at_an_edge_is_searched_outwards_and_a_flat_curve_is_not(ema: PostHocEMA) -> None:
    swept = ema.sweep(Score(ema), [0.2, 0.22, 0.24], refine=9)
    assert swept.best.profile.as_sigma_rel == pytest.approx(OPTIMUM, abs=0.01) and swept.edge is None
    assert not swept.flat and not swept.at_limit
    shortest = ema.sweep(weight, [0.1, 0.12], minimize=False)
    assert shortest.edge == "shortest" and shortest.at_limit
    assert all(trial.relative_error <= 0.05 for trial in shortest.results)
    flat = ema.sweep(lambda state: 0.93, LIST)
    assert flat.flat and len(flat.results) == len(LIST) and flat.edge is None


def test_repeats_give_a_standard_error_and_lengths_that_are_as_good(ema: PostHocEMA, tmp_path: Path) -> None:
    score, calls = Score(ema), []

    def evaluate(state: dict[str, Any], repeat: int) -> float:
        calls.append(repeat)
        shared = np.random.default_rng(repeat).normal()
        own = np.random.default_rng([repeat, int(weight(state) * 1000)]).normal()
        return score(state) / 1000 + 5 * shared + 0.01 * own

    options: dict[str, Any] = {"out": tmp_path / "sweep", "refine": 2, "name": "noisy"}
    ema.sweep(evaluate, LIST, **options)
    swept = ema.sweep(evaluate, LIST, repeats=3, **options)
    # The first repeats were there already, but for refinements that are now elsewhere.
    assert calls[:10] == [1] * 10 and calls[10:14] == [2, 3, 2, 3]
    comparison = swept.metrics["score"]
    assert comparison.standard_error is not None and 0.003 < comparison.standard_error < 0.02
    assert swept.best.profile in comparison.as_good and len(comparison.as_good) < 8 and not swept.flat
    found = swept.best.profile.as_sigma_rel
    assert found is not None and abs(found - OPTIMUM) < 0.03
    assert set(swept.results[0].repeats) == {"1", "2", "3"}
    assert swept.results[0].score == pytest.approx(np.mean([row[0][0] for row in swept.results[0].repeats.values()]))
    assert weight(load_file(tmp_path / "sweep/best.safetensors")) == weight(swept.best.state_dict)
    assert ema.sweep(lambda state: 1.0, LIST, repeats=2).flat
    with pytest.raises(ValueError, match="repeats = 0"):
        ema.sweep(evaluate, LIST, repeats=0)


def test_each_metric_has_its_best(ema: PostHocEMA, tmp_path: Path) -> None:
    score = Score(ema)

    def evaluate(state: dict[str, Any]) -> dict[str, float]:
        return {"mean": weight(state), "dist": score(state), "other": 0.0}

    swept = ema.sweep(evaluate, LIST, metrics={"dist": "min", "mean": "max"}, out=tmp_path / "sweep", name="both")
    assert list(swept.metrics) == ["dist", "mean"] and swept.best is swept.metrics["dist"].best
    found, other = (swept.metrics[name].best.profile.as_sigma_rel for name in ("dist", "mean"))
    assert found is not None and abs(found - OPTIMUM) < 0.01 and other is not None and other <= 0.05
    assert not swept.metrics["mean"].minimize and swept.metrics["mean"].standard_error is None
    path = swept.metrics["mean"].best.path
    assert path == tmp_path / "sweep/best-mean.safetensors" and path is not None
    assert weight(load_file(path)) == swept.metrics["mean"].best.score
    lengths = [trial.profile.as_sigma_rel or 0.0 for trial in swept.unbeaten]
    assert max(lengths) == found and min(lengths) == other
    assert swept.plot(figsize=(6, 8)).size == (900, 1200)
    with pytest.raises(ValueError, match="has other metrics"):
        ema.sweep(evaluate, LIST, metrics={"dist": "min"}, out=tmp_path / "sweep", name="both")
    with pytest.raises(ValueError, match="write min or max"):
        ema.sweep(evaluate, LIST, metrics={"dist": "up"})
    with pytest.raises(RuntimeError, match="returned no fid"):
        ema.sweep(evaluate, LIST, metrics={"fid": "min"})
    with pytest.raises(RuntimeError, match="must return a dictionary"):
        ema.sweep(weight, LIST, metrics={"fid": "min"})


def test_scores_are_drawn(ema: PostHocEMA) -> None:
    score = Score(ema)

    def evaluate(state_dict: dict[str, Any]) -> float:
        if len(score.calls) == 7:
            score.calls.append(0.0)
            raise ValueError
        return score(state_dict)

    swept = ema.sweep(evaluate, LIST)
    picture = swept.plot(figsize=(6, 4))
    assert picture.size == (900, 600)
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert {(0, 90, 160), (180, 30, 30)} <= colours, "the scores and the failure"
    # The failure is visible.
    without = Swept(swept.best, tuple(t for t in swept.results if t.error is None), swept.at, True, None)
    assert without.plot(figsize=(6, 4)).tobytes() != picture.tobytes()
    windows = ema.sweep(score, [Profile.uniform(fraction=f) for f in (0.2, 0.4, 0.8)], refine=2)
    assert windows.results[0].length == ("fraction", 0.2)
    windows.plot("mine", (3, 2))
    table = ema.sweep(weight, [Profile.table([(0.5, 0.1), (1.0, 1.0)])])
    with pytest.raises(ValueError, match="has no length"):
        table.plot()
