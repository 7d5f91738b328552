#!/usr/bin/env python3
"""Measures how updates and syntheses of the program scale with parameters, snapshots, targets and threads.

    python3 benches/scaling.py --record benches/record/DATE-scaling.json

Needs Python with numpy, and the program (cargo build --release -p posthoc-ema-cli), which starts again for every point.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benches" / "peers"))

import environment as setup  # noqa: E402
import models  # noqa: E402
import runs  # noqa: E402
import turns  # noqa: E402

Point = dict[str, Any]
# Parameters of a tensor, as large layers have them.
TENSOR = 1 << 22
TARGET = "0.15"
# `posthoc-ema bench` always measures models of 4 tensors; with this number it measures no others.
FEW_TENSORS = 4
# Beginnings of the names that `posthoc-ema bench` prints.
UPDATES = ("f32, plain", "f32, compensated")
# A point that takes longer is repeated less often.
LONG_SECONDS = 3.0
ROUNDS, FEW_ROUNDS = 5, 2
PATIENCE_SECONDS = 300.0
SIZES = (1, 3, 10, 30, 100, 300, 1000)


class Scaling:
    """Sweeps, with the program and the folders that they need."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.program = options.program.resolve()
        self.folder = folder
        self.quick = options.quick
        self.memory = Path(tempfile.mkdtemp(prefix="posthoc-ema-scaling-", dir=options.memory))
        self.million = 1000 if self.quick else 1_000_000
        self.threads = len(os.sched_getaffinity(0))

    def sizes(self) -> list[int]:
        return [self.million * size for size in (SIZES[:3] if self.quick else SIZES)]

    def all(self) -> Iterator[dict[str, Any]]:
        """Runs the sweeps one by one."""
        for sweep in (
            self.update_size,
            self.update_threads,
            self.size,
            self.snapshots,
            self.targets,
            self.thread_counts,
        ):
            print(f"{sweep.__name__.replace('_', ' ')}", file=sys.stderr)
            yield from sweep()

    def update_size(self) -> list[dict[str, Any]]:
        measured = [(n, self.bench(n, self.threads)) for n in self.sizes()]
        return [
            sweep("update", "parameters", f"{work}, two averages", [point_of(x, rows, work) for x, rows in measured])
            for work in UPDATES
        ]

    def update_threads(self) -> list[dict[str, Any]]:
        n = 50 * self.million
        measured = [(threads, self.bench(n, threads)) for threads in range(1, self.threads + 1)]
        title = f"{{}}, two averages of {n / 1e6:g} million parameters"
        return [
            sweep("update", "threads", title.format(work), [point_of(x, rows, work) for x, rows in measured])
            for work in UPDATES
        ]

    def bench(self, parameters: int, threads: int) -> list[Point] | str:
        """Returns the measurements of `posthoc-ema bench`, or the reason why there are none."""
        arguments = ["bench", "--json", "--device", "cpu", "--parameters", parameters, "--tensors", FEW_TENSORS]
        arguments += ["--snapshots", 1, "--targets", 1, "--repeats", ROUNDS]
        command = self.command("bench", arguments, threads)
        try:
            command.once()
        except turns.Failed as why:
            return str(why)
        return json.loads(command.printed)["measurements"]

    def size(self) -> list[dict[str, Any]]:
        """Measures synthesis by parameters, from few snapshots so that the disk holds them."""
        points = []
        for n in self.sizes():
            with self.run(n, 2) as bytes_:
                points.append(self.synthesize(n, bytes_, TARGET))
        return [sweep("synthesis", "parameters", "4 f16 snapshots to one target", points)]

    def snapshots(self) -> list[dict[str, Any]]:
        points = []
        for count in (4, 8, 16) if self.quick else (4, 8, 16, 32, 64, 128, 256, 512):
            with self.run(self.million, count // 2) as bytes_:
                points.append(self.synthesize(count, bytes_, TARGET))
        title = f"f16 snapshots of {self.million / 1e6:g} million parameters to one target"
        return [sweep("synthesis", "snapshots", title, points)]

    def targets(self) -> list[dict[str, Any]]:
        n = 10 * self.million
        points = []
        with self.run(n, 20) as bytes_:
            for count in (1, 2, 4, 8, 16, 32, 64):
                # All targets are between the tracked profiles.
                listed = ",".join(f"{0.05 + 0.23 * (i + 0.5) / count:.6f}" for i in range(count))
                points.append(self.synthesize(count, bytes_, listed))
        return [sweep("synthesis", "targets", f"40 f16 snapshots of {n / 1e6:g} million parameters", points)]

    def thread_counts(self) -> list[dict[str, Any]]:
        n = 10 * self.million
        sweeps = []
        with self.run(n, 20) as bytes_:
            for count in (1, 8):
                listed = ",".join(f"{0.05 + 0.23 * (i + 0.5) / count:.6f}" for i in range(count))
                points = [self.synthesize(t, bytes_, listed, t) for t in range(1, self.threads + 1)]
                title = f"40 f16 snapshots of {n / 1e6:g} million parameters to {count} target{'s' * (count > 1)}"
                sweeps.append(sweep("synthesis", "threads", title, points))
        return sweeps

    @contextmanager
    def run(self, parameters: int, steps: int) -> Iterator[int]:
        """Writes a run to the disk, where it is in the page cache, and yields its bytes; removes it afterwards."""
        tensors, rest = divmod(parameters, TENSOR)
        shapes = models.small_tensors(tensors, TENSOR) | ({"rest": (rest,)} if rest else {})
        try:
            bytes_ = runs.write_sized(self.folder / "run", shapes, steps)
            # Pages that are not written yet would be written during the measurements.
            os.sync()
            yield bytes_
        finally:
            shutil.rmtree(self.folder / "run", ignore_errors=True)

    def synthesize(self, x: int, bytes_: int, targets: str, threads: int | None = None) -> Point:
        """Measures the seconds of the process, and those that it reports for its synthesis; files go to memory."""
        output = self.memory / "averages"
        arguments = ["synthesize", self.folder / "run", "--sigma-rel", targets, "--out-dir", output]
        arguments += ["--device", "cpu", "--json"]
        command = self.command("synthesize", arguments, threads or self.threads, clear=lambda: remove(output))
        point: Point = {"x": x, "bytes": bytes_, "seconds_all": [], "process_seconds_all": []}
        try:
            first = command.first()
            point["peak_anonymous_bytes"] = first["peak_anonymous_bytes"]
            for _ in range(FEW_ROUNDS if first["seconds"] > LONG_SECONDS else ROUNDS):
                point["process_seconds_all"].append(command.once())
                point["seconds_all"].append(json.loads(command.printed)["seconds"])
        except turns.Failed as why:
            point["error"] = str(why)
        command.close()
        turns.add_median(point)
        return point

    def command(
        self, name: str, arguments: list[Any], threads: int, clear: Callable[[], None] = lambda: None
    ) -> turns.Command:
        return turns.Command(
            name, ["env", f"RAYON_NUM_THREADS={threads}", self.program, *arguments], clear, PATIENCE_SECONDS
        )

    def close(self) -> None:
        remove(self.memory)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def sweep(work: str, x: str, title: str, points: list[Point]) -> dict[str, Any]:
    return {"work": work, "x": x, "title": title, "points": points}


def point_of(x: int, rows: list[Point] | str, work: str) -> Point:
    """Returns the measurement of a kind of update, found by the beginning of its name."""
    if isinstance(rows, str):
        return {"x": x, "error": rows}
    row = next(row for row in rows if row["work"] == "update" and row["name"].startswith(work))
    return {"x": x, **{key: row[key] for key in ("bytes", "seconds_all", "seconds_median")}}


def main() -> None:
    options = parse()
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="scaling-", dir=options.folder))
    scaling = Scaling(options, folder)
    sweeps = []
    try:
        for each in scaling.all():
            print_sweep(each)
            sweeps.append(each)
    finally:
        scaling.close()
        remove(folder)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"benches/scaling.py{' --quick' * options.quick}",
        "size": "quick" if options.quick else "full",
        "seconds": time.monotonic() - begun,
        "machine": setup.machine("cpu"),
        "versions": {"python": platform.python_version(), "posthoc-ema": version(scaling.program)},
        "sweeps": sweeps,
    }
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def version(program: Path) -> str:
    command = turns.Command("version", [program, "--version"])
    command.once()
    return command.printed.split()[-1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="write all measurements there, as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, whose figures mean nothing, to see that everything runs"
    )
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/posthoc-ema", help="the program")
    parser.add_argument("--folder", type=Path, default=ROOT / "target", help="for snapshots: 8 GB on a disk")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="for results, which no disk should slow")
    return parser.parse_args()


def print_sweep(each: dict[str, Any]) -> None:
    import table

    print(f"\n{each['work']}: {each['title']}")
    for point in each["points"]:
        shown = table.span(point) if "seconds_median" in point else f"not measured: {point.get('error', '?')}"
        print(f"  {point['x']:>13,} {each['x']:10}  {shown}", flush=True)


if __name__ == "__main__":
    main()
