"""Synthesis with a cold page cache, beside reading the same files directly from the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import synthesis
import turns
from contenders import Absent
from environment import Environment
from turns import Row

# Rounds after the first one, which counts as well.
ROUNDS = 2
BLOCK = "4M"


class Direct:
    """Limit: `dd iflag=direct` over all files, one by one."""

    name = f"dd iflag=direct bs={BLOCK}, the same files"

    def __init__(self, files: list[Path]):
        self.files = files

    def first(self) -> Row:
        return {"seconds": self.once()}

    def once(self) -> float:
        start = time.perf_counter()
        for path in self.files:
            command = ["dd", f"if={path}", "of=/dev/null", f"bs={BLOCK}", "iflag=direct"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise turns.Failed(done.stderr.strip().splitlines()[-1])
        return time.perf_counter() - start

    def close(self) -> None:
        pass


def measure(environment: Environment) -> Iterator[dict[str, Any]]:
    with synthesis.stored(environment, "150 tensors", "float16") as run:
        task = run.with_targets((synthesis.TARGET,), "float32")
        check = synthesis.Check(task)
        drop(task.files())
        left = resident(task.files())
        if left > 0:
            yield failed(task, f"{left} bytes stay in the page cache: give a --folder on a disk")
            return
        contenders: list[turns.Contender] = [
            Direct(task.files()),
            synthesis.worker(task, check, "posthoc-ema"),
            synthesis.program(task, check, synthesis.TO_MEMORY),
            synthesis.worker(task, check, "torch-loop"),
        ]
        try:
            rounds = environment.rounds(ROUNDS)
            rows = turns.in_turns(contenders, rounds, lambda: make_cold(task.files()), warm_up=False)
        finally:
            for contender in contenders:
                contender.close()
        turns.add_rates(rows, rows[0], task.bytes)
        rows[0]["limit"] = True
        rows[0].pop("share_of_limit", None)
        yield {**synthesis.case_of(task, "one target, cold page cache", rows), "work": "cold"}


def failed(task: synthesis.Task, why: str) -> dict[str, Any]:
    rows = turns.in_turns([Absent(synthesis.NAMES["posthoc-ema"], why)], 0)
    return {**synthesis.case_of(task, "one target, cold page cache", rows), "work": "cold"}


def make_cold(files: list[Path]) -> None:
    """Drops the files from the page cache, or fails."""
    drop(files)
    left = resident(files)
    if left > 0:
        raise turns.Failed(f"{left} bytes of the snapshots stay in the page cache")


def drop(files: list[Path]) -> None:
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            # Pages that are not written yet cannot be dropped.
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def resident(files: list[Path]) -> int:
    """Returns the bytes of files that are in the page cache, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    total = 0
    for path in files:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m,
        ):
            pages = -(-len(m) // mmap.PAGESIZE)
            flags = (ctypes.c_ubyte * pages)()
            at = ctypes.c_char.from_buffer(m)
            if libc.mincore(ctypes.addressof(at), len(m), flags) != 0:
                raise SystemExit(f"mincore of {path}: {os.strerror(ctypes.get_errno())}")
            del at
            total += sum(flag & 1 for flag in flags) * mmap.PAGESIZE
    return total
