"""The program, run by `python -m posthoc_ema`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import posthoc_ema


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "posthoc_ema", *arguments], capture_output=True, text=True)


def test_module_is_the_program() -> None:
    assert run("--version").stdout == f"posthoc-ema {posthoc_ema.__version__}\n"
    done = run("profile", "--sigma-rel", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_exit_status_is_that_of_the_program() -> None:
    failed = run("inspect", "/nonexistent")
    assert failed.returncode == 1 and failed.stderr.startswith("error: "), failed.stderr
    assert run("nothing").returncode == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_left_to_other_files(closed: str) -> None:
    code = (
        "import os; from posthoc_ema.__main__ import _open_missing_streams; _open_missing_streams(); "
        "raise SystemExit(not all(os.get_inheritable(number) for number in range(3)))"
    )
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], timeout=60)
    assert done.returncode == 0
    program = ["sh", "-c", f'exec "$0" -m posthoc_ema profile --sigma-rel 0.1 {closed}', sys.executable]
    assert subprocess.run(program, timeout=60, stdout=subprocess.DEVNULL).returncode == 0
