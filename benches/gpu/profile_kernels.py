#!/usr/bin/env python3
"""Profiles the kernels that matter most with ncu: registers, share of the memory's bandwidth, reasons of stalls.

profile_kernels.py PROGRAM DEVICE      # the binary posthoc-ema; prints one JSON document
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys

KERNELS = ("compensated_2", "blend_1", "blend_8")
METRICS = (
    "launch__registers_per_thread",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
)


def main() -> None:
    program, device = sys.argv[1:3]
    command = [shutil.which("ncu") or "ncu", "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", "regex:" + "|".join(KERNELS), "--launch-count", "24"]
    command += [program, "bench", "--device", device, "--repeats", "1", "--json", "--snapshots", "8", "--targets", "8"]
    command += ["--parameters", os.environ["SWEEP_PARAMETERS"], "--tensors", os.environ["FEW"]]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = table(done.stdout)
    print(json.dumps({"kernels": rows}))
    if not rows:
        raise SystemExit(f"ncu shows no kernel of {', '.join(KERNELS)}:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")


def table(text: str) -> list[dict[str, str]]:
    """Returns a row for each launch in ncu's CSV, which other lines surround."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kept = ("Kernel Name", "Grid Size", *METRICS)
    rows = [{key: row[key] for key in kept if row.get(key)} for row in csv.DictReader(lines)]
    # The second line has the units.
    return [row for row in rows if row.get("Kernel Name")]


if __name__ == "__main__":
    main()
