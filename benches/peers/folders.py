"""Mean of three folders of a model in shards, into a folder, beside a loop in C that adds up the same mapped files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import answers
import models
import turns
from contenders import Absent, Checked, limit
from environment import Environment
from turns import Row

MODEL = "Llama"
STEPS = (1, 2, 3)
ROUNDS = 5
SCAN = "adding the mapped files up in C"
OURS = "posthoc-ema, the program, into a folder in memory"
TORCH = "a torch script, into a folder in memory"
MERGEKIT = "mergekit, mergekit-yaml, into a folder in memory"


def measure(environment: Environment) -> Iterator[dict[str, Any]]:
    folder = environment.folder / "folders"
    memory = environment.memory / "posthoc-ema-peers"
    try:
        steps = map(str, STEPS)
        environment.run(*environment.script("folder_scripts", "make", folder, MODEL, environment.size, *steps))
        environment.run("sync")
        yield case_of(environment, folder, memory)
    finally:
        for path in (folder, memory):
            shutil.rmtree(path, ignore_errors=True)


def case_of(environment: Environment, folder: Path, memory: Path) -> dict[str, Any]:
    """Measures both contenders in turns with the limit."""
    inputs = [folder / f"checkpoint-{step}" for step in STEPS]
    files = sorted(file for path in inputs for file in path.glob("*.safetensors"))
    parameters = models.parameters(models.MODELS[MODEL][environment.size])
    contenders = [limit(environment, SCAN, "scan", environment.threads, *files)]
    check = Check(inputs)
    script = environment.script("folder_scripts", "average", memory / "torch", *inputs)
    if isinstance(environment.program, str):
        contenders.append(Absent(OURS, environment.program))
    else:
        command = [
            environment.program,
            "average",
            *inputs,
            "--uniform",
            "100%",
            "--device",
            "cpu",
            "-o",
            memory / "ours",
        ]
        contenders.append(contender(OURS, command, memory / "ours", check))
    contenders.append(contender(TORCH, script, memory / "torch", check))
    contenders.append(mergekit(environment, inputs, memory, check))
    try:
        rows = turns.in_turns(contenders, environment.rounds(ROUNDS))
    finally:
        for one in contenders:
            one.close()
    rows[0]["limit"] = True
    rows[0].pop("peak_anonymous_bytes", None)
    read = len(STEPS) * 4 * parameters
    turns.add_rates(rows, rows[0], read)
    rows[0].pop("share_of_limit", None)
    return {
        "work": "folders",
        "title": "Mean of three folders in f32 shards",
        "model": MODEL,
        "parameters": parameters,
        "tensors": len(models.MODELS[MODEL][environment.size]),
        "bytes": read,
        "limits": rows[:1],
        "rows": rows[1:],
        "note": "",
    }


def contender(name: str, command: list[Any], out: Path, check: Check) -> turns.Contender:
    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)

    return Checked(turns.Command(name, command, clear), lambda: check(out))


def mergekit(environment: Environment, inputs: list[Path], memory: Path, check: Check) -> turns.Contender:
    """Returns mergekit as a contender: a linear merge of folders with equal weights."""
    if isinstance(environment.mergekit, str):
        return Absent(MERGEKIT, environment.mergekit)
    memory.mkdir(exist_ok=True)
    described = memory / "mergekit.yml"
    given = [{"model": str(path), "parameters": {"weight": 1.0}} for path in inputs]
    # JSON is YAML.
    described.write_text(json.dumps({"merge_method": "linear", "models": given, "dtype": "float32"}))
    out = memory / "mergekit"
    made = turns.Command(
        MERGEKIT,
        [environment.mergekit.with_name("mergekit-yaml"), described, out],
        lambda: shutil.rmtree(out, ignore_errors=True),
    )
    return Checked(made, lambda: check.weights(out))


class Check:
    """Compares a sample of an average with the mean in f64, and its files with those of the newest folder."""

    def __init__(self, inputs: list[Path]):
        self.names = sorted(path.name for path in inputs[-1].iterdir())
        samples = [sample_folder(path) for path in inputs]
        self.expected = {name: sum(taken[name] for taken in samples) / len(samples) for name in samples[0]}

    def __call__(self, out: Path) -> Row:
        found = sorted(path.name for path in out.iterdir())
        if found != self.names:
            raise turns.Failed(f"it has the files {found}")
        return self.weights(out)

    def weights(self, out: Path) -> Row:
        off = answers.difference(sample_folder(out), self.expected)
        if not off < 1e-6:
            raise turns.Failed(f"it is off by {off:.1e}")
        return {"off_from_f64": off}


def sample_folder(folder: Path) -> answers.Sample:
    taken: answers.Sample = {}
    for path in sorted(folder.glob("*.safetensors")):
        taken |= answers.sample_file(path)
    return taken
