"""Limit of synthesis to many targets: a loop in C that does the same sums in f64 and writes all results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import answers
import turns
from contenders import Absent, Checked
from environment import Environment
from turns import Row

NAME = "the sums in f64 and their files in memory, in C"
# Largest difference from a sum in f64, relative to the RMS: a few roundings to f16.
LARGEST_DIFFERENCE = 0.01
Weights = Sequence[tuple[int, int, float]]


def limit(
    environment: Environment,
    run: Path,
    folder: Path,
    weights: Sequence[Weights],
    check: Callable[[answers.Sample], Row],
) -> turns.Contender:
    """Starts the limit. `weights` has the snapshots of each target with their weights."""
    built = environment.limits["many"]
    if isinstance(built, str):
        return Absent(NAME, built)
    folder = folder / "limit-many"
    folder.mkdir()
    files = {path.name: path for path in sorted(run.glob("*.safetensors"))}
    described = folder / "weights.txt"
    described.write_text("".join(line(target, list(files)) for target in weights))
    command = [built, str(environment.threads), described, folder, *files.values()]

    def look() -> Row:
        found = check(answers.sample_file(folder / f"{answers.compared_index(weights)}.safetensors"))
        if not found["off_from_f64"] <= LARGEST_DIFFERENCE:
            raise turns.Failed(f"its results are off by {found['off_from_f64']:.1e}: see limits/many.c")
        return found

    return Checked(turns.Worker(NAME, command), look)


def line(target: Weights, names: Sequence[str]) -> str:
    """Returns the weights of a target in the order of the files; those that the plan leaves out are zero."""
    by_name = {f"{index}.{step}.safetensors": weight for index, step, weight in target}
    return " ".join(repr(by_name.get(name, 0.0)) for name in names) + "\n"
