"""Parts of sharded tensors, as each process finds them without asking another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from process_group import Group, sized_group
from sharded_models import LAYOUTS, optimizer_of, step, whole
from torch.distributed.tensor.debug import CommDebugMode

from posthoc_ema._model import tensors_of


def _parts(rank: int, names: list[str], size: int) -> Any:
    """Returns the parts of models in several layouts after two steps, with the whole tensors of the first process."""
    found = {}
    for name in names:
        model = LAYOUTS[name][0](size)
        optimizer = optimizer_of(model, name)
        tensors = tensors_of(model, in_parts=True)
        for number in range(2):
            step(model, optimizer, number)
            with CommDebugMode() as communicated:
                lender = tensors.lender()
            assert communicated.get_total_counts() == 0
        held = {}
        for key, tensor in zip(lender.names, lender.tensors):
            part = lender.parts.get(key)
            shape, offset, is_replica = (tensor.shape, (0,) * tensor.ndim, rank > 0) if part is None else part[1:4]
            held[key] = (tuple(shape), tuple(offset), is_replica, tensor.detach().numpy().copy())
        expected = {key: tensor.numpy() for key, tensor in whole(model).items()}
        found[name] = (held, expected if rank == 0 else {})
    return found


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


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_parts_tile_their_tensors(groups: list[Group], size: int) -> None:
    names = [name for name, (_, sizes) in LAYOUTS.items() if size in sizes]
    results = sized_group(groups, size)(_parts, names, size)
    for name in names:
        of_ranks = [result[name][0] for result in results]
        check_tiling(name, of_ranks, results[0][name][1])
