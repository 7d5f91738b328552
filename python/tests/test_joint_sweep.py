"""Joint sweeps and evaluations side by side, compared with those of the program."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, train
from safetensors.torch import load_file

from posthoc_ema import PostHocEMA, Profile, Swept, Trial

OPTIONS: dict[str, Any] = {
    "update_every": 1,
    "update_after_step": 0,
    "checkpoint_every": 50,
    "snapshot_growth": None,
    "max_checkpoints": 100,
}
LIST = [0.05, 0.1, 0.15, 0.2, 0.25]


class Parts(torch.nn.Module):
    """Encoder that moves as a ramp, and decoder that moves as a square root."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Linear(1, 1)
        self.encoder = torch.nn.Linear(1, 1)

    def set(self, step: int) -> None:
        with torch.no_grad():
            for parameter in self.encoder.parameters():
                parameter.fill_(float(step))
            for parameter in self.decoder.parameters():
                parameter.fill_(20.0 * step**0.5)


def tracked(path: Path, scale: float = 1.0) -> PostHocEMA:
    model = Parts()
    ema = PostHocEMA.from_model(model, path, **OPTIONS)
    train(ema, model, 500, lambda step: model.set(int(scale * step)))
    ema.finish()
    ema.close()
    return PostHocEMA.from_path(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[PostHocEMA, PostHocEMA]:
    """Two runs over the same steps, the second one slower."""
    folder = tmp_path_factory.mktemp("runs")
    return tracked(folder / "main"), tracked(folder / "guide", 0.5)


def value(state: dict[str, Any], name: str) -> float:
    return float(state[f"{name}.weight"])


def first(ema: PostHocEMA, sigma_rel: float, name: str) -> float:
    return value(ema.synthesize([sigma_rel])[0], name)


def program(
    tmp_path: Path, run: Path, score: str, *arguments: object, lengths: Sequence[float] = LIST
) -> dict[str, Any]:
    """Runs the program's sweep with an awk script over the encoder's and the decoder's values, and returns its JSON."""
    script = tmp_path / "eval.sh"
    # A file has the decoder's bias and weight, then the encoder's.
    read = 'od -An -v -w4 -tf4 -j$((8 + $(od -An -tu8 -N8 "$1"))) "$1" | awk \'NR == N { print $1 }\''
    lines = [
        f"d=$({read.replace('N {', '2 {')}); e=$({read.replace('N {', '4 {')})",
        f'[ -z "$2" ] || {{ set -- "$2"; g=$({read.replace("N {", "4 {")}); }}',
        f'awk -v "d=$d" -v "e=$e" -v "g=$g" \'BEGIN {{ OFMT = "%.17g"; {score} }}\'',
    ]
    script.write_text("\n".join(lines) + "\n")
    placeholder = "{} {with}" if "--with" in arguments else "{}"
    command = [sys.executable, "-m", "posthoc_ema", "sweep", run, "--eval", f"sh {script} {placeholder}", "--json"]
    sigma_rels = ",".join(map(str, lengths))
    command += ["--sigma-rel", sigma_rels, "--out-dir", tmp_path / "program", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_trials(swept: Swept, document: dict[str, Any]) -> None:
    """Checks that both sweeps evaluated the same lengths in the same order, with the same scores."""
    assert len(swept.results) == len(document["trials"])
    for trial, other in zip(swept.results, document["trials"]):
        assert trial.profile == Profile(other["profile"]) and trial.refined == other["refined"]
        assert trial.groups == {name: Profile(profile) for name, profile in other.get("groups", {}).items()}
        # The script reads values with seven digits.
        assert trial.score == pytest.approx(other["score"], rel=1e-4, abs=1e-3)
        assert trial.relative_error == pytest.approx(other["relative_error"], rel=1e-6, abs=1e-12)
    assert swept.best.profile == Profile(document["best"]["profile"])


def described(trial: Trial) -> str:
    """Returns what a trial measured, as text."""
    return f"{trial.profile!r} {trial.groups} {trial.means}"


def test_groups_have_lengths_of_their_own(runs: tuple[PostHocEMA, PostHocEMA], tmp_path: Path) -> None:
    ema, _ = runs
    d, e = first(ema, 0.18, "decoder"), first(ema, 0.09, "encoder")

    def evaluate(state: dict[str, Any]) -> dict[str, float]:
        x, y = (value(state, "decoder") - d) / 4, (value(state, "encoder") - e) / 10
        return {"near": x * x + y * y, "sum": value(state, "encoder") + value(state, "decoder")}

    out = tmp_path / "sweep"
    options: dict[str, Any] = {"metrics": {"near": "min", "sum": "max"}, "groups": ["decoder.*"]}
    options |= {"refine": 1, "rounds": 1}
    swept = ema.sweep(evaluate, LIST, out=out, name="both", **options)
    score = f'x = (d - {d!r}) / 4; y = (e - {e!r}) / 10; print "near:", x * x + y * y; print "sum:", e + d'
    further = ["--metric", "near", "--metric", "sum:max", "--group", "decoder.*"]
    further += ["--refine", "1", "--rounds", "1"]
    document = program(tmp_path, ema.checkpoint_dir, score, *further)
    check_trials(swept, document)
    assert [trial.profile for trial in swept.unbeaten] == [Profile(t["profile"]) for t in document["unbeaten"]]
    assert swept.settled == document["settled"]
    assert [(line.metric, line.part, line.flat, line.edge) for line in swept.lines] == [
        (line["metric"], line["part"], line["flat"], line["edge"]) for line in document["lines"]
    ]
    for metric, file in (("near", "best.safetensors"), ("sum", "best-sum.safetensors")):
        best = swept.metrics[metric].best
        written, other = load_file(out / file), load_file(tmp_path / "program" / file)
        for name, tensor in best.state_dict.items():
            assert torch.equal(tensor, written[name]) and torch.equal(tensor, other[name])
        for part, profile in (("encoder", best.profile), ("decoder", best.groups["decoder.*"])):
            assert value(best.state_dict, part) == value(ema.synthesize([profile])[0], part)
    best = swept.best
    assert best.profile.as_sigma_rel == pytest.approx(0.09, abs=0.03)
    assert best.groups["decoder.*"].as_sigma_rel == pytest.approx(0.18, abs=0.03)
    again = ema.sweep(evaluate, LIST, out=out, name="both", **options)
    # Each trial again, in the order in which the search comes by them.
    assert sorted(map(described, again.results)) == sorted(map(described, swept.results))
    assert again.best.groups == swept.best.groups and again.best.profile == swept.best.profile
    # A panel for each length and metric.
    assert swept.plot(figsize=(3, 8)).size == (450, 1200)
    with pytest.raises(ValueError, match="matches no averaged tensor"):
        ema.sweep(evaluate, LIST, groups=["nothing*"])
    with pytest.raises(ValueError, match="has other groups"):
        ema.sweep(evaluate, LIST, out=out, name="both", metrics=options["metrics"])


def test_second_run_has_a_length_of_its_own(runs: tuple[PostHocEMA, PostHocEMA], tmp_path: Path) -> None:
    ema, guide = runs
    e, g = first(ema, 0.1, "encoder"), first(guide, 0.19, "encoder")

    def evaluate(state: dict[str, Any], other: dict[str, Any]) -> float:
        x, y = (value(state, "encoder") - e) / 10, (value(other, "encoder") - g) / 5
        return x * x + y * y

    swept = ema.sweep(evaluate, LIST, with_run=guide, out=tmp_path / "sweep", refine=2, rounds=1, name="pair")
    score = f"x = (e - {e!r}) / 10; y = (g - {g!r}) / 5; print x * x + y * y"
    document = program(
        tmp_path, ema.checkpoint_dir, score, "--with", guide.checkpoint_dir, "--refine", "2", "--rounds", "1"
    )
    check_trials(swept, document)
    best = swept.best
    assert best.groups["with"].as_sigma_rel == pytest.approx(0.19, abs=0.03) and best.with_state_dict is not None
    assert best.profile.as_sigma_rel == pytest.approx(0.1, abs=0.03)
    for path, state in ((best.path, best.state_dict), (best.with_path, best.with_state_dict)):
        assert path is not None
        written, other = load_file(path), load_file(tmp_path / "program" / path.name)
        for name, tensor in state.items():
            assert torch.equal(tensor, written[name]) and torch.equal(tensor, other[name])
    records = [json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("sweep", "program")]
    assert records[0]["with"] == records[1]["with"] and records[0]["run"] == records[1]["run"]
    # Both averages in models.
    models = (Parts(), Parts())
    before = [bits(model) for model in models]

    def in_models(model: Parts, other: Parts) -> float:
        assert (model, other) == models and not model.training
        return evaluate(model.state_dict(), other.state_dict())

    held = ema.sweep(in_models, LIST, with_run=guide, model=models[0], with_model=models[1], refine=2, rounds=1)
    assert [trial.groups for trial in held.results] == [trial.groups for trial in swept.results]
    assert [bits(model) for model in models] == before
    with pytest.raises(ValueError, match="with_model goes with"):
        ema.sweep(in_models, LIST, with_run=guide, model=models[0])
    with pytest.raises(ValueError, match="is the name of the second run"):
        ema.sweep(evaluate, LIST, with_run=guide, groups=["with"])


class Meeting:
    """Evaluation that waits until as many as the jobs are in it, and ends them in an order of its own."""

    def __init__(self, ema: PostHocEMA, jobs: int, slow: int):
        self.optimum = first(ema, 0.13, "encoder")
        self.jobs, self.slow = jobs, slow
        self.barrier = threading.Barrier(jobs, timeout=20)
        self.threads: set[int] = set()
        self.seen: list[int] = []

    def __call__(self, state: Any, job: int) -> float:
        state = state if isinstance(state, dict) else state.state_dict()
        self.seen.append(job)
        self.threads.add(threading.get_ident())
        self.barrier.wait()
        if job == self.slow:
            time.sleep(0.05)
        return (value(state, "encoder") - self.optimum) ** 2


def test_jobs_evaluate_side_by_side_with_the_results_of_the_program(
    runs: tuple[PostHocEMA, PostHocEMA], tmp_path: Path
) -> None:
    ema, _ = runs
    # Four targets and two rounds of four refinements: each evaluation waits for three others.
    swept = []
    for slow in (0, 3):
        meeting = Meeting(ema, 4, slow)
        swept.append(ema.sweep(meeting, LIST[:4], jobs=4, refine=8, progress=False))
        assert len(meeting.threads) == 4 and set(meeting.seen) == {0, 1, 2, 3}
        assert threading.get_ident() not in meeting.threads
    assert [(t.profile, t.score) for t in swept[0].results] == [(t.profile, t.score) for t in swept[1].results]
    # Two intervals of the list, narrowed to a ninth.
    assert swept[0].best.profile.as_sigma_rel == pytest.approx(0.13, abs=0.1 / 9)
    score = f"x = e - {meeting.optimum!r}; print x * x"
    further = ["--jobs", "4", "--refine", "8"]
    document = program(tmp_path, ema.checkpoint_dir, score, *further, lengths=LIST[:4])
    check_trials(swept[0], document)
    models = [Parts() for _ in range(4)]
    held = ema.sweep(Meeting(ema, 4, 1), LIST[:4], jobs=4, refine=8, model=models, progress=False)
    assert [t.profile for t in held.results] == [t.profile for t in swept[0].results]
    with pytest.raises(ValueError, match="need a list of 4 models"):
        ema.sweep(Meeting(ema, 4, 1), LIST, jobs=4, model=models[0])
    with pytest.raises(ValueError, match="two jobs have the same model"):
        ema.sweep(Meeting(ema, 2, 1), LIST, jobs=2, model=[models[0]] * 2)
    with pytest.raises(ValueError, match="jobs = 0"):
        ema.sweep(Meeting(ema, 1, 1), LIST, jobs=0)


def test_failures_and_interrupts_of_jobs(runs: tuple[PostHocEMA, PostHocEMA], tmp_path: Path) -> None:
    ema, _ = runs
    calls: list[tuple[float, int]] = []

    def evaluate(state: dict[str, Any], repeat: int) -> float:
        encoder = value(state, "encoder")
        calls.append((encoder, repeat))
        if encoder == failing:
            raise RuntimeError("out of memory")
        if interrupt and len(calls) == 7:
            raise SystemExit
        return encoder

    failing, interrupt = first(ema, 0.15, "encoder"), False
    swept = ema.sweep(evaluate, LIST, jobs=3, repeats=3, refine=0)
    assert [trial.error for trial in swept.results] == [None, None, "RuntimeError: out of memory", None, None]
    assert [trial.profile.as_sigma_rel for trial in swept.results] == pytest.approx(LIST)
    calls.clear()
    failing, interrupt = -1.0, True
    with pytest.raises(SystemExit):
        ema.sweep(evaluate, LIST, jobs=2, repeats=3, refine=0, out=tmp_path / "sweep", name="mine")
    done = len(json.loads((tmp_path / "sweep/sweep.json").read_text())["trials"])
    assert 0 < done < 5 and len(calls) < 10
    interrupt = False
    again = ema.sweep(evaluate, LIST, jobs=2, repeats=3, refine=0, out=tmp_path / "sweep", name="mine")
    assert len(again.results) == 5 and len(again.results[4].repeats) == 3
    assert not any(thread.name.startswith("posthoc_ema sweep") for thread in threading.enumerate())


def test_groups_of_the_newest_update_are_refused(tmp_path: Path) -> None:
    model = Parts()
    ema = PostHocEMA.from_model(model, tmp_path / "ema", **OPTIONS)
    train(ema, model, 120, model.set)
    with pytest.raises(ValueError, match="give the `step` of a snapshot"):
        ema.sweep(lambda state: 0.0, LIST, groups=["decoder.*"])
    swept = ema.sweep(lambda state: value(state, "decoder"), LIST, groups=["decoder.*"], step=100, refine=0)
    assert swept.at == 100 and swept.lines[0].part is None and swept.lines[1].part == "decoder.*"
    ema.close()
