#!/usr/bin/env python3
"""Measures sharded models and syntheses in parts, beside one process that holds or writes the whole model.

    python3 benches/sharded.py --record benches/record/DATE-sharded.json

Needs Python with torch and the package, and the program (cargo build --release -p posthoc-ema-cli). Every figure stands
beside its limit, measured in turns with it. Processor time says more than time where others use the machine.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benches" / "peers"))

import environment as setup  # noqa: E402
import turns  # noqa: E402

Row = dict[str, Any]
# Ranks by which the layouts cut their tensors.
RANKS = 4
PARTS = 4
TARGETS = "0.1,0.15"
# Layouts of a run: the dimension that is cut; None for a model that is whole.
LAYOUTS: dict[str, int | None] = {"whole": None, "rows": 0, "columns": 1}


class Group:
    """Workers that hold one model together."""

    def __init__(self, options: argparse.Namespace, run: Path, dimension: int | None, ranks: int, *more: object):
        self.store = run.with_name(f"{run.name}.store")
        command = [
            sys.executable,
            ROOT / "benches" / "sharded_worker.py",
            "--run",
            run,
            "--width",
            options.width,
            *more,
        ]
        if dimension is not None:
            command += ["--dimension", dimension, "--ranks", ranks, "--store", self.store]
        # One thread, so that a rank's processor time is that of its work.
        environment = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.workers = [
            turns.Worker(f"rank {rank}", [str(part) for part in [*command, "--rank", rank]], environment)
            for rank in range(ranks)
        ]

    def ask(self, do: str, **about: Any) -> list[Row]:
        """Asks one rank after another, which must not wait for each other."""
        return [worker.ask(do, **about) for worker in self.workers]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def updates(options: argparse.Namespace, folder: Path) -> Row:
    """Measures an update of each rank beside one of the whole model."""
    layers, rounds, times = (2, 2, 1) if options.quick else (12, 15, 3)
    sizes = [2] if options.quick else [1, 2, 4]
    rows: list[Row] = [{"name": "whole", "ranks": 1, "dimension": None}]
    rows += [{"name": f"FSDP2, {ranks} ranks", "ranks": ranks, "dimension": 0} for ranks in sizes]
    with ExitStack() as stack:
        groups = []
        for row in rows:
            run = folder / f"updates-{len(groups)}"
            groups.append(Group(options, run, row["dimension"], row["ranks"], "--layers", layers))
            stack.callback(groups[-1].close)
        for row, group in zip(rows, groups):
            row["parameters"] = [answer["parameters"] for answer in group.ask("hello")]
            row["rounds"] = []
        assert all(sum(row["parameters"]) == rows[0]["parameters"][0] for row in rows)
        for group in groups:
            group.ask("update", times=2)
            group.ask("limit", times=2)
        for _ in range(rounds):
            for row, group in zip(rows, groups):
                row["rounds"].append({do: group.ask(do, times=times) for do in ("update", "limit")})
    for row in rows:
        for do in ("update", "limit"):
            for unit in ("cpu", "seconds"):
                each = [statistics.mean(answer[unit] for answer in one[do]) for one in row["rounds"]]
                row[f"{do}_{unit}_median"] = statistics.median(each)
        row["share_of_whole"] = row["update_cpu_median"] / rows[0]["update_cpu_median"]
        print(
            f"update, {row['name']}: {1e3 * row['update_cpu_median']:.2f} ms of processor a rank, "
            f"{row['share_of_whole']:.3f} of the whole model's (limit: {1 / row['ranks']:.3f}); "
            f"a plain lerp {1e3 * row['limit_cpu_median']:.2f} ms",
            flush=True,
        )
    return {"rows": rows, "layers": layers, "width": options.width}


def write_runs(options: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """Writes the same snapshots whole, in rows and in columns."""
    layers, steps = (1, 2) if options.quick else (3, 20)
    written: dict[str, Row] = {}
    for name, dimension in LAYOUTS.items():
        ranks = 1 if dimension is None else RANKS
        group = Group(options, folder / name, dimension, ranks, "--layers", layers, "--steps", steps)
        try:
            group.ask("hello")
        finally:
            group.close()
        files = [path for path in (folder / name).glob("*.safetensors") if not path.name.startswith("state")]
        states = (folder / name).glob("state*.safetensors")
        written[name] = {
            "files": len(files),
            "bytes": sum(path.stat().st_size for path in files),
            "state_bytes": sum(path.stat().st_size for path in states),
            "element_bytes": 2 * 2 * steps * layers * (options.width + 1) * options.width,
        }
        print(f"run, {name}: {written[name]}", flush=True)
    # Beyond the elements there are headers, which are padded to pages.
    for row in written.values():
        assert 0 <= row["bytes"] - row["element_bytes"] <= 16384 * row["files"], row
    return written


class Synthesis:
    """Commands that write the averages of a run together, one after the other or at once."""

    def __init__(self, name: str, commands: Sequence[Sequence[str]], output: Path, at_once: bool = False):
        self.name, self.commands, self.output, self.at_once = name, commands, output, at_once
        self.rounds: list[Row] = []
        self.digests: set[str] = set()

    def once(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        start, before = time.perf_counter(), turns.children_seconds()
        peaks = list(self._run())
        self.rounds.append(
            {
                "seconds": time.perf_counter() - start,
                "cpu": turns.children_seconds() - before,
                "peak_anonymous_bytes": max(peaks),
            }
        )
        files = sorted(path for path in self.output.rglob("*") if path.is_file())
        assert len(files) == len(TARGETS.split(",")), files
        self.digests.add("".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files))

    def _run(self) -> Iterator[int]:
        """Runs the commands, and yields the peak memory of each."""
        for together in [self.commands] if self.at_once else [[command] for command in self.commands]:
            with ExitStack() as stack:
                processes = [subprocess.Popen(c, stdout=subprocess.DEVNULL) for c in together]
                peaks = [stack.enter_context(turns.Peak(process.pid)) for process in processes]
                codes = [process.wait() for process in processes]
            assert codes == [0] * len(codes), (self.name, codes)
            yield from (peak.bytes for peak in peaks)

    def row(self) -> Row:
        keys = ("seconds", "cpu", "peak_anonymous_bytes")
        medians = {f"{key}_median": statistics.median(one[key] for one in self.rounds) for key in keys}
        return {"name": self.name, "rounds": self.rounds, **medians}


def syntheses(options: argparse.Namespace, folder: Path, memory: Path) -> list[Row]:
    """Measures syntheses of the runs, and in parts, beside one process with the run in whole files."""
    output = memory / "averages"

    def command(run: str, *more: str) -> list[str]:
        arguments = [options.program, "synthesize", folder / run, "--sigma-rel", TARGETS, "--out-dir", output, *more]
        return [str(part) for part in [*arguments, "--device", "cpu"]]

    parts = [("--part", f"{part}/{PARTS}") for part in range(1, PARTS + 1)]
    contenders = [Synthesis(name, [command(name)], output) for name in LAYOUTS]
    for name in ("whole", "rows"):
        of_parts = [command(name, *part) for part in parts]
        contenders.append(Synthesis(f"{name}, {PARTS} parts one after the other", of_parts, output))
        contenders.append(Synthesis(f"{name}, {PARTS} parts at once", of_parts, output, at_once=True))
    for round_ in range(2 if options.quick else 10):
        for contender in contenders:
            contender.once()
            if round_ == 0:
                # Warms up.
                contender.rounds.clear()
    # The bits are those of one process, whatever the tiling and the number of parts.
    assert set.union(*(each.digests for each in contenders)) == contenders[0].digests
    assert len(contenders[0].digests) == 1
    rows = [contender.row() for contender in contenders]
    for row in rows:
        row["share_of_rate"] = rows[0]["cpu_median"] / row["cpu_median"]
        print(
            f"synthesis, {row['name']}: {row['cpu_median']:.3f} s of processor, {row['seconds_median']:.3f} s; "
            f"{100 * row['share_of_rate']:.0f}% of the rate of one process with whole files (limit: 100%); "
            f"{row['peak_anonymous_bytes_median'] / 1e6:.1f} MB",
            flush=True,
        )
    return rows


@contextmanager
def temporary(place: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="posthoc-ema-sharded-", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    options = parse()
    options.width = 64 if options.quick else 2048
    load = os.getloadavg()
    with temporary(options.folder) as folder, temporary(options.memory) as memory:
        results: Row = {"runs": write_runs(options, folder)}
        # Pages that are not written yet would be written during the measurements.
        os.sync()
        results["syntheses"] = syntheses(options, folder, memory)
        results["updates"] = updates(options, folder)
    if options.record:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": f"benches/sharded.py{' --quick' * options.quick}",
            "machine": setup.machine("cpu"),
            "load_average": [load, os.getloadavg()],
            **results,
        }
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="write all measurements there, as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, whose figures mean nothing, to see that everything runs"
    )
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/posthoc-ema", help="the program")
    parser.add_argument("--folder", type=Path, default=ROOT / "target", help="for snapshots: 3 GB on a disk")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="for results, which no disk should slow")
    return parser.parse_args()


if __name__ == "__main__":
    main()
