"""Synthesis from 40 snapshots in the page cache, beside a loop in C that adds up the same mapped files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import answers
import many
import models
import turns
from contenders import Absent, Checked, limit, packages_of
from environment import Environment
from turns import Row

STEPS, PROFILES = 20, 2
TARGET = 0.15
MANY = tuple(float(target) for target in np.linspace(0.05, 0.28, 31).round(6))
ROUNDS = 5
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
NAMES = {
    "posthoc-ema": "posthoc-ema, Python, into memory",
    "pytorch-posthoc-ema": "pytorch-posthoc-ema, into memory",
    "ema-pytorch": "ema-pytorch, into memory",
    "edm2": "EDM2's way, into a file in memory",
    "lora-merge": "a LoRA-merge script, into a file in memory",
    "torch-loop": "a torch loop over mapped files, into memory",
}
TO_DISK = "posthoc-ema, the program, into a file on the disk"
TO_MEMORY = "posthoc-ema, the program, into a file in memory"
MERGEKIT = "mergekit, the program, into a file in memory"


@dataclass
class Task:
    """Stored run, and a synthesis task on it."""

    environment: Environment
    model: str
    dtype: str
    run: Path
    # For output files: on the disk, and in memory.
    disk: Path
    memory: Path
    targets: tuple[float, ...] = (TARGET,)
    output: str = "float32"
    # Index, step and weight of each snapshot, for each target.
    weights: list[list[tuple[int, int, float]]] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return models.parameters(models.MODELS[self.model][self.environment.size])

    @property
    def bytes(self) -> int:
        """Bytes of all snapshots' tensors."""
        return STEPS * PROFILES * BYTES[self.dtype] * self.parameters

    def files(self) -> list[Path]:
        return sorted(self.run.glob("*.safetensors"))

    def with_targets(self, targets: tuple[float, ...], output: str) -> Task:
        """Returns another task on the same run. The program solves for the weights, or Python if there is none."""
        program = self.environment.program
        listed = ",".join(map(str, targets))
        if isinstance(program, Path):
            printed = self.environment.run(program, "plan", self.run, "--sigma-rel", listed, "--json")
        else:
            script = (
                "import sys, json, posthoc_ema as p; r = p.PostHocEMA.from_path(sys.argv[1]); "
                "plans = r.plan([float(t) for t in sys.argv[2].split(',')]); "
                "print(json.dumps({'targets': [{'weights': [vars(w) if hasattr(w, '__dict__') else "
                "{'index': w.index, 'step': w.step, 'weight': w.weight} for w in plan.weights]} for plan in plans]}))"
            )
            printed = self.environment.run(self.environment.python, "-c", script, self.run, listed)
        plans = json.loads(printed)["targets"]
        weights = [[(w["index"], w["step"], w["weight"]) for w in plan["weights"]] for plan in plans]
        return Task(
            self.environment, self.model, self.dtype, self.run, self.disk, self.memory, targets, output, weights
        )


@contextmanager
def stored(environment: Environment, model: str, dtype: str) -> Iterator[Task]:
    """Writes a run to the disk, where it is in the page cache; removes it afterwards."""
    disk = environment.folder / "synthesis"
    memory = environment.memory / "posthoc-ema-peers"
    for folder in (disk, memory):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        run = disk / "run"
        environment.run(*environment.script("data", "run", run, model, environment.size, dtype, str(STEPS)))
        # Pages that are not written yet would be written during the measurements.
        environment.run("sync")
        yield Task(environment, model, dtype, run, disk, memory)
    finally:
        shutil.rmtree(disk, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)


def measure(environment: Environment) -> Iterator[dict[str, Any]]:
    """Measures all cases with a warm page cache."""
    for model in ("150 tensors", "2,000 tensors"):
        with stored(environment, model, "float16") as run:
            yield one_target(run.with_targets((TARGET,), "float32"))
    for model, dtype in (("150 tensors", "bfloat16"), ("150 tensors, half", "float32")):
        with stored(environment, model, dtype) as run:
            yield other_dtype(run.with_targets((TARGET,), "bfloat16"))


def one_target(task: Task) -> dict[str, Any]:
    """Measures all contenders that read our files together, and each of the others in turns with ours."""
    check = Check(task)
    groups = [[scan(task), *ours(task, check), *readers(task, check), mergekit(task, check)]]
    rows = take_turns(task, groups[0], ROUNDS)
    for kind in ("pytorch-posthoc-ema", "ema-pytorch", "edm2"):
        rows += peer_rows(task, check, kind)
    return case_of(task, "one target", rows)


def other_dtype(task: Task) -> dict[str, Any]:
    check = Check(task)
    contenders = [scan(task), *ours(task, check), worker(task, check, "torch-loop")]
    return case_of(task, "one target, bf16 results", take_turns(task, contenders, ROUNDS))


def case_of(task: Task, title: str, rows: list[Row]) -> dict[str, Any]:
    """Returns a case for the record, with limits and rows apart."""
    limits = [row for row in rows if row.get("limit")]
    return {
        "work": "synthesis",
        "title": f"Synthesis, {STEPS * PROFILES} {SHORT[task.dtype]} snapshots, {title}",
        "model": task.model,
        "parameters": task.parameters,
        "tensors": len(models.MODELS[task.model][task.environment.size]),
        "dtype": task.dtype,
        "bytes": task.bytes,
        "targets": len(task.targets),
        "limits": limits,
        "rows": [row for row in rows if row not in limits],
        "note": "",
    }


def take_turns(
    task: Task, contenders: list[turns.Contender], rounds: int, slow: float = turns.SLOW_SECONDS
) -> list[Row]:
    """Runs contenders in turns, and adds their shares of the limit among them."""
    try:
        rows = turns.in_turns(contenders, task.environment.rounds(rounds), slow=slow)
    finally:
        for contender in contenders:
            contender.close()
    limits = [row for row in rows if row["name"] in (SCAN, PEAK, many.NAME)]
    for row in limits:
        row["limit"] = True
        row.pop("peak_anonymous_bytes", None)
    # The slower of two limits counts.
    slowest = max(limits, key=lambda row: row.get("seconds_median", 0.0), default=None)
    turns.add_rates([row for row in rows if row["name"] != PEAK], slowest, task.bytes)
    for row in limits:
        row.pop("share_of_limit", None)
    return rows


def peer_rows(task: Task, check: Check, kind: str) -> list[Row]:
    """Measures a peer on files of its own, in turns with ours and the scan. Returns its row, with our times in it."""
    folder = task.memory / kind
    packages = packages_of(task.environment, kind)
    if isinstance(packages, str):
        return take_turns(task, [Absent(NAMES[kind], packages)], 0)
    try:
        command = task.environment.script("data", kind, task.run, folder, task.model, task.environment.size, *packages)
        task.environment.run(*command)
        contenders = [scan(task), worker(task, check, "posthoc-ema"), worker(task, check, kind)]
        _, mine, theirs = take_turns(task, contenders, ROUNDS)
    except SystemExit as why:
        return take_turns(task, [Absent(NAMES[kind], str(why).strip().splitlines()[-1])], 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "seconds_median" in mine and "seconds_median" in theirs:
        theirs["ours_in_turn"] = mine["seconds_all"]
        theirs["times_ours"] = theirs["seconds_median"] / mine["seconds_median"]
    return [theirs]


class Check:
    """Compares samples of results with sums in f64, and with the first sample, which is ours."""

    def __init__(self, task: Task):
        self.task = task
        self.expected = answers.reference(task.run, task.weights[answers.compared_index(task.weights)])
        self.ours: answers.Sample | None = None

    def __call__(self, taken: answers.Sample) -> Row:
        if self.ours is None:
            self.ours = taken
        return {
            "off_from_f64": answers.difference(taken, self.expected),
            "off_from_ours": answers.difference(taken, self.ours),
        }


SCAN, PEAK = "adding the mapped files up in C", "the multiply-adds in f64 alone in C"


def scan(task: Task) -> turns.Contender:
    return limit(task.environment, SCAN, "scan", task.environment.threads, *task.files())


def peak(task: Task) -> turns.Contender:
    count = len(task.targets) * STEPS * PROFILES * task.parameters
    return limit(task.environment, PEAK, "peak", count, task.environment.threads)


def ours(task: Task, check: Check, programs: tuple[str, ...] = (TO_MEMORY, TO_DISK)) -> list[turns.Contender]:
    """Returns our contenders. Python is first: the others are compared with it."""
    return [worker(task, check, "posthoc-ema"), *[program(task, check, name) for name in programs]]


def readers(task: Task, check: Check) -> list[turns.Contender]:
    """Returns the other contenders that read our files."""
    return [worker(task, check, kind) for kind in ("torch-loop", "lora-merge")]


def program(task: Task, check: Check, name: str) -> turns.Contender:
    """Returns the program as a contender, timed as a whole process."""
    if isinstance(task.environment.program, str):
        return Absent(name, task.environment.program)
    output = (task.memory if name == TO_MEMORY else task.disk) / "program"
    command = [task.environment.program, "synthesize", task.run, "--dtype", SHORT[task.output], "--device", "cpu"]
    command += ["--sigma-rel", ",".join(map(str, task.targets)), "--out-dir", output]

    def clear() -> None:
        shutil.rmtree(output, ignore_errors=True)

    def look() -> Row:
        # Output files are named by their target.
        target = task.targets[answers.compared_index(task.targets)]
        (found,) = output.glob(f"sigma_rel-{target:g}.*.safetensors")
        return check(answers.sample_file(found))

    return Checked(turns.Command(name, command, clear), look)


def worker(task: Task, check: Check, kind: str, name: str = "") -> turns.Contender:
    """Returns a Python contender, timed without its imports and the opening of the run."""
    name = name or NAMES[kind]
    packages = packages_of(task.environment, kind)
    if isinstance(packages, str):
        return Absent(name, packages)
    described = task.memory / f"task.{kind}.{len(task.targets)}.json"
    output = task.memory / "output"
    output.mkdir(exist_ok=True)
    about: dict[str, Any] = {
        "run": str(task.run),
        "folder": str(task.memory / kind),
        "model": task.model,
        "size": task.environment.size,
        "targets": task.targets,
        "weights": task.weights,
        "output": str(output),
        "dtype": task.output,
    }
    described.write_text(json.dumps(about))
    made = turns.Worker(name, task.environment.script("blends", kind, described, *packages))
    taken = task.memory / f"sample.{kind}.json"
    return Prepared(Checked(made, lambda: sampled(made, taken, check)), made)


def sampled(made: turns.Worker, path: Path, check: Check) -> Row:
    made.ask("sample", path=str(path))
    return check(answers.load(path))


class Prepared:
    """Worker that opens its files before the first round."""

    def __init__(self, contender: turns.Contender, worker: turns.Worker):
        self.contender = contender
        self.worker = worker
        self.name = contender.name

    def first(self) -> Row:
        self.worker.ask("prepare")
        return self.contender.first()

    def once(self) -> float:
        return self.contender.once()

    def close(self) -> None:
        self.contender.close()


def mergekit(task: Task, check: Check) -> turns.Contender:
    """Returns mergekit as a contender: a linear merge of our files with our plan's weights."""
    command = task.environment.mergekit
    if isinstance(command, str):
        return Absent(MERGEKIT, command)
    output = task.memory / "mergekit"
    described = task.memory / "mergekit.yml"
    given = [
        {"model": str(task.run / f"{index}.{step}.safetensors"), "parameters": {"weight": weight}}
        for index, step, weight in task.weights[0]
    ]
    merge = {"merge_method": "linear", "models": given, "parameters": {"normalize": False}, "dtype": task.output}
    # JSON is YAML.
    described.write_text(json.dumps(merge))

    def clear() -> None:
        shutil.rmtree(output, ignore_errors=True)

    def look() -> Row:
        taken: answers.Sample = {}
        for path in output.glob("*.safetensors"):
            taken |= answers.sample_file(path)
        return check(taken)

    return Checked(turns.Command(MERGEKIT, [command, described, output], clear), look)
