"""Failures of one of several processes: all of them raise, and their next call works."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import bits
from process_group import LIMIT, Group, Net, begin, enter, equal, outcome

import posthoc_ema._broadcast
import posthoc_ema._ranks
from posthoc_ema import PostHocEMA


def _fails(rank: int, run_dir: str, what: str) -> Any:
    model, ema = begin(rank, run_dir, steps=0 if what == "no update" else 12)
    own = bits(model)
    act, undo = FAILURES[what](rank, ema, model)
    error = outcome(act)
    undo()
    same = bits(model) == own
    if what == "no update":
        ema.update_(model)
    again = enter(ema, model, 0.28)
    ema.close()
    return error, same, again


def _nothing() -> None:
    pass


def _patched(owner: Any, name: str, value: object) -> Callable[[], None]:
    """Replaces an attribute, and returns the function that restores it."""
    before = owner.__dict__[name]
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _fails_copying(failing: int) -> Callable[..., Any]:
    """Makes one rank fail in the middle of a broadcast of several pieces."""

    def failure(rank: int, ema: PostHocEMA, model: Any) -> Any:
        undo_piece = _patched(posthoc_ema._broadcast, "PIECE", 100)
        copied = posthoc_ema._broadcast.Broadcast._copied
        calls: list[int] = []

        def fails(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if rank == failing and len(calls) == 3:
                return MemoryError("of the third piece")
            return copied(*arguments, **options)

        undo = _patched(posthoc_ema._broadcast.Broadcast, "_copied", staticmethod(fails))
        return lambda: enter(ema, model, 0.28), lambda: (undo(), undo_piece())

    return failure


def _interrupted_copying(rank: int, ema: PostHocEMA, model: Any) -> Any:
    """Presses Ctrl-C on one rank in the middle of a broadcast."""
    undo_piece = _patched(posthoc_ema._broadcast, "PIECE", 100)
    copied = posthoc_ema._broadcast.Broadcast._copied
    calls: list[int] = []

    def interrupts(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return copied(*arguments, **options)

    undo = _patched(posthoc_ema._broadcast.Broadcast, "_copied", staticmethod(interrupts))
    return lambda: enter(ema, model, 0.28), lambda: (undo(), undo_piece())


def _fails_allocating(method: str) -> Callable[..., Any]:
    def failure(rank: int, ema: PostHocEMA, model: Any) -> Any:
        def no_memory(*_: Any) -> None:
            raise MemoryError("of rank 1")

        undo = _patched(posthoc_ema._broadcast.Broadcast, "__init__", no_memory) if rank == 1 else _nothing
        acts = {
            "model": lambda: enter(ema, model, 0.28),
            "synthesize": lambda: ema.synthesize([0.28]),
            "switch": lambda: ema.switch_(model, 0.28),
        }
        return acts[method], undo

    return failure


def _other_model(rank: int, ema: PostHocEMA, model: Any) -> Any:
    other = Net()
    if rank == 2:
        other.head = torch.nn.Linear(3, 7)
    return lambda: enter(ema, other, 0.28), _nothing


def _missing_file(rank: int, ema: PostHocEMA, model: Any) -> Any:
    ema.flush()
    dist.barrier()
    if rank == 0:
        for path in ema.checkpoint_dir.glob("*.10.safetensors"):
            path.rename(path.with_suffix(".away"))

    def undo() -> None:
        for path in ema.checkpoint_dir.glob("*.away"):
            path.rename(path.with_suffix(".safetensors"))

    return lambda: enter(ema, model, 0.28, step=10), undo if rank == 0 else _nothing


FAILURES: dict[str, Callable[..., Any]] = {
    "no update": lambda rank, ema, model: (lambda: enter(ema, model, 0.28), _nothing),
    "bad target": lambda rank, ema, model: (lambda: enter(ema, model, 0.9 if rank == 2 else 0.28), _nothing),
    "bad dtype": lambda rank, ema, model: (lambda: ema.synthesize([0.1], dtype="int8"), _nothing),
    "other target": lambda rank, ema, model: (lambda: enter(ema, model, 0.1 if rank == 1 else 0.28), _nothing),
    "other call": lambda rank, ema, model: (
        (lambda: ema.synthesize([0.28])) if rank == 1 else (lambda: enter(ema, model, 0.28)),
        _nothing,
    ),
    "other model": _other_model,
    "missing file": _missing_file,
    "allocating model": _fails_allocating("model"),
    "allocating synthesize": _fails_allocating("synthesize"),
    "allocating switch": _fails_allocating("switch"),
    "copying on 0": _fails_copying(0),
    "copying on 1": _fails_copying(1),
    "interrupt": _interrupted_copying,
}


@pytest.mark.parametrize(
    ("what", "errors"),
    [
        ("no update", ["RuntimeError: there was no update yet"] + ["RuntimeError: rank 0: there was no update"] * 2),
        ("bad target", ["ValueError: rank 2: ", "ValueError: rank 2: ", "ValueError: "]),
        ("bad dtype", ["ValueError: dtype int8"] * 3),
        ("other target", ["ValueError: rank 1 calls model(sigma_rel 0.1"] * 3),
        ("other call", ["ValueError: rank 1 calls synthesize([sigma_rel 0.28]"] * 3),
        ("other model", ["ValueError: rank 2: tensor `head.weight`"] * 2 + ["ValueError: tensor `head.weight`: shape"]),
        ("missing file", ["", "", ""]),
        ("allocating model", ["MemoryError: rank 1: of rank 1", "MemoryError: of", "MemoryError: rank 1: of rank 1"]),
        ("allocating synthesize", ["MemoryError: rank 1: of", "MemoryError: of", "MemoryError: rank 1: of"]),
        ("allocating switch", ["MemoryError: rank 1: of", "MemoryError: of", "MemoryError: rank 1: of"]),
        ("copying on 0", ["MemoryError: of the third", "MemoryError: rank 0: of", "MemoryError: rank 0: of"]),
        ("copying on 1", ["MemoryError: rank 1: of", "MemoryError: of the third", "MemoryError: rank 1: of"]),
        ("interrupt", ["RuntimeError: rank 1: Keyboard", "KeyboardInterrupt: ", "RuntimeError: rank 1: Keyboard"]),
    ],
)
def test_failure_of_one_rank_ends_the_call_on_all(group: Group, tmp_path: Path, what: str, errors: list[str]) -> None:
    results = group(_fails, str(tmp_path / "ema"), what)
    for (error, _, _), expected in zip(results, errors):
        assert error and error.startswith(expected), results
    assert equal([result[1:] for result in results])[0]


def _interrupted(rank: int, run_dir: str) -> Any:
    model, ema = begin(rank, run_dir)
    own = bits(model)
    if rank == 0:
        time.sleep(1.5)
    if rank == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    error = outcome(lambda: enter(ema, model, 0.28))
    again = enter(ema, model, 0.28)
    ema.close()
    return error, bits(model) == own, again


def test_interrupt_of_a_waiting_rank_ends_the_call_on_all(group: Group, tmp_path: Path) -> None:
    results = group(_interrupted, str(tmp_path / "ema"))
    errors = [result[0] for result in results]
    assert errors == ["RuntimeError: rank 1: KeyboardInterrupt", "KeyboardInterrupt: ", errors[0]]
    assert equal([result[1:] for result in results])[0]


def _missing(rank: int, run_dir: str) -> Any:
    model, ema = begin(rank, run_dir)
    store = dist.distributed_c10d._get_default_store()
    before = store.timeout
    store.set_timeout(datetime.timedelta(seconds=1.5))
    undo = _patched(posthoc_ema._ranks, "PATIENCE", 0.5)
    dist.barrier()
    if rank == 2:
        time.sleep(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = outcome(lambda: enter(ema, model, 0.28))
    warning = "".join(str(each.message) for each in caught)
    store.set_timeout(before)
    undo()
    dist.barrier()
    again = enter(ema, model, 0.28)
    ema.close()
    return error, warning, again


def test_missing_rank_is_named_in_a_warning_and_then_in_an_error(group: Group, tmp_path: Path) -> None:
    results = group(_missing, str(tmp_path / "ema"))
    errors = [result[0] for result in results]
    assert "waits for rank 2: all ranks must make this call" in results[0][1]
    assert errors[0].startswith("TimeoutError: model(sigma_rel 0.28") and "for rank 2: " in errors[0]
    assert errors[1] == errors[2] and errors[1].startswith("TimeoutError: rank 0: model(")
    equal([result[2] for result in results])


def _dies(rank: int, run_dir: str, dying: int) -> Any:
    model, ema = begin(rank, run_dir)
    own = bits(model)
    posthoc_ema._broadcast.PIECE = 100
    copied = posthoc_ema._broadcast.Broadcast._copied
    calls: list[int] = []

    def dies(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if rank == dying and len(calls) == 3:
            os._exit(1)
        return copied(*arguments, **options)

    posthoc_ema._broadcast.Broadcast._copied = staticmethod(dies)
    error = outcome(lambda: enter(ema, model, 0.28))
    return error, bits(model) == own


@pytest.mark.parametrize("dying", [0, 2])
def test_process_that_dies_while_it_sends_or_receives_ends_the_call(tmp_path: Path, dying: int) -> None:
    group = Group()
    try:
        for connection in group.connections:
            connection.send((_dies, (str(tmp_path / "ema"), dying)))
        for rank, connection in enumerate(group.connections):
            if rank != dying:
                assert connection.poll(LIMIT), f"rank {rank} hangs"
                error, is_restored = connection.recv()
                assert error and is_restored, error
    finally:
        group.close()
