#!/usr/bin/env python3
"""Runs the GPU check: tests, measurements, sanitizers and profiles on one device, in one call of at most ten minutes.

    benches/gpu/check.py [FOLDER]      # folder of the binaries of build.sh; gpu-check by default

Needs Python 3.9 or later, a device and its driver. Variables: OUT or RECORD (folder of the record, benches/record),
DEVICE (cuda:0), LIMIT (seconds for everything, 570), ONLY (names of parts, between semicolons), TESTS (names of tests),
and the sizes in stages.py. The record is written again after every part, so it is whole whenever the check ends;
SIGTERM ends it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import process
import report
import stages
from clocks import Clocks


def main() -> None:
    os.chdir(stages.ROOT)
    for name in stages.SIZES:
        os.environ[name] = str(stages.size(name))
    device = os.environ.setdefault("DEVICE", "cuda:0")
    process.raise_at_signals()
    binaries = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-check").resolve()
    work = Path(tempfile.mkdtemp(prefix="gpu-check.", dir=roomy()))
    clocks = Clocks(device.rpartition(":")[2])
    record = report.Record(work / "results", folder(), clocks.summary)
    try:
        prepare(binaries, work)
        run_all(stages.all_stages(stages.find(binaries, work, device)), work, record)
    except process.Interrupted as why:
        record.interrupted = str(why)
    finally:
        process.ignore_signals()
        clocks.close()
        record.save(finished=record.interrupted is None)
        shutil.rmtree(work, ignore_errors=True)
    raise SystemExit(record.verdict())


def folder() -> Path:
    """Returns the folder of the record. A machine that is lent brings back what is in OUT only."""
    return Path(os.environ.get("OUT") or os.environ.get("RECORD") or "benches/record")


def roomy() -> str:
    """Returns /dev/shm, so that no disk matters, or the folder of temporary files if a run does not fit there."""
    # Two f16 snapshots at each step, the live state in full, and the results.
    needed = stages.size("RUN_PARAMETERS") * (4 * stages.size("RUN_SNAPSHOTS") + 40)
    try:
        free = shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0
    except OSError:
        free = 0
    return "/dev/shm" if free > needed else tempfile.gettempdir()


def prepare(binaries: Path, work: Path) -> None:
    """Copies the manifest of the binaries, describes the device, and unpacks the Python package."""
    results = work / "results"
    if (binaries / "manifest.txt").is_file():
        shutil.copy(binaries / "manifest.txt", results)
    program = shutil.which("nvidia-smi")
    query = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    output = results / "device.txt"
    done = process.run([program, *query], 20, output, results / "device.log", {}) if program else None
    if done is None or done.outcome != "passed":
        output.write_text("no nvidia-smi: a stand-in, or none\n")
    for wheel in sorted(binaries.glob("*.whl")):
        shutil.unpack_archive(str(wheel), str(work / "python"), "zip")


def run_all(chosen: list[stages.Stage], work: Path, record: report.Record) -> None:
    """Runs the parts, each in a process of its own; a part that fails is recorded, and the others go on."""
    limit = float(os.environ.get("LIMIT", 570))
    only = [name.strip() for name in os.environ.get("ONLY", "").split(";") if name.strip()]
    begun = time.monotonic()
    for stage in chosen:
        if only and stage.name not in only:
            continue
        left = limit - (time.monotonic() - begun)
        if stage.skipped is not None:
            record.add(stage.name, process.Done(stage.skipped, 0.0, ""), stage.seconds)
            continue
        if left < 2:
            record.add(stage.name, process.Done("skipped: no time is left", 0.0, ""), stage.seconds)
            continue
        print(f"== {stage.name} (at {limit - left:.0f} s)", flush=True)
        most = min(stage.seconds, left)
        output = work / "results" / stage.output
        log = output.with_suffix(".log")
        record.running = stage.name
        done = process.run(stage.command, most, output, log, stage.environment)
        record.running = None
        record.add(stage.name, report.skipped_itself(output, done), most)


if __name__ == "__main__":
    main()
