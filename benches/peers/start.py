"""Time to start: printing a plan on 40 snapshots, beside starting the program and doing nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import synthesis
import turns
from contenders import Absent
from environment import Environment

ROUNDS = 15


def measure(environment: Environment) -> Iterator[dict[str, Any]]:
    names = ("posthoc-ema --version", "posthoc-ema plan RUN --sigma-rel 0.15", "python -c 'import torch'")
    with synthesis.stored(environment, "150 tensors", "float16") as run:
        contenders = commands(environment, names, run.run)
        rows = turns.in_turns(contenders, environment.rounds(ROUNDS))
    yield {"work": "start", "title": "Start", "limits": rows[:1], "rows": rows[1:], "note": ""}


def commands(environment: Environment, names: tuple[str, str, str], run: Path) -> list[turns.Contender]:
    version, plan, imports = names
    torch = turns.Command(imports, [environment.python, "-c", "import torch"])
    if isinstance(environment.program, str):
        return [Absent(version, environment.program), Absent(plan, environment.program), torch]
    program = environment.program
    return [
        turns.Command(version, [program, "--version"]),
        turns.Command(plan, [program, "plan", run, "--sigma-rel", str(synthesis.TARGET)]),
        torch,
    ]
