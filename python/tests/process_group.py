"""Process groups of gloo, and models and runs within their processes."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import bits

from posthoc_ema import PostHocEMA

SIZE = 3
LIMIT = 120
"""Seconds after which a call counts as a hang; a busy machine needs some of them."""
OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 10, "rank_zero_only": True}


def serve(connection: Connection, rank: int, size: int, port: int) -> None:
    """Runs functions in a process of the group, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    connection.send("ready")
    try:
        while True:
            function, arguments = connection.recv()
            torch.manual_seed(0)
            try:
                connection.send(function(rank, *arguments))
            except BaseException:
                connection.send(traceback.format_exc())
    except EOFError:
        os._exit(0)


class Group:
    """Processes that wait for functions to run together."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.is_alive = True
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(size)]
        self.connections = [own for own, _ in pairs]
        self.processes = [
            context.Process(target=serve, args=(other, rank, size, port), daemon=True)
            for rank, (_, other) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        # Importing PyTorch takes a while on a busy machine.
        self._receive("the start", 3 * LIMIT)

    def __call__(self, function: Callable[..., Any], *arguments: object) -> list[Any]:
        """Runs a function on all ranks, which it takes first, and returns their results."""
        for connection in self.connections:
            connection.send((function, arguments))
        results = self._receive(function.__name__, LIMIT)
        for rank, result in enumerate(results):
            if isinstance(result, str):
                pytest.fail(f"rank {rank}: {result}")
        return results

    def _receive(self, what: str, limit: float) -> list[Any]:
        end = time.monotonic() + limit
        waiting = [rank for rank, c in enumerate(self.connections) if not c.poll(max(0, end - time.monotonic()))]
        if waiting:
            self.close()
            pytest.fail(f"ranks {waiting} hang in {what}")
        return [connection.recv() for connection in self.connections]

    def close(self) -> None:
        self.is_alive = False
        for process in self.processes:
            process.kill()
            process.join()


def sized_group(groups: list[Group], size: int) -> Group:
    """Returns a living group of a number of processes, in the place of the last one of another number."""
    if not groups or not groups[-1].is_alive or groups[-1].size != size:
        for group in groups:
            group.close()
        groups.append(Group(size))
    return groups[-1]


class Net(torch.nn.Module):
    """Tied, strided, 16-bit, complex and integer tensors, and batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm2d(3)
        self.head = torch.nn.Linear(3, 4)
        self.tied = torch.nn.Linear(3, 4)
        self.tied.weight = self.head.weight
        self.short = torch.nn.Parameter(torch.randn(5).bfloat16())
        self.phase = torch.nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.body(x)).mean((2, 3))
        return self.head(features) + self.tied(features) + self.short.sum() + self.phase.abs().sum()


def begin(rank: int, run_dir: str, steps: int = 12, **options: object) -> tuple[Any, PostHocEMA]:
    """Trains a model whose batch statistics differ between the ranks in the end, as after each training step."""
    model = torch.nn.parallel.DistributedDataParallel(Net())
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        torch.manual_seed(SIZE * step + rank)
        model(torch.randn(4, 2, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_(model)
    model.module.norm.running_mean += rank
    return model, ema


def outcome(act: Callable[[], object]) -> str:
    """Returns the text of the error that a call raises; empty if there is none."""
    try:
        act()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def enter(ema: PostHocEMA, model: Any, *arguments: Any, **options: Any) -> dict[str, bytes]:
    """Returns the bits of a model that holds an average."""
    with ema.model(model, *arguments, **options):
        assert not any(part.training for part in model.modules())
        return bits(model)


def states(made: list[dict[str, Any]]) -> list[dict[str, bytes]]:
    """Returns the bits of state dicts."""

    def wide(tensor: Any) -> bytes:
        return (tensor.to(torch.complex128).numpy() if isinstance(tensor, torch.Tensor) else tensor).tobytes()

    return [{name: wide(tensor) for name, tensor in each.items()} for each in made]


def equal(results: list[Any]) -> Any:
    """Checks that all ranks have the same result, and returns it."""
    for rank, result in enumerate(results):
        assert result == results[0], f"rank {rank} differs from rank 0"
    return results[0]
