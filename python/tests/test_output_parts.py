"""Averages that several processes write in parts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posthoc_ema import PostHocEMA, Profile, average


def train(directory: Path, steps: int = 40) -> PostHocEMA:
    """Tracks a model of 12,000 parameters."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 20))
    ema = PostHocEMA.from_model(model, directory, update_every=1, update_after_step=0, checkpoint_every=10)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 1e-3)
        ema.update_(model)
    ema.finish()
    return ema


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_write_the_bytes_of_one_call(tmp_path: Path) -> None:
    train(tmp_path / "run")
    ema = PostHocEMA.from_path(tmp_path / "run")
    targets, options = [0.15, 0.2], {"dtype": torch.bfloat16}
    ema.write(targets, tmp_path / "whole", **options)
    for number in (3, 1, 2):
        paths = ema.write(targets, tmp_path / "parts", part=(number, 3), **options)
        assert [path.exists() for path in paths] == [number == 2] * 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="counted from 1"):
        ema.write(targets, tmp_path / "parts", part=(0, 3))
    with pytest.raises(ValueError, match="K is at most N"):
        ema.write(targets, tmp_path / "parts", part=(4, 3))
    ema.write(targets, tmp_path / "other", part=(1, 3))
    with pytest.raises(ValueError, match="differ in their number: those before have K/3, this one has K/2"):
        ema.write(targets, tmp_path / "other", part=(2, 2))


def test_average_in_parts(tmp_path: Path) -> None:
    run = tmp_path / "checkpoints"
    run.mkdir()
    for step in (10, 20, 30):
        torch.save({"weight": torch.full((5000,), float(step)), "count": torch.tensor(step)}, run / f"step{step}.pt")
    files = [tmp_path / name for name in ("whole.safetensors", "parts.safetensors")]
    average(run, Profile.uniform(steps=30), files[0])
    for number in (1, 2):
        average(run, Profile.uniform(steps=30), files[1], part=(number, 2))
        assert files[1].exists() == (number == 2)
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match="name a path with out"):
        average(run, 0.15, part=(1, 2))


@pytest.mark.skipif(shutil.which("bash") is None, reason="the line of the how-to page needs bash")
def test_torchrun_starts_the_parts(tmp_path: Path) -> None:
    train(tmp_path / "run")
    program = f"{sys.executable} -m posthoc_ema synthesize {tmp_path}/run --sigma-rel 0.15"
    subprocess.run([*program.split(), "-o", str(tmp_path / "whole")], check=True, timeout=60, stdout=subprocess.DEVNULL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--no-python"]
    line = f"exec {program} -o {tmp_path}/parts --part $((RANK + 1))/$WORLD_SIZE"
    done = subprocess.run([*torchrun, "bash", "-c", line], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
