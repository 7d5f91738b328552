"""Synthesis from 40 snapshots to 31 targets in one pass, beside a loop in C that does the same sums and writes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import many
import synthesis
from environment import Environment

ROUNDS = 3
# On a busy machine most of the work takes more than the 10 s after which others are timed once.
SLOW_SECONDS = 60.0


def measure(environment: Environment) -> Iterator[dict[str, Any]]:
    with synthesis.stored(environment, "150 tensors", "float16") as run:
        yield case_of(run)


def case_of(run: synthesis.Task) -> dict[str, Any]:
    """Measures 31 targets in one pass, one target, and the limits of the sums and of their results."""
    one = run.with_targets((synthesis.TARGET,), "float16")
    all_ = run.with_targets(synthesis.MANY, "float16")
    check = synthesis.Check(one)
    check_all = synthesis.Check(all_)
    contenders = [
        synthesis.scan(run),
        synthesis.peak(all_),
        *synthesis.ours(all_, check_all, (synthesis.TO_MEMORY,)),
        many.limit(run.environment, run.run, run.memory, all_.weights, check_all),
        synthesis.worker(one, check, "posthoc-ema", "posthoc-ema, Python, one of the targets"),
    ]
    rows = synthesis.take_turns(all_, contenders, ROUNDS, SLOW_SECONDS)
    # Shares of this limit mean nothing for other work: results in the process's memory, or one target.
    for row in rows:
        if row["name"] != synthesis.TO_MEMORY:
            row.pop("share_of_limit", None)
    # Takes minutes, like the packages that are apart.
    if run.environment.peers is not None:
        rows += synthesis.peer_rows(all_, check_all, "edm2")
    made = synthesis.case_of(all_, f"{len(synthesis.MANY)} targets in one pass, f16 results", rows)
    made["multiply_adds"] = len(synthesis.MANY) * synthesis.STEPS * synthesis.PROFILES * run.parameters
    return {**made, "work": "targets"}
