"""Comparison with pytorch-posthoc-ema on a training whose averages are known.

The other package needs a folder of its own, because it has the same import name:

    pip install --no-deps --target DIR pytorch-posthoc-ema==1.0.10
    POSTHOC_EMA_PEERS=DIR pytest -s tests/test_side_by_side.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import posthoc_ema
from posthoc_ema.utils import sigma_rel_to_gamma

PEERS = os.environ.get("POSTHOC_EMA_PEERS")
STEPS = 20_000
SIGMA_REL = 0.15

# Run by both with their defaults: an update every 10 steps, and a snapshot of sigma_rel 0.05 and 0.28 every 1,000.
RAMP = f"""
import sys
import torch
import posthoc_ema
from posthoc_ema import PostHocEMA
assert posthoc_ema.__file__.startswith(sys.argv[2]), posthoc_ema.__file__
model = torch.nn.Linear(1, 1, bias=False)
ema = PostHocEMA.from_model(model, sys.argv[1])
for step in range(1, {STEPS} + 1):
    with torch.no_grad():
        model.weight.fill_(step / {STEPS})
    ema.update_(model)
with ema.state_dict(sigma_rel={SIGMA_REL}) as state_dict:
    print(state_dict["weight"].item())
"""


def average_of_the_ramp(package: Path, run: Path) -> float:
    """Returns the average that the `posthoc_ema` in a folder computes, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, "-c", RAMP, str(run), str(package)]
    # In another directory: Python first looks for packages in the current one.
    done = subprocess.run(command, env=environment, cwd=run.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(PEERS is None, reason="POSTHOC_EMA_PEERS names no folder with pytorch-posthoc-ema 1.0.10")
def test_average_of_a_ramp_is_exact_here_only(tmp_path: Path) -> None:
    here = Path(posthoc_ema.__file__).resolve().parents[1]
    ours = average_of_the_ramp(here, tmp_path / "ours")
    theirs = average_of_the_ramp(Path(str(PEERS)).resolve(), tmp_path / "theirs")
    # Checkpoints of the other package, imported.
    posthoc_ema.import_run(tmp_path / "theirs", tmp_path / "imported", sigma_rels=(0.05, 0.28), update_every=10)
    imported = posthoc_ema.PostHocEMA.from_path(tmp_path / "imported").synthesize([SIGMA_REL])[0]["weight"].item()
    gamma = sigma_rel_to_gamma(SIGMA_REL)
    # Mean of a power-function profile over time.
    right = (gamma + 1.0) / (gamma + 2.0)
    print(f"\na ramp 0..1 averaged at sigma_rel {SIGMA_REL}: right {right:.4f}")
    print(f"posthoc-ema {ours:.4f}\npytorch-posthoc-ema 1.0.10 {theirs:.4f}")
    print(f"its checkpoints, imported {imported:.4f}")
    assert right == pytest.approx(0.820, abs=0.001)
    assert ours == pytest.approx(right, abs=0.001)
    assert imported == pytest.approx(right, abs=0.002)
    assert theirs == pytest.approx(0.244, abs=0.001)
