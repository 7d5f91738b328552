"""Commands with a time limit each, in process groups that a signal ends as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Characters of a failed command's output that the record keeps.
TAIL = 3000


@dataclass(frozen=True)
class Done:
    """Outcome of a command: `passed`, `failed (STATUS)` or `out of time`."""

    outcome: str
    seconds: float
    output: str


class Interrupted(Exception):
    """Signal that ends the check. Everything measured until then is kept."""


def raise_at_signals() -> None:
    """Makes SIGTERM, SIGINT and SIGHUP raise :class:`Interrupted`, once."""

    def handler(number: int, _: object) -> None:
        ignore_signals()
        raise Interrupted(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, handler)


def ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def run(command: Sequence[str], seconds: float, output: Path, log: Path, more: Mapping[str, str]) -> Done:
    """Runs a command for at most `seconds`, with its standard output in one file and its errors in another."""
    begun = time.monotonic()
    with output.open("wb") as out, log.open("wb") as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env={**os.environ, **more},
                start_new_session=True,
            )
        except OSError as why:
            return Done(f"failed ({why})", 0.0, "")
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process)
    tail = log.read_text(errors="replace")[-TAIL:] + output.read_text(errors="replace")[-TAIL:]
    outcome = "out of time" if status is None else "passed" if status == 0 else f"failed ({status})"
    return Done(outcome, time.monotonic() - begun, tail)


def end(process: subprocess.Popen[bytes], patience: float = 3.0) -> None:
    """Ends a command and all that it started: by SIGTERM, then by SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
