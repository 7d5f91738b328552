"""Contenders that take turns, so that a slower machine slows all of them alike.

Each has a process of its own. A worker waits with its data in memory and works once for each request; a command starts
again each time. The first round warms up, checks the results and measures memory; the others are timed.
"""

from __future__ import annotations

import json
import os
import resource
import select
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]

# A first round that takes longer is timed, and the only one.
SLOW_SECONDS = 10.0
# A contender that has been timed for this long skips the remaining rounds.
ENOUGH_SECONDS = 10.0
# A contender that takes longer is stopped.
PATIENCE_SECONDS = 150.0


class Failed(Exception):
    """Failure of a contender. Its row gives the reason, and the others continue."""


class Contender(Protocol):
    """Participant that does the work."""

    name: str

    def first(self) -> Row:
        """Works once, and checks the result. Returns `seconds` and further fields of the row."""

    def once(self) -> float:
        """Works once, and returns the seconds."""

    def close(self) -> None:
        """Ends its process and removes what it has written."""


class Worker:
    """Process that answers each line of JSON with another, and works at `{"do": "go"}`."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: dict[str, str] | None = None):
        self.name = name
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, **(environment or {})},
            bufsize=0,
        )
        self.pending = b""

    def ask(self, do: str, patience: float = PATIENCE_SECONDS, **about: Any) -> Any:
        """Returns the answer. Raises :class:`Failed` if the worker fails, ends, or does not answer in time."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **about}).encode() + b"\n")
        except (BrokenPipeError, ValueError):
            # One end of the pipe is closed: the worker has ended, or was stopped for not answering.
            raise Failed(self._last_words()) from None
        answer = json.loads(self._line(time.monotonic() + patience, patience))
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _line(self, until: float, patience: float) -> bytes:
        assert self.process.stdout is not None
        while b"\n" not in self.pending:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.close()
                raise Failed(f"stopped after {patience:.0f} s")
            read = os.read(self.process.stdout.fileno(), 1 << 16)
            if not read:
                raise Failed(self._last_words())
            self.pending += read
        line, self.pending = self.pending.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        self.process.wait()
        if self.errors.closed:
            return "stopped before"
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with {self.process.returncode}"

    def first(self) -> Row:
        with Peak(self.process.pid) as peak:
            answer = self.ask("go")
        return {"seconds": answer["seconds"], "peak_anonymous_bytes": peak.bytes - peak.before}

    def once(self) -> float:
        return self.ask("go")["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Command:
    """Program that starts, works and ends. Its start is part of the time, and all its memory counts."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        clear: Callable[[], None] = lambda: None,
        patience: float = PATIENCE_SECONDS,
    ):
        self.name = name
        self.command = [str(part) for part in command]
        self.patience = patience
        # Removes the output files of the last run; not timed.
        self.clear = clear
        # Standard output of the last run.
        self.printed = ""
        # Seconds of all cores in each run.
        self.cpu_seconds: list[float] = []

    def first(self) -> Row:
        return self._run(sample=True)

    def once(self) -> float:
        return self._run(sample=False)["seconds"]

    def _run(self, sample: bool) -> Row:
        self.clear()
        with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as printed:
            start, before = time.perf_counter(), children_seconds()
            process = subprocess.Popen(self.command, stdout=printed, stderr=errors)
            # A timer, because Popen.wait with a timeout polls only every 50 ms.
            patience = threading.Timer(self.patience, process.kill)
            patience.daemon = True
            patience.start()
            with Peak(process.pid if sample else None) as peak:
                process.wait()
            seconds = time.perf_counter() - start
            self.cpu_seconds.append(children_seconds() - before)
            patience.cancel()
            if seconds >= self.patience:
                raise Failed(f"stopped after {self.patience:.0f} s")
            errors.seek(0)
            printed.seek(0)
            self.printed = printed.read().decode(errors="replace")
            if process.returncode != 0:
                lines = errors.read().decode(errors="replace").strip().splitlines()
                raise Failed(lines[-1] if lines else f"ended with {process.returncode}")
        return {"seconds": seconds, **({"peak_anonymous_bytes": peak.bytes} if sample else {})}

    def close(self) -> None:
        self.clear()


def children_seconds() -> float:
    """Returns the seconds of all cores that the processes took which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Peak:
    """Peak anonymous memory of a process (Linux). The kernel's own peak also counts mapped files."""

    def __init__(self, pid: int | None):
        self.pid = pid
        self.bytes = 0
        self.before = 0
        self.running = True

    def __enter__(self) -> Peak:
        if self.pid is not None:
            self.before = self._read()
            self.thread = threading.Thread(target=self._sample)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        if self.pid is not None:
            self.thread.join()

    def _sample(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, self._read())
            time.sleep(0.001)

    def _read(self) -> int:
        assert self.pid is not None
        return anonymous_bytes(self.pid)


def anonymous_bytes(pid: int) -> int:
    """Returns the anonymous memory of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    # The status of a process that is about to end has no such line.
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def in_turns(
    contenders: Iterable[Contender],
    rounds: int,
    before: Callable[[], None] = lambda: None,
    warm_up: bool = True,
    slow: float = SLOW_SECONDS,
) -> list[Row]:
    """Returns a row for each contender, in order: all seconds and their median, or the reason why there are none.

    `before` runs before each piece of work, and is not timed. Without `warm_up` the first round counts, too. Work of
    more than `slow` seconds is done once.
    """
    rows: list[tuple[Contender, Row]] = []
    for contender in contenders:
        row: Row = {"name": contender.name, "seconds_all": []}
        rows.append((contender, row))
        attempt(row, lambda: first_round(contender, row, before, warm_up, slow))  # noqa: B023
    for _ in range(rounds):
        for contender, row in rows:
            if "error" not in row and not row.get("once_only") and sum(row["seconds_all"]) < max(slow, ENOUGH_SECONDS):
                attempt(row, lambda: timed_round(contender, row, before))  # noqa: B023
    for _, row in rows:
        add_median(row)
    return [row for _, row in rows]


def attempt(row: Row, work: Callable[[], object]) -> None:
    try:
        work()
    except Failed as why:
        row["error"] = str(why)


def first_round(contender: Contender, row: Row, before: Callable[[], None], warm_up: bool, slow: float) -> None:
    """Runs the first round, which counts only if it is slow or not a warm-up."""
    before()
    first = contender.first()
    seconds = first.pop("seconds")
    row.update(first)
    if seconds > slow or not warm_up:
        row["seconds_all"] = [seconds]
    if seconds > slow:
        row["once_only"] = True


def timed_round(contender: Contender, row: Row, before: Callable[[], None]) -> None:
    before()
    row["seconds_all"].append(contender.once())


def add_median(row: Row) -> None:
    if row["seconds_all"] and "error" not in row:
        row["seconds_median"] = statistics.median(row["seconds_all"])


def add_rates(rows: list[Row], limit: Row | None, bytes_: int | None) -> None:
    """Adds rates, and shares of the limit, which was measured in the same rounds."""
    for row in rows:
        if "seconds_median" not in row:
            continue
        if bytes_ is not None:
            row["bytes_per_second"] = bytes_ / row["seconds_median"]
        if limit is not None and "seconds_median" in limit:
            row["share_of_limit"] = limit["seconds_median"] / row["seconds_median"]
