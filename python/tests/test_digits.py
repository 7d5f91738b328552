"""The example on a short training: every part runs, and its error bounds hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.py"


def test_example_runs_twice_into_one_folder(tmp_path: Path) -> None:
    # No interval divides this number of steps.
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--steps", "433", "--out", str(tmp_path)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "<- best" in done.stdout and "synthesized to tracked" in done.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("run-*/ema/1.*.safetensors"))) >= 40
