#!/usr/bin/env python3
"""posthoc-ema beside pytorch-posthoc-ema, ema-pytorch and PyTorch's foreach functions, on this machine.

    pip install --no-deps --target DIR pytorch-posthoc-ema==1.0.10 ema-pytorch==0.8.3
    python benches/compare.py --peers DIR [--device cuda] [--json FILE] [--quick]

Updates of two averages, due and not due, and one state dict from 40 f16 snapshots. Whatever is compared takes turns, so
that what slows the machine slows all alike, and every answer is checked before it is timed. The machine's copy of the
parameters in f32 is measured beside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trackers
from torch import nn

import posthoc_ema
from posthoc_ema import _native

ONCE = Path(__file__).resolve().with_name("synthesize_once.py")
OURS = Path(posthoc_ema.__file__).resolve().parents[1]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
FIRST = "posthoc-ema"


@dataclass(frozen=True)
class Size:
    """How large the models are, and how often things are measured."""

    # (matrices, rows and columns, vectors)
    models: dict[str, tuple[int, int, int]]
    rounds: int
    calls: int
    parameters_stored: int
    processes: int


FULL = Size({"50M in 150": (75, 816, 75), "4M in 1000": (1000, 64, 0)}, 15, 1000, 2**24, 3)
QUICK = Size({"0.1M in 10": (5, 128, 5), "0.1M in 100": (100, 32, 0)}, 3, 100, 2**17, 1)


def main() -> None:
    options = parse()
    size = QUICK if options.quick else FULL
    peers = trackers.import_peers(options.peers.resolve()) if options.peers else None
    if peers is None:
        print("pytorch-posthoc-ema and ema-pytorch are left out: no --peers DIR", file=sys.stderr)
    updates = [compare_updates(options.device, peers, name, dtype, size) for name in size.models for dtype in DTYPES]
    report = {
        **about(options.device),
        "updates": updates,
        "not_due": [compare_not_due(options.device, peers, name, size) for name in size.models],
        "synthesis": compare_synthesis(options.peers, size),
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with the other packages")
    parser.add_argument("--device", default="cpu", help="of the parameters: cpu (default) or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements there, too")
    parser.add_argument("--quick", action="store_true", help="small models, to see that everything works")
    return parser.parse_args()


def about(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "posthoc_ema": _native.__version__}
    return {"device": name, "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), **versions}


# Updates


def model_of(matrices: int, side: int, vectors: int, dtype: torch.dtype, device: str) -> nn.Module:
    """Parameters in [-1, 1), every element of a tensor unlike its neighbours."""
    shapes = [(side, side)] * matrices + [(side,)] * vectors
    values = (torch.arange(side * side) % 251 / 128 - 1).to(device, dtype)
    return nn.ParameterList(values[: math.prod(shape)].reshape(shape).clone() for shape in shapes)


def all_trackers(model: nn.Module, folder: Path, peers: Any, update_every: int) -> list[trackers.Tracker]:
    """Those that can be compared on this machine; the first is this package, its averages on the host."""
    found: list[trackers.Tracker] = [trackers.PosthocEma(model, folder / "host", update_every, "cpu")]
    found.append(trackers.PosthocEma(model, folder / "plain", update_every, "cpu", compensated=False))
    if next(model.parameters()).is_cuda:
        if _native.CUDA:
            found.append(trackers.PosthocEma(model, folder / "device", update_every, "cuda"))
        else:
            print("this build has no CUDA kernels: averages on the device are left out", file=sys.stderr)
    if peers is not None:
        found.append(trackers.PytorchPosthocEma(peers[0], model, folder / "pytorch-posthoc-ema", update_every))
        found.append(trackers.EmaPytorch(peers[1], model, folder / "ema-pytorch", update_every))
    return found


def compare_updates(device: str, peers: Any, name: str, dtype: str, size: Size) -> dict[str, Any]:
    """Every call of it updates both averages."""
    model = model_of(*size.models[name], DTYPES[dtype], device)
    with tempfile.TemporaryDirectory() as folder:
        compared = [*all_trackers(model, Path(folder), peers, update_every=1), trackers.Foreach(model)]
        if dtype != "f32":
            compared.append(trackers.ForeachOfFloats(model))
        for tracker in compared:
            trackers.check(tracker, model)
        work = {tracker.name: tracker.update for tracker in compared}
        count = sum(parameter.numel() for parameter in model.parameters())
        source, target = torch.ones(count, device=device), torch.empty(count, device=device)
        work["copy in f32"] = lambda: target.copy_(source)
        # Several in a row on a device, where the host only queues them.
        rows = in_turns(work, device, size.rounds, 5 if device.startswith("cuda") else 1)
    return {"model": name, "dtype": dtype, "parameters": count, "copy_bytes": 8 * count, "rows": rows}


def compare_not_due(device: str, peers: Any, name: str, size: Size) -> dict[str, Any]:
    """What a training step pays at which nothing is updated."""
    model = model_of(*size.models[name], torch.float32, device)
    with tempfile.TemporaryDirectory() as folder:
        compared = all_trackers(model, Path(folder), peers, update_every=trackers.NEVER)
        for tracker in compared:
            tracker.update()  # the first call is due in the other packages
        work = {tracker.name: tracker.update for tracker in compared}
        rows = in_turns(work, device, size.rounds, size.calls)
    return {"model": name, "rows": rows}


def in_turns(work: dict[str, Callable[[], object]], device: str, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Seconds of one call of each, in rounds, after a round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, call in work.items():
            seconds[name].append(seconds_of(call, device, calls))
    return [row(name, times[1:]) for name, times in seconds.items()]


def seconds_of(call: Callable[[], object], device: str, calls: int) -> float:
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait(device)
    return (time.perf_counter() - start) / calls


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def row(name: str, seconds: list[float]) -> dict[str, Any]:
    return {"name": name, "seconds_median": statistics.median(seconds), "seconds_all": seconds}


# Synthesis


def compare_synthesis(peers: Path | None, size: Size) -> dict[str, Any]:
    """Each in processes of its own, which take turns: peaks of memory are a process's."""
    packages = {FIRST: OURS} | ({"pytorch-posthoc-ema": peers.resolve()} if peers else {})
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in packages}
    with tempfile.TemporaryDirectory() as folder:
        for name, package in packages.items():
            once(package, "make", Path(folder) / name, size.parameters_stored)
        for _ in range(size.processes):
            for name, package in packages.items():
                results[name].append(json.loads(once(package, "time", Path(folder) / name, size.parameters_stored)))
    rows = [
        {
            **row(name, [seconds for each in all_ for seconds in each["seconds_all"]]),
            "peak_bytes": max(each["peak_bytes"] for each in all_),
            "peak_anonymous_bytes": max(each["peak_anonymous_bytes"] for each in all_),
        }
        for name, all_ in results.items()
    ]
    return {"parameters": size.parameters_stored, "snapshot_bytes": 40 * 2 * size.parameters_stored, "rows": rows}


def once(package: Path, what: str, run: Path, parameters: int) -> str:
    """What `synthesize_once.py` prints with this package."""
    command = [sys.executable, str(ONCE), what, str(run), str(parameters)]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    # Elsewhere, because Python may look for packages where it is started.
    done = subprocess.run(command, env=environment, cwd=ONCE.parent, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} with {package}:\n{done.stderr}")
    return done.stdout


# Tables


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['device']}, {report['cores']} cores; torch {report['torch']}, {report['torch_threads']} threads")
    for case in report["updates"]:
        title = f"update of two averages, {case['model']} tensors, {case['dtype']}"
        print_table(title, case["rows"], 1e3, "ms")
        copy = next(each for each in case["rows"] if each["name"] == "copy in f32")
        print(f"  the copy runs at {case['copy_bytes'] / copy['seconds_median'] / 1e9:.1f} GB/s, read and written")
    for case in report["not_due"]:
        print_table(f"call that is not due, {case['model']} tensors", case["rows"], 1e6, "us")
    synthesis = report["synthesis"]
    title = f"state dict from 40 f16 snapshots of {synthesis['parameters'] / 1e6:.1f}M parameters"
    print_table(title, synthesis["rows"], 1e3, "ms")
    for each in synthesis["rows"]:
        rate = synthesis["snapshot_bytes"] / each["seconds_median"] / 1e9
        memory = f"{each['peak_anonymous_bytes'] / 1e6:.0f} MB, {each['peak_bytes'] / 1e6:.0f} MB with mapped files"
        print(f"  {each['name']}: {rate:.1f} GB/s of snapshots; peak memory {memory}")


def print_table(title: str, rows: list[dict[str, Any]], factor: float, unit: str) -> None:
    """Medians, their range, and the ratio to the first."""
    print(f"\n{title}")
    for each in rows:
        times, median = each["seconds_all"], each["seconds_median"]
        span = f"{factor * min(times):.2f} to {factor * max(times):.2f}"
        ratio = median / rows[0]["seconds_median"]
        print(f"  {each['name']:40} {factor * median:10.2f} {unit}  {span:>20}  x{ratio:.2f}")


if __name__ == "__main__":
    main()
