#!/usr/bin/env python3
"""Measures a training on a device beside the averages, as one JSON document.

    training.py loop|latency|capture|full      # sizes from WIDTH, LAYERS, STEPS

loop      a step (bf16 matrix products, AdamW) without averages, and with them on the host and on the device, updated at
          every step and at every tenth
latency   how long `.item()` takes beside an update to the host
capture   a CUDA graph that another thread captures during a checkpoint, and an update inside a capture
full      a checkpoint, and averages put into the model, with all but 50 MB of the device's memory taken

Without a device the loop runs once on the CPU, and the document says that nothing was measured.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posthoc_ema import PostHocEMA

BLOCK = 10
TAKEN_BUT = 50_000_000
Document = dict[str, Any]


class Training:
    """Model of square layers, whose step is mostly matrix products."""

    def __init__(self, device: torch.device, width: int, layers: int):
        torch.manual_seed(0)
        parts: list[torch.nn.Module] = []
        for _ in range(layers):
            parts += [torch.nn.Linear(width, width), torch.nn.GELU()]
        self.model = torch.nn.Sequential(*parts).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=device.type == "cuda")
        self.batch = torch.randn(2048 if device.type == "cuda" else 8, width, device=device)
        self.device = device

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(self.batch).float().square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def seconds(self, blocks: int) -> list[float]:
        """Returns the seconds of a step, averaged over each block of ten, after a block that is not counted."""
        found = []
        for _ in range(blocks + 1):
            synchronize(self.device)
            begun = time.perf_counter()
            for _ in range(BLOCK):
                self.step()
            synchronize(self.device)
            found.append((time.perf_counter() - begun) / BLOCK)
        return found[1:]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def averages(training: Training, folder: Path, where: str, every: int, checkpoint_every: int = 10**6) -> PostHocEMA:
    return PostHocEMA.from_model(
        training.model,
        folder,
        device=where,
        update_every=every,
        update_after_step=0,
        checkpoint_every=checkpoint_every,
        snapshot_growth=None,
    )


def loop(training: Training, folder: Path) -> Document:
    blocks = max(1, int(os.environ["STEPS"]) // BLOCK)
    rows = [row_of("without averages", training.seconds(blocks))]
    for where, name in places(training.device):
        for every in (1, 10):
            with averages(training, folder / f"{where}.{every}", where, every) as ema:
                with ema.attach(training.optimizer, training.model):
                    seconds = training.seconds(blocks)
                assert ema.step == BLOCK * (blocks + 1), f"{ema.step} steps were counted"
            rows.append(row_of(f"averages on the {name}, every {every}", seconds))
    rows.append(row_of("without averages, again", training.seconds(blocks)))
    return {"parameters": training.parameters, "rows": rows}


def places(device: torch.device) -> list[tuple[str, str]]:
    return [("cpu", "host"), *([("cuda", "device")] if device.type == "cuda" else [])]


def row_of(name: str, seconds: list[float]) -> Document:
    return {"name": name, "seconds_all": seconds, "seconds_median": statistics.median(seconds)}


def latency(training: Training, folder: Path) -> Document:
    """Measures `.item()` of a small result right after an update, whose parameters travel to the host meanwhile."""
    small = torch.zeros((), device=training.device)

    def one(update: Callable[[], object]) -> float:
        synchronize(training.device)
        update()
        begun = time.perf_counter()
        (small + 1).item()
        return time.perf_counter() - begun

    with averages(training, folder / "latency", "cpu", 1) as ema:
        for _ in range(3):
            ema.update_(training.model)
        alone = [one(lambda: None) for _ in range(20)]
        beside = [one(lambda: ema.update_(training.model)) for _ in range(20)]
    return {
        "parameters": training.parameters,
        "alone_s": statistics.median(alone),
        "beside_s": statistics.median(beside),
        "beside_all": beside,
    }


def capture(training: Training, folder: Path) -> Document:
    """Captures graphs in a second thread while checkpoints are stored, then tries an update inside a capture."""
    captured, errors = 0, []
    done = threading.Event()

    def captures() -> None:
        nonlocal captured
        x = torch.ones(1000, device=training.device)
        while not done.is_set():
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                    y = x * 2
                graph.replay()
                torch.cuda.synchronize()
                assert bool((y == 2).all())
                captured += 1
            except Exception as error:
                errors.append(str(error))
                return

    thread = threading.Thread(target=captures)
    with averages(training, folder / "capture", "cuda", 1, checkpoint_every=2) as ema:
        # The first update loads the kernels. A training's own allocations could break a capture, so no step runs here.
        ema.update_(training.model)
        thread.start()
        for _ in range(20):
            ema.update_(training.model)
        ema.flush()
        done.set()
        thread.join()
        inside = inside_capture(training, ema)
        ema.update_(training.model)
    if errors:
        raise SystemExit(f"a capture in a second thread failed after {captured}: {errors[0]}")
    return {"captured": captured, "inside_a_capture": inside}


def inside_capture(training: Training, ema: PostHocEMA) -> str:
    """Returns what an update inside a capture does: it works, or the error."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            ema.update_(training.model)
    except Exception as error:
        return f"refused: {error}"
    graph.replay()
    torch.cuda.synchronize()
    return "captured and replayed"


def full(training: Training, folder: Path) -> Document:
    """Takes all memory but 50 MB once the averages exist, then stores a checkpoint and puts averages into the model."""
    taken = []
    results: Document = {}
    with averages(training, folder / "full", "cuda", 1, checkpoint_every=4) as ema:
        for _ in range(8):
            training.step()
            ema.update_(training.model)
        ema.flush()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(training.device)[0]
        if free > TAKEN_BUT:
            taken.append(torch.empty(free - TAKEN_BUT, dtype=torch.uint8, device=training.device))
        results["free_bytes"] = torch.cuda.mem_get_info(training.device)[0]
        before = training.model[0].weight.detach().cpu()
        begun = time.perf_counter()
        for _ in range(4):
            ema.update_(training.model)
        ema.flush()
        results["checkpoint_s"] = time.perf_counter() - begun
        begun = time.perf_counter()
        with ema.model(training.model, 0.15):
            synchronize(training.device)
            results["swap_s"] = time.perf_counter() - begun
            assert not torch.equal(training.model[0].weight.cpu(), before), "the model has no average"
        assert torch.equal(training.model[0].weight.cpu(), before), "the weights were not put back"
    return results


def main() -> None:
    part = sys.argv[1]
    sizes = [int(os.environ[name]) for name in ("WIDTH", "LAYERS")]
    works = {"loop": loop, "latency": latency, "capture": capture, "full": full}
    with tempfile.TemporaryDirectory() as folder:
        if not torch.cuda.is_available():
            # The path of the code runs all the same; nothing of it is a figure.
            for work in (loop, latency):
                work(Training(torch.device("cpu"), 16, 2), Path(folder))
            print(json.dumps({"skipped": "no device"}))
            return
        device = torch.device(os.environ.get("DEVICE", "cuda:0"))
        torch.cuda.set_device(device)
        layers = sizes[1] if part in ("loop", "latency") else min(2, sizes[1])
        document = works[part](Training(device, sizes[0], layers), Path(folder))
    print(json.dumps({"torch": torch.__version__, **document}))


if __name__ == "__main__":
    main()
