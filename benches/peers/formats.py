"""Mean of two checkpoints of one model in the formats of four libraries, beside a loop in C that averages two files."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import turns
from contenders import Absent, Checked, limit
from environment import Environment
from turns import Row

MODEL = "150 tensors, twice"
STEPS = (1, 2)
ROUNDS = 15
LIMIT = "the mean of the mapped safetensors files, into a file in memory, in C"
SUFFIXES = {"safetensors": ".safetensors", "pt": ".pt", "dcp": "", "zero2": "", "zero3": ""}
OURS = {
    "safetensors": "posthoc-ema, of safetensors files",
    "pt": "posthoc-ema, of files of torch.save",
    "dcp": "posthoc-ema, of folders of torch.distributed.checkpoint",
    "zero2": "posthoc-ema, of DeepSpeed's checkpoints, stage 2",
    "zero3": "posthoc-ema, of DeepSpeed's checkpoints, stage 3",
}
# Format and name of the others by their kind in `format_scripts`.
OTHERS = {
    "pt": ("pt", "torch.load and a sum in PyTorch, of files of torch.save"),
    "dcp": ("dcp", "dcp_to_torch_save and a sum in PyTorch, of torch.distributed.checkpoint"),
    "olmo": ("olmo", "OLMo-core's unshard_checkpoint and a sum in PyTorch, of torch.distributed.checkpoint"),
}


def measure(environment: Environment) -> Iterator[dict[str, Any]]:
    folder = environment.folder / "formats"
    memory = environment.memory / "posthoc-ema-peers"
    try:
        memory.mkdir(exist_ok=True)
        about = (MODEL, environment.size, *map(str, STEPS))
        environment.run(*environment.script("format_scripts", "make", folder, *about))
        environment.run(*environment.script("format_scripts", "distribute", folder / "dcp", *about))
        if isinstance(environment.olmo, Path):
            # Its version of PyTorch may be too old for the folders of this one.
            script = environment.script("format_scripts", "distribute", folder / "olmo", *about)
            environment.run(environment.olmo, *script[1:])
        environment.run("sync")
        yield case_of(environment, folder, memory)
    finally:
        for path in (folder, memory):
            shutil.rmtree(path, ignore_errors=True)


def case_of(environment: Environment, folder: Path, memory: Path) -> dict[str, Any]:
    """Measures all contenders in turns with the limit."""
    inputs = {kind: [folder / f"{kind}-{step}{suffix}" for step in STEPS] for kind, suffix in SUFFIXES.items()}
    check = Check(inputs["safetensors"])
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        read_again(path)
    made = memory / "limit.safetensors"
    contenders = [
        Checked(
            limit(environment, LIMIT, "mean", environment.threads, made, *inputs["safetensors"]), lambda: check(made)
        )
    ]
    contenders += [
        ours(environment, kind, paths, memory / f"{kind}.safetensors", check) for kind, paths in inputs.items()
    ]
    for kind, (form, name) in OTHERS.items():
        paths = inputs.get(form, [folder / f"{form}-{step}" for step in STEPS])
        contenders.append(other(environment, kind, name, paths, memory / kind, check))
    try:
        rows = turns.in_turns(contenders, environment.rounds(ROUNDS))
    finally:
        for one in contenders:
            one.close()
    for row, one in zip(rows, contenders):
        if isinstance(one, Checked) and isinstance(one.contender, turns.Command) and row["seconds_all"]:
            # Without that of the first round. Varies less than the time if other work runs beside it.
            row["cpu_seconds_median"] = statistics.median(one.contender.cpu_seconds[1:])
    rows[0]["limit"] = True
    rows[0].pop("peak_anonymous_bytes", None)
    parameters = models.parameters(models.MODELS[MODEL][environment.size])
    read = len(STEPS) * 4 * parameters
    turns.add_rates(rows, rows[0], read)
    rows[0].pop("share_of_limit", None)
    add_times_ours(rows)
    return {
        "work": "formats",
        "title": "Mean of two checkpoints in f32",
        "model": MODEL,
        "parameters": parameters,
        "tensors": len(models.MODELS[MODEL][environment.size]),
        "bytes": read,
        "limits": rows[:1],
        "rows": rows[1:],
        "note": "",
    }


def read_again(path: Path) -> None:
    """Replaces the pages of a file by those of one long read. Page faults cost more on pages of small writes."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 22):
            pass


def ours(environment: Environment, kind: str, paths: list[Path], out: Path, check: Check) -> turns.Contender:
    if isinstance(environment.program, str):
        return Absent(OURS[kind], environment.program)
    command = [environment.program, "average", *paths, "--steps", ",".join(map(str, STEPS)), "--uniform", "100%"]
    command += ["--device", "cpu", "-o", out]
    made = turns.Command(OURS[kind], command, lambda: out.unlink(missing_ok=True))
    return Checked(made, lambda: check(out))


def other(
    environment: Environment, kind: str, name: str, paths: list[Path], folder: Path, check: Check
) -> turns.Contender:
    python = environment.olmo if kind == "olmo" else environment.python
    if isinstance(python, str):
        return Absent(name, python)
    out = folder / "mean.safetensors"
    _, *command = environment.script("format_scripts", kind, out, *paths)
    return Checked(turns.Worker(name, [python, *command]), lambda: check(out))


def add_times_ours(rows: list[Row]) -> None:
    """Compares each of the others with ours on the same files, and ours with that on safetensors files."""
    medians = {row["name"]: row.get("seconds_median") for row in rows}
    compared = {name: OURS[form.replace("olmo", "dcp")] for form, name in OTHERS.values()}
    compared |= dict.fromkeys(OURS.values(), OURS["safetensors"])
    for row in rows:
        base = medians.get(compared.get(row["name"], ""))
        if base is not None and medians[row["name"]] is not None:
            row["times_ours"] = medians[row["name"]] / base


class Check:
    """Compares all elements of an average with the mean in f32, which is rounded once."""

    def __init__(self, inputs: list[Path]):
        # Imported here: nothing else in this process needs PyTorch.
        from safetensors.torch import load_file

        first, second = map(load_file, inputs)
        self.expected = {name: tensor.add_(second[name]).div_(2) for name, tensor in first.items()}

    def __call__(self, out: Path) -> Row:
        import torch
        from safetensors.torch import load_file

        found = load_file(out)
        if found.keys() != self.expected.keys():
            raise turns.Failed(f"it has the tensors {sorted(found)}")
        wrong = [name for name, tensor in found.items() if not torch.equal(tensor, self.expected[name])]
        if wrong:
            raise turns.Failed(f"its {wrong[0]} differs from the mean")
        return {"off_from_f64": 0.0}
