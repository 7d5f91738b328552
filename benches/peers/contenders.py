"""Contenders of more than one kind of work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import turns
from environment import Environment
from turns import Row


class Absent:
    """Contender that cannot take part; its row says why."""

    def __init__(self, name: str, why: str):
        self.name = name
        self.why = why

    def first(self) -> Row:
        raise turns.Failed(self.why)

    def once(self) -> float:
        raise turns.Failed(self.why)

    def close(self) -> None:
        pass


def limit(environment: Environment, name: str, program: str, *arguments: str | int | Path) -> turns.Contender:
    """Starts one of the limits in C."""
    built = environment.limits[program]
    if isinstance(built, str):
        return Absent(name, built)
    return turns.Worker(name, [built, *map(str, arguments)])


class Checked:
    """Contender whose first result is checked: `look` returns further fields of its row."""

    def __init__(self, contender: turns.Contender, look: Callable[[], Row]):
        self.contender = contender
        self.name = contender.name
        self.look = look

    def first(self) -> Row:
        return {**self.contender.first(), **self.look()}

    def once(self) -> float:
        return self.contender.once()

    def close(self) -> None:
        self.contender.close()


def packages_of(environment: Environment, kind: str) -> list[str | Path] | str:
    """Returns the folders that a peer is imported from, or why it is missing."""
    if kind not in ("pytorch-posthoc-ema", "ema-pytorch"):
        return []
    return [environment.peers] if environment.peers else "left out: no --peers DIR"
