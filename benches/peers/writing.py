"""Storing a snapshot of 200 MB on the disk, and how long the training waits for it."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import turns
from environment import Environment
from turns import Row

MODEL = "150 tensors"
ROUNDS = 5
NAMES = {
    "posthoc-ema": "posthoc-ema: snapshot and live state",
    "torch.save": "torch.save and fsync: snapshot",
    "copy": "a copy in memory",
}


class Direct:
    """Limit: `dd conv=fsync` of as many bytes into the same folder."""

    name = "dd conv=fsync, the snapshot's bytes"

    def __init__(self, path: Path, bytes_: int):
        self.path = path
        self.bytes = bytes_

    def first(self) -> Row:
        return {"seconds": self.once(), "bytes": self.bytes}

    def once(self) -> float:
        self.path.unlink(missing_ok=True)
        blocks = f"count={self.bytes}"
        command = ["dd", "if=/dev/zero", f"of={self.path}", "bs=4M", blocks, "iflag=count_bytes", "conv=fsync"]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise turns.Failed(done.stderr.strip().splitlines()[-1])
        return time.perf_counter() - start

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


class Storing(turns.Worker):
    """Worker that also reports how long the caller waited, and how many bytes it wrote."""

    def first(self) -> Row:
        self.held: list[float] = []
        self.ask("ready")
        row = super().first()
        answer = self.ask("go")
        return {**row, "bytes": answer["bytes"], "held_seconds_all": self.held}

    def once(self) -> float:
        answer = self.ask("go")
        self.held.append(answer["held"])
        return answer["seconds"]


def measure(environment: Environment) -> Iterator[dict[str, Any]]:
    folder = environment.folder / "writing"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bytes_ = 4 * models.parameters(models.MODELS[MODEL][environment.size])
    contenders: list[turns.Contender] = [Direct(folder / "dd", bytes_)]
    for kind, name in NAMES.items():
        at = folder / kind
        contenders.append(Storing(name, environment.script("stores", kind, MODEL, environment.size, at)))
    try:
        rows = turns.in_turns(contenders, environment.rounds(ROUNDS))
    finally:
        for contender in contenders:
            contender.close()
        shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        add_rates(row, rows[0])
    rows[0].pop("share_of_limit", None)
    yield {
        "work": "writing",
        "title": f"Storing a snapshot of {bytes_ / 1e6:.0f} MB",
        "model": MODEL,
        "parameters": bytes_ // 4,
        "limits": rows[:1],
        "rows": rows[1:],
        "note": "",
    }


def add_rates(row: Row, limit: Row) -> None:
    """Adds the rate of a row's own bytes, since the amounts differ, and its share of the limit."""
    if "seconds_median" not in row:
        return
    row["bytes_per_second"] = row["bytes"] / row["seconds_median"]
    # A copy does not use the disk.
    if "bytes_per_second" in limit and row["name"] != NAMES["copy"]:
        row["share_of_limit"] = row["bytes_per_second"] / limit["bytes_per_second"]
    if row.get("held_seconds_all"):
        row["held_seconds_median"] = statistics.median(row["held_seconds_all"])
