"""Damaged files, failing disks, and modes of arithmetic that other libraries change."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import train

from posthoc_ema import PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 5}


def test_damaged_snapshots_are_left_out(run_dir: Path) -> None:
    model = torch.nn.Linear(30, 30)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 20)
    ema.close()
    whole = PostHocEMA.from_path(run_dir).plan([0.15])[0]
    path = run_dir / "1.15.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="left out: .*1.15.safetensors: .*checksum"):
        run = PostHocEMA.from_path(run_dir, skip_damaged=True)
    plan = run.plan([0.15])[0]
    assert (1, 15) not in {(w.index, w.step) for w in plan.weights}
    assert plan.relative_error > whole.relative_error
    assert set(run.synthesize([0.15])[0]) == {"weight", "bias"}
    shutil.copy(run_dir / "0.10.safetensors", path)
    with pytest.raises(ValueError, match="1.15.safetensors"):
        PostHocEMA.from_path(run_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path.unlink()
        PostHocEMA.from_path(run_dir, skip_damaged=True)


@pytest.mark.parametrize("in_background", [True, False])
def test_training_continues_without_its_disk(run_dir: Path, in_background: bool) -> None:
    model = torch.nn.Linear(3, 3)
    ema = PostHocEMA.from_model(model, run_dir, on_error="warn", checkpoint_in_background=in_background, **OPTIONS)
    train(ema, model, 5)
    away = run_dir.with_name("away")
    run_dir.rename(away)
    with pytest.warns(RuntimeWarning, match="a snapshot was not stored, and training continues: .*check the path"):
        for _ in range(15):
            ema.update_(model)
            # A later call reports the error of a snapshot in the background.
            time.sleep(0.02 if in_background else 0)
    assert ema.step == 20
    with pytest.raises(OSError, match="check the path"):
        ema.finish()
    run_dir.mkdir()
    with pytest.raises(RuntimeError, match="the directory was replaced by another one"):
        ema.finish()
    run_dir.rmdir()
    away.rename(run_dir)
    ema.finish()
    assert PostHocEMA.from_path(run_dir).step == 20
    with pytest.raises(ValueError, match="on_error = 'shrug': must be"):
        PostHocEMA.from_model(model, run_dir / "other", on_error="shrug")


def test_averages_do_not_depend_on_flushed_subnormals(tmp_path: Path) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormals")
    found = []
    try:
        for flush in (True, False):
            torch.set_flush_denormal(flush)
            tensors = {"weight": torch.arange(1, 2001, dtype=torch.int32).view(torch.float32).clone()}
            ema = PostHocEMA.from_model(tensors, tmp_path / str(flush), **OPTIONS)
            for step in range(10):
                tensors["weight"].view(torch.int32).add_(step)
                ema.update_(tensors)
            ema.finish()
            found.append(ema.synthesize([0.15])[0]["weight"].view(torch.int32).clone())
            ema.close()
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(*found)
    assert (found[0] != 0).any()


def test_leftovers_of_a_terminated_write_are_removed_by_the_next(run_dir: Path, tmp_path: Path) -> None:
    model = torch.nn.Linear(2000, 2000)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 10)
    ema.close()
    out = tmp_path / "averages"
    program = (
        "import sys; from posthoc_ema import PostHocEMA; run = PostHocEMA.from_path(sys.argv[1])\n"
        "while True: run.write([0.05 + 0.01 * i for i in range(20)], sys.argv[2])"
    )
    left: list[Path] = []
    for _ in range(20):
        writer = subprocess.Popen([sys.executable, "-c", program, run_dir, out])
        while not list(out.glob(".posthoc-ema-*")):
            assert writer.poll() is None
            time.sleep(0.001)
        writer.send_signal(signal.SIGTERM)
        assert writer.wait() == -signal.SIGTERM
        left = list(out.glob(".posthoc-ema-*"))
        if left:
            break
    assert left, "no write was interrupted"
    paths = PostHocEMA.from_path(run_dir).write([0.15], out)
    assert not list(out.glob(".posthoc-ema-*"))
    assert all(path.is_file() for path in paths)
