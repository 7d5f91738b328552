"""The program, run by `python -m posthoc_ema`."""

from __future__ import annotations

import json
import subprocess
import sys

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
