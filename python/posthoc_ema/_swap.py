"""A model that holds an average for a while: putting it in, and giving everything back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from . import _native
from ._lend import Lender, is_torch, torch_module
from ._model import MappingTensors, ModuleTensors
from ._outputs import address

Swap = Callable[[_native.Originals, _native.Layout, list[int], int], None]
"""Puts an average into tensors at addresses, on a stream, and what they held into the first argument."""

holding: dict[object, frozenset[int]] = {}
"""The addresses of the tensors that hold an average at the moment, for each block that put one in."""


def check_own_weights(tensors: Iterable[Any]) -> None:
    """Refuses tensors that hold an average: averaging these would spoil the run.

    Raises:
        RuntimeError: within the body of `PostHocEMA.model`.
    """
    if holding and not places_of(tensors).isdisjoint(frozenset().union(*holding.values())):
        raise RuntimeError(
            "the model holds an average at the moment, and averages of averages would spoil the run: "
            "leave the `with` block of `PostHocEMA.model` first"
        )


def places_of(tensors: Iterable[Any]) -> frozenset[int]:
    """Where tensors lie; those without elements lie nowhere."""
    return frozenset(map(address, tensors)) - {0}


class _Module:
    """What a module is made of: its parts and tensors, where these lie, and what is noted beside them."""

    def __init__(self, module: Any):
        parts = list(module.modules())
        self._flags = [(part, part.training) for part in parts]
        dictionaries = [d for part in parts for d in (part._parameters, part._buffers, part._modules)]
        self._contents = [(dictionary, dict(dictionary)) for dictionary in dictionaries]
        own = [t for part in parts for d in (part._parameters, part._buffers) for t in d.values() if t is not None]
        # `data` is a second handle to the same elements: they stay where they are when the body moves the model.
        placed = [tensor for tensor in own if tensor.layout is torch_module().strided]  # type: ignore[union-attr]
        leaves = [tensor for tensor in placed if tensor.is_leaf]
        gradients = [tensor.grad for tensor in leaves]
        self._leaves = [(tensor, tensor.requires_grad, grad) for tensor, grad in zip(leaves, gradients)]
        self._places = [(t, t.data) for t in [*placed, *(grad for grad in gradients if grad is not None)]]

    def put_back(self) -> None:
        """Undoes `to`, `half`, `eval`, `train`, replaced parts and the like; elements are given back by others."""
        for part, training in self._flags:
            part.training = training
        for dictionary, contents in self._contents:
            same = list(dictionary) == list(contents)
            if not (same and all(map(operator.is_, dictionary.values(), contents.values()))):
                dictionary.clear()
                dictionary.update(contents)
        for tensor, data in self._places:
            _put_data(tensor, data)
        for tensor, requires_grad, grad in self._leaves:
            tensor.requires_grad_(requires_grad)
            # One that the body has computed is not the training's.
            tensor.grad = grad


def _put_data(tensor: Any, data: Any) -> None:
    same = tensor.device == data.device and tensor.dtype == data.dtype and tensor.stride() == data.stride()
    if not same or tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
        tensor.data = data


class _Versions:
    """Autograd's counters of changes, so that a backward pass through what was computed with other weights fails.

    What was computed before the block is as valid after it as before; what was computed within is not.
    """

    def __init__(self, tensors: Iterable[Any]):
        torch = torch_module()
        keep = getattr(getattr(torch, "autograd", None), "_unsafe_preserve_version_counter", None)
        tracked = [tensor for tensor in tensors if is_torch(tensor) and not tensor.is_inference()]
        self._kept = [(tensor, keep(tensor)) for tensor in tracked] if keep is not None else []

    def changed(self) -> None:
        increment(tensor for tensor, _ in self._kept)

    def put_back(self) -> None:
        for _, kept in self._kept:
            kept.__exit__()


def increment(tensors: Iterable[Any]) -> None:
    """Tells autograd that tensors have changed."""
    torch = torch_module()
    count = getattr(getattr(getattr(torch, "autograd", None), "graph", None), "increment_version", None)
    for tensor in tensors:
        if count is not None and is_torch(tensor) and not tensor.is_inference():
            count(tensor)


@contextmanager
def average_in(tensors: ModuleTensors | MappingTensors, swap: Swap) -> Iterator[None]:
    """Puts an average into a model; every bit, flag and device is as before when the block is left, however that is."""
    lender = tensors.lender()
    module = _Module(tensors.model) if isinstance(tensors, ModuleTensors) else None
    versions, originals, places = _Versions(lender.tensors), _native.Originals(), places_of(lender.tensors)
    block = object()
    try:
        # Whatever interrupts this, even between two lines, the originals are there or nothing has been written.
        with lender.writing() as (addresses, stream):
            swap(originals, lender.layout, addresses, stream)
        versions.changed()
        holding[block] = places
        if isinstance(tensors, ModuleTensors):
            tensors.model.eval()
        yield
    finally:
        _uninterrupted(lambda: _give_back(module, lender, originals, versions, block))


def _give_back(
    module: _Module | None, lender: Lender, originals: _native.Originals, versions: _Versions, block: object
) -> None:
    if module is not None:
        module.put_back()
    if originals.filled:
        with lender.writing() as (addresses, stream):
            originals.restore(lender.layout, addresses, stream)
        versions.put_back()
    holding.pop(block, None)


def _uninterrupted(act: Callable[[], None]) -> None:
    """Does something that may be done twice to its end, whatever keys are pressed meanwhile."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            act()
            break
        except KeyboardInterrupt as pressed:
            interrupt = pressed
    if interrupt is not None:
        raise interrupt
