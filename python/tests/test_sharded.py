"""Sharded models, tracked by all ranks: the bits of one process that tracks the whole model."""

from __future__ import annotations

import datetime
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import bits
from process_group import Group, outcome, sized_group
from sharded_models import CANNOT_RUN, LAYOUTS, optimizer_of, plain, step, whole
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import posthoc_ema._ranks
import posthoc_ema._sharded_start
from posthoc_ema import PostHocEMA
from posthoc_ema._model import tensors_of

OPTIONS: dict[str, Any] = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 3, "snapshot_growth": None}
TARGETS = [0.05, 0.2, 0.28]
STEPS = 7


def values(tensors: dict[str, Any]) -> dict[str, bytes]:
    """Returns the bits of tensors by name."""
    return {
        name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()
    }


def _quietly(act: Any) -> Any:
    """Calls a function, which must not communicate tensors."""
    with CommDebugMode() as communicated:
        result = act()
    assert communicated.get_total_counts() == 0, communicated.get_comm_counts()
    return result


def _look(model: Any) -> list[Any]:
    """Returns what the model computes in eval mode, for which FSDP puts its parameters together."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        result = model(torch.arange(8).reshape(2, 4)).float().tolist()
    model.train(was_training)
    return result


def _evaluate(ema: PostHocEMA, model: Any) -> dict[str, bytes]:
    """Returns the average in the model, and checks that the block changes nothing beyond it."""
    before, seen = bits_of_parts(model), _look(model)
    block = ema.model(model, TARGETS[-1])
    _quietly(block.__enter__)
    inside = _look(model)
    average = values(whole(model))
    _quietly(lambda: block.__exit__(None, None, None))
    assert inside != seen
    # In this order: the first must not read the average that FSDP has put together in the block.
    assert _look(model) == seen and bits_of_parts(model) == before
    return average


def bits_of_parts(model: Any) -> list[bytes]:
    """Returns every bit that this process holds between the steps."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    held = [*model.parameters(), *model.buffers()]
    local = [t._local_tensor if isinstance(t, DTensor) else getattr(t, "ds_tensor", t) for t in held]
    return [t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in local]


def held_parts(rank: int, tensors: Any) -> dict[str, Any]:
    """Returns global shape, offset, replica and elements of each part, which are found without communication."""
    lender = _quietly(tensors.lender)
    held = {}
    for name, tensor in zip(lender.names, lender.tensors):
        part = lender.parts.get(name)
        shape, offset, is_replica = (tensor.shape, (0,) * tensor.ndim, rank > 0) if part is None else part[1:4]
        held[name] = (tuple(shape), tuple(offset), is_replica, tensor.detach().numpy().copy())
    return held


def check_tiling(name: str, of_ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Checks that the parts to store hold each element of the whole tensors once, and all parts the right ones."""
    assert set().union(*of_ranks) == set(expected), name
    for key, right in expected.items():
        times = np.zeros(right.shape, int)
        places = set()
        for held in of_ranks:
            shape, offset, is_replica, values = held[key]
            assert shape == right.shape, (name, key)
            grid = (right.size,) if len(offset) != len(shape) else shape
            place = tuple(slice(start, start + n) for start, n in zip(offset, values.shape))
            if "running" not in key and "num_batches" not in key:
                assert np.array_equal(right.reshape(grid)[place], values), (name, key, offset)
            # Replicas that no mesh knows are found by comparing the ranks.
            times.reshape(grid)[place] += not is_replica and str(place) not in places
            places.add(str(place))
        assert (times == 1).all(), (name, key, times)


def _track(rank: int, folder: str, names: list[str], size: int) -> Any:
    """Trains and tracks models.

    Returns:
        For each the parts, and of rank 0 the weights at each step and an average, if the model can be evaluated.
    """
    results = {}
    for name in names:
        model = LAYOUTS[name][0](size)
        optimizer = optimizer_of(model, name)
        ema = PostHocEMA.from_model(model, f"{folder}/{name}", **OPTIONS)
        seen = []
        for number in range(STEPS):
            step(model, optimizer, number)
            _quietly(lambda ema=ema, model=model: ema.update_(model))
            seen.append(whole(model))
        held = held_parts(rank, tensors_of(model, in_parts=True))
        average = _evaluate(ema, model) if name not in CANNOT_RUN else {}
        ema.finish()
        ema.close()
        results[name] = (held, seen, average) if rank == 0 else (held,)
    return results


def twin_of(name: str, seen: list[dict[str, Any]], folder: Path) -> tuple[PostHocEMA, dict[str, bytes]]:
    """Tracks the same weights in one process, and returns the stored run, and an average in the model."""
    model = plain(name)
    ema = PostHocEMA.from_model(model, folder, **OPTIONS)
    slots = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for tensors in seen:
        for key, tensor in slots:
            tensor.data.copy_(tensors[key])
        ema.update_(model)
    with ema.model(model, TARGETS[-1]):
        inside = bits(model)
    ema.finish()
    ema.close()
    return PostHocEMA.from_path(folder), inside


@pytest.mark.parametrize("size", [8, 4, 3, 2])
def test_layouts_track_to_the_bits_of_one_process(groups: list[Group], tmp_path: Path, size: int) -> None:
    names = [name for name, (_, sizes) in LAYOUTS.items() if size in sizes]
    results = sized_group(groups, size)(_track, str(tmp_path), names, size)
    for name in names:
        _, seen, average = results[0][name]
        check_tiling(name, [result[name][0] for result in results], {key: t.numpy() for key, t in seen[-1].items()})
        twin, inside = twin_of(name, seen, tmp_path / f"twin-{name}")
        run = PostHocEMA.from_path(tmp_path / name)
        for of_run, of_twin in zip(run.synthesize(TARGETS), twin.synthesize(TARGETS)):
            assert values(of_run) == values(of_twin), name
        if average:
            assert average == inside, name


def _state_dict(rank: int, run_dir: str) -> Any:
    model = LAYOUTS["fsdp2"][0](3)
    optimizer = optimizer_of(model, "fsdp2")
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    updates = ema.attach(optimizer, model)
    for number in range(STEPS):
        step(model, optimizer, number)
    updates.remove()
    with ema.model(model, 0.2):
        inside = values(whole(model))
        placed = {key: (t.placements, t.shape) for key, t in model.state_dict().items() if isinstance(t, DTensor)}
    with ema.state_dict(0.2) as state:
        assert {key: (t.placements, t.shape) for key, t in state.items() if isinstance(t, DTensor)} == placed
        model.load_state_dict(state)
    loaded = values(whole(model))
    refusals = [outcome(lambda: ema.model(model, 0.2, step=3).__enter__())]
    ema.close()
    return loaded == inside and len(placed) > 3, refusals


def test_state_dict_has_the_placements_of_the_model(groups: list[Group], tmp_path: Path) -> None:
    for is_same, (refusal,) in sized_group(groups, 3)(_state_dict, str(tmp_path / "ema")):
        assert is_same
        assert "step = 3: the ranks of a sharded model have the average at the newest update only" in refusal


def _fails_inside(rank: int, run_dir: str) -> Any:
    model = LAYOUTS["fsdp2"][0](3)
    optimizer = optimizer_of(model, "fsdp2")
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    for number in range(3):
        step(model, optimizer, number)
        ema.update_(model)
    before = bits_of_parts(model)
    reader = ema._reader
    if rank == 1:
        # Fails in the middle: the other ranks have written their parts of the average by then.
        reader.swap = lambda *_: (no_memory, frozenset())
    error = outcome(lambda: ema.model(model, 0.28).__enter__())
    vars(reader).pop("swap", None)
    same = bits_of_parts(model) == before
    other = outcome(lambda: ema.model(model, 0.28 if rank else 0.1).__enter__())
    refused = outcome(lambda: ema.save_pretrained(model, run_dir, 0.28))
    average = _evaluate(ema, model)
    ema.close()
    return error, same, other, refused, len(average)


def no_memory(*_: object) -> None:
    raise MemoryError("of the average")


def test_failure_of_one_rank_is_raised_on_all(groups: list[Group], tmp_path: Path) -> None:
    results = sized_group(groups, 3)(_fails_inside, str(tmp_path / "ema"))
    for rank, (error, same, other, refused, count) in enumerate(results):
        assert error == f"MemoryError: {'' if rank == 1 else 'rank 1: '}of the average"
        assert same and count > 5
        assert "all ranks must make the same calls in the same order, with equal arguments" in other
        assert "no rank has the whole average" in refused


def _begin(rank: int, run_dir: str, what: str) -> Any:
    model: Any = LAYOUTS["fsdp2_ignoring"][0](3)
    options = dict(OPTIONS)
    if what == "option" and rank == 1:
        options["update_every"] = 5
    if what == "bad option" and rank == 2:
        options["on_error"] = "ask"
    if what == "values" and rank == 1:
        model.norm.weight.data.add_(1)
    if what == "directory" and rank == 2:
        posthoc_ema._sharded_start.PATIENCE, posthoc_ema._sharded_start.os = 0.1, NoFiles
    try:
        return [outcome(lambda: PostHocEMA.from_model(model, run_dir, **options))]
    finally:
        posthoc_ema._sharded_start.PATIENCE, posthoc_ema._sharded_start.os = 30.0, os


class NoFiles:
    """Operating system of a rank that sees another directory under the same path."""

    @staticmethod
    def listdir(_: Path) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("option", "update_every.*:1.*update_every.*:5"),
        ("bad option", "on_error = 'ask'"),
        ("values", "`norm.weight`, with different values"),
        ("directory", "does not see the file .*needs one directory that all ranks share"),
    ],
)
def test_ranks_that_disagree_all_get_the_error(groups: list[Group], tmp_path: Path, what: str, message: str) -> None:
    errors = sized_group(groups, 3)(_begin, str(tmp_path / "ema"), what)
    assert all(re.search(message, error) for (error,) in errors), errors
    assert not list(tmp_path.glob("ema/*"))


def _opens_alone(rank: int, run_dir: str) -> Any:
    store = dist.distributed_c10d._get_default_store()
    before, patience = store.timeout, posthoc_ema._ranks.PATIENCE
    store.set_timeout(datetime.timedelta(seconds=3))
    posthoc_ema._ranks.PATIENCE = 1.0

    def begin(model: Any) -> str:
        return outcome(lambda: PostHocEMA.from_model(model, f"{run_dir}-{rank}", **OPTIONS).close())

    model: Any = LAYOUTS["fsdp2_ignoring"][0](3)
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = begin(torch.nn.Linear(3, 3) if rank == 1 else model)
    store.set_timeout(before)
    posthoc_ema._ranks.PATIENCE = patience
    dist.barrier()
    # Takes part in the call that the others have given up.
    late = begin(model) if rank == 1 else ""
    return error, "".join(str(each.message) for each in caught), late


def test_rank_without_a_sharded_tensor_is_named_to_those_that_wait(groups: list[Group], tmp_path: Path) -> None:
    results = sized_group(groups, 3)(_opens_alone, str(tmp_path / "ema"))
    named = "(rank 1 opened a run alone meanwhile: no tensor of the model there is sharded; shard one on each rank"
    assert results[1][:2] == ("", "")
    for error in (results[0][0], results[2][0], results[1][2]):
        assert error.startswith("TimeoutError: ") and named in error
    assert "from_model() waits for rank" in results[0][1] and named in results[0][1]
