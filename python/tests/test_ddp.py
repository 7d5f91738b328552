"""The example of a data-parallel training, which stops and resumes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "ddp.py"


def launch(folder: Path, steps: int) -> list[str]:
    """Runs the example in two processes, and returns the lines that it prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(EXAMPLE), "--steps", str(steps), "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_resumed_example_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    launch(tmp_path / "resumed", 100)
    resumed = launch(tmp_path / "resumed", 200)
    undisturbed = launch(tmp_path / "undisturbed", 200)
    assert resumed[0] == "2 processes, from step 100"
    assert len(resumed) == 5 and resumed[1:] == undisturbed[2:]
