"""A model that holds an average for a while: putting it in, and giving everything back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import _native
from ._lend import Lender
from ._model import MappingTensors, ModuleTensors, unwrap

Swap = Callable[[_native.Layout, list[int], int], _native.Originals]
"""Puts an average into tensors at addresses, on a stream."""

holding: dict[int, int] = {}
"""How many averages each model, by its id, holds at the moment, one upon the other."""


def check_own_weights(model: Any) -> None:
    """Refuses a model that holds an average: averaging that would spoil the run.

    Raises:
        RuntimeError: within the body of `PostHocEMA.model`.
    """
    if holding.get(id(unwrap(model))):
        raise RuntimeError(
            "the model holds an average at the moment, and averages of averages would spoil the run: "
            "leave the `with` block of `PostHocEMA.model` first"
        )


class _Module:
    """Where every tensor of a module is, and whether each part of it trains."""

    def __init__(self, module: Any):
        self._flags = [(part, part.training) for part in module.modules()]
        self._places: list[tuple[dict[str, Any], str, Any, Any]] = []
        for part in module.modules():
            for dictionary in (part._parameters, part._buffers):
                places = [(key, tensor) for key, tensor in dictionary.items() if tensor is not None]
                # A second handle to the same elements: they stay where they are when the body moves the model.
                self._places += [(dictionary, key, tensor, tensor.data) for key, tensor in places]

    def put_back(self) -> None:
        """Undoes `to`, `half`, `eval`, `train` and the like; elements are given back by others."""
        for part, training in self._flags:
            part.training = training
        for dictionary, key, tensor, data in self._places:
            if dictionary.get(key) is not tensor:
                dictionary[key] = tensor
            moved = tensor.device != data.device or tensor.dtype != data.dtype or tensor.stride() != data.stride()
            if moved or tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
                tensor.data = data


@contextmanager
def average_in(tensors: ModuleTensors | MappingTensors, swap: Swap) -> Iterator[None]:
    """Puts an average into a model; every bit, flag and device is as before when the block is left, however that is."""
    model = unwrap(tensors.model)
    lender = tensors.lender()
    before = _Module(model) if isinstance(tensors, ModuleTensors) else None
    originals = _write(lender, swap)
    holding[id(model)] = holding.get(id(model), 0) + 1
    try:
        if before is not None:
            model.eval()
        yield
    finally:
        holding[id(model)] -= 1
        if not holding[id(model)]:
            del holding[id(model)]
        if before is not None:
            before.put_back()
        _write(lender, originals.restore)


def _write(lender: Lender, act: Callable[[_native.Layout, list[int], int], Any]) -> Any:
    with lender.writing() as (addresses, stream):
        return act(lender.layout, addresses, stream)
