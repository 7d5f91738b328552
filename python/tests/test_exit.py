"""Ends of a process without `finish`: the live state is stored, or the process says that it is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from posthoc_ema import PostHocEMA, _native

Arrays = dict[str, np.ndarray]

# A training of 1,000 steps with the default schedule, before the first snapshot; then ENDS is what ends it.
PROGRAM = """
import gc, os, shutil, signal, sys, threading, time
import numpy as np
from posthoc_ema import PostHocEMA

directory, step = sys.argv[1], 0
arrays = {"w": np.zeros(5, dtype=np.float32)}

def train(ema, steps):
    for _ in range(steps):
        arrays["w"][:] = np.sin(np.arange(5) + ema.step)
        ema.update_(arrays)

OPTIONS = {"checkpoint_every": 5000, "snapshot_growth": 0}
"""


def run(directory: Path, end: str) -> subprocess.CompletedProcess[str]:
    """Runs a training and its end in a process."""
    program = PROGRAM + textwrap.dedent(end)
    command = [sys.executable, "-c", program, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


START = """
ema = PostHocEMA.from_model(arrays, directory, **OPTIONS)
train(ema, 1000)
"""

ENDS = {
    "end": ("", 0, ""),
    "sys.exit": ("sys.exit(3)", 3, ""),
    "exception": ("raise LookupError('of the training')", 1, "LookupError: of the training"),
    "interrupt": ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
    "del": ("del ema\nassert 'state.safetensors' in os.listdir(directory)\nos._exit(0)", 0, ""),
    "cycle": (
        "ema.itself = ema\ndel ema\ngc.collect()\nassert 'state.safetensors' in os.listdir(directory)\nos._exit(0)",
        0,
        "",
    ),
    "close": ("ema.close()\nos._exit(0)", 0, ""),
    "failed block": ("with ema:\n    raise LookupError('of the block')", 1, "LookupError: of the block"),
    "thread": ("threading.Thread(target=lambda held: time.sleep(0.2), args=[ema]).start()\ndel ema", 0, ""),
    "handled SIGTERM": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(9)",
        143,
        "",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_live_state_is_stored_at_the_end_of_a_process(run_dir: Path, end: str) -> None:
    text, status, error = ENDS[end]
    done = run(run_dir, START + text)
    assert done.returncode == status and error in done.stderr, done.stderr
    assert "Warning" not in done.stderr and (error or not done.stderr), done.stderr
    # The state alone: snapshots are those of the schedule and of `finish`.
    assert files(run_dir) == [".lock", "state.safetensors"]
    assert _native.saved_step(run_dir) == 1000


def test_resume_after_an_end_without_finish_keeps_bits(tmp_path: Path) -> None:
    finish = "train(ema, 200)\nema.finish()\n"
    resume = START.replace("**OPTIONS", "resume=True, **OPTIONS").replace("1000", "0") + finish
    for directory, parts in [(tmp_path / "whole", [START + finish]), (tmp_path / "parts", [START, resume])]:
        for part in parts:
            done = run(directory, part)
            assert done.returncode == 0 and not done.stderr, done.stderr
    whole, parts = (PostHocEMA.from_path(tmp_path / name) for name in ("whole", "parts"))
    assert whole.step == parts.step == 1200
    for sigma_rel in (0.05, 0.15, 0.28):
        assert np.array_equal(whole.synthesize([sigma_rel])[0]["w"], parts.synthesize([sigma_rel])[0]["w"])


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(9)"])
def test_end_that_runs_no_code_stores_nothing(run_dir: Path, end: str) -> None:
    done = run(run_dir, START + end)
    assert done.returncode in (0, -signal.SIGTERM) and not done.stderr, done.stderr
    assert files(run_dir) == [".lock"]


@pytest.mark.parametrize("end", ["", "del ema", "ema.close()", "with ema: raise LookupError('of the block')"])
def test_state_that_cannot_be_stored_is_a_warning(run_dir: Path, end: str) -> None:
    start = START.replace("**OPTIONS", "on_nonfinite='ignore', **OPTIONS")
    done = run(run_dir, start + "arrays['w'][3] = np.nan\nfor _ in range(10): ema.update_(arrays)\n" + end)
    assert done.returncode == ("LookupError" in end), done.stderr
    assert done.stderr.count("RuntimeWarning") == 1, done.stderr
    assert f"{run_dir}: the run ends at step 1010, and its live state could not be stored: " in done.stderr
    assert ("LookupError: of the block" in done.stderr) == ("LookupError" in end)
    assert files(run_dir) == [".lock"]


def test_finish_and_ends_before_the_first_update_add_nothing(run_dir: Path) -> None:
    assert not run(run_dir, START.replace("1000", "50")).stderr
    assert files(run_dir) == [".lock"]
    done = run(run_dir, START + "ema.finish()")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert files(run_dir) == [".lock", "0.1000.safetensors", "1.1000.safetensors", "state.safetensors"]


@pytest.mark.parametrize("end", ["", "del ema"])
def test_directory_that_was_removed_is_not_missed(run_dir: Path, end: str) -> None:
    # The snapshot of the last step takes longer than the removal.
    begin = """
        arrays = {"w": np.zeros(3_000_000, dtype=np.float32)}
        ema = PostHocEMA.from_model(arrays, directory, update_every=1, update_after_step=0, checkpoint_every=3)
        for _ in range(3):
            ema.update_(arrays)
        while os.path.exists(directory):
            shutil.rmtree(directory, ignore_errors=True)
    """
    done = run(run_dir, textwrap.dedent(begin) + end)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not run_dir.exists()


def test_error_of_a_block_is_not_masked_by_a_lost_lock(run_dir: Path) -> None:
    arrays = {"w": np.ones(4, dtype=np.float32)}
    options = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 3}
    with pytest.warns(Warning, match="lock file `.lock` was removed"), pytest.raises(LookupError):
        with PostHocEMA.from_model(arrays, run_dir, **options) as ema:
            for _ in range(2):
                ema.update_(arrays)
            os.unlink(run_dir / ".lock")
            ema.update_(arrays)
            raise LookupError("of the block")


def test_cell_that_is_run_twice_names_the_remedy(run_dir: Path) -> None:
    arrays = {"w": np.ones(4, dtype=np.float32)}
    ema = PostHocEMA.from_model(arrays, run_dir, update_every=1, update_after_step=0)
    ema.update_(arrays)
    with pytest.raises(ValueError, match=r"already contains checkpoints.*this process.*`close\(\)`.*`resume=True`"):
        PostHocEMA.from_model(arrays, run_dir)
    with pytest.raises(RuntimeError, match=r"this process is writing this run already: close .*`close\(\)`"):
        PostHocEMA.from_model(arrays, run_dir, resume=True)
    ema.close()
    with pytest.raises(ValueError, match="already contains checkpoints: continue it with `resume=True`"):
        PostHocEMA.from_model(arrays, run_dir)
    assert PostHocEMA.from_model(arrays, run_dir, resume=True).step == 1
