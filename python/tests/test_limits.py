"""Limits of the system on processes and threads: each is one clear error, and the object stays usable."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

# Root ignores the limit, so it becomes a user without other processes. For any other user, one process is too few.
PROGRAM = """
import os, resource, sys
import numpy as np
from posthoc_ema import PostHocEMA, average

place = sys.argv[1]
arrays = {"w": np.ones(4, dtype=np.float32)}
options = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 5}
with PostHocEMA.from_model(arrays, place + "/run", **options) as ema:
    for _ in range(20):
        ema.update_(arrays)
run = PostHocEMA.from_path(place + "/run")
run.synthesize([0.1])  # imports what another user may not be able to read
calls = {
    "synthesize": lambda: run.synthesize([0.1], progress=lambda done, total: None),
    "write": lambda: run.write([0.1], place + "/out", progress=lambda done, total: None),
    "from_model": lambda: PostHocEMA.from_model(arrays, place + "/new", resume=True, **options).update_(arrays),
}
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(54321)
    os.setuid(54321)
before = resource.getrlimit(resource.RLIMIT_NPROC)
resource.setrlimit(resource.RLIMIT_NPROC, (1, before[1]))
for name, call in calls.items():
    try:
        call()
        print(name, "succeeded")
    except (OSError, RuntimeError) as error:
        assert "ulimit -u" in str(error) and "RAYON_NUM_THREADS" in str(error), error
        print(name, "refused")
    assert name == "from_model" or os.listdir(place + "/out") == []
resource.setrlimit(resource.RLIMIT_NPROC, before)
for call in calls.values():
    call()
print("usable")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit counts threads on Linux only")
def test_too_few_processes_are_an_error_with_the_remedy() -> None:
    # Not in pytest's folder, which is private to its user.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        for name in ("out", "new"):
            (Path(place) / name).mkdir()
            (Path(place) / name).chmod(0o777)
        program = [sys.executable, "-c", textwrap.dedent(PROGRAM), place]
        done = subprocess.run(program, capture_output=True, text=True, timeout=120)
        lines = done.stdout.splitlines()
        assert done.returncode == 0, done.stderr
        assert lines[:2] == ["synthesize refused", "write refused"] and lines[-1] == "usable", done
