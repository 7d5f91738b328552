"""Swaps an average into a model for a while, and gives the model its own state back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from . import _native
from ._lend import Lender, address, is_torch, torch_module
from ._model import MappingTensors, ModuleTensors

Swap = Callable[[_native.SavedWeights, _native.Layout, list[int], int], None]
"""Writes an average to tensors at addresses, on a stream, and moves their old elements into the first argument."""

holding: dict[object, frozenset[int]] = {}
"""Addresses of the tensors that hold an average at the moment, for each open block."""


def check_own_weights(tensors: Iterable[Any]) -> None:
    """Refuses tensors that hold an average: averages of averages would spoil a run.

    Raises:
        RuntimeError: If the model is inside a block of `PostHocEMA.model`.
    """
    if holding and not addresses_of(tensors).isdisjoint(frozenset().union(*holding.values())):
        raise RuntimeError(
            "the model holds an average at the moment, and averages of averages would spoil the run: "
            "leave the `with` block of `PostHocEMA.model` first"
        )


def addresses_of(tensors: Iterable[Any]) -> frozenset[int]:
    """Returns the addresses of tensors, without the 0 of those that have no elements."""
    return frozenset(map(address, tensors)) - {0}


class _ModuleState:
    """State of a module besides its elements: parts, training flags, places of tensors, gradients."""

    def __init__(self, module: Any):
        parts = list(module.modules())
        self._flags = [(part, part.training) for part in parts]
        dictionaries = [d for part in parts for d in (part._parameters, part._buffers, part._modules)]
        self._contents = [(dictionary, dict(dictionary)) for dictionary in dictionaries]
        own = [t for part in parts for d in (part._parameters, part._buffers) for t in d.values() if t is not None]
        # `data` is a second handle that keeps the elements in place if the block moves the model.
        placed = [tensor for tensor in own if tensor.layout is torch_module().strided]  # type: ignore[union-attr]
        leaves = [tensor for tensor in placed if tensor.is_leaf]
        gradients = [tensor.grad for tensor in leaves]
        self._leaves = [(tensor, tensor.requires_grad, grad) for tensor, grad in zip(leaves, gradients)]
        self._places = [(t, t.data) for t in [*placed, *(grad for grad in gradients if grad is not None)]]

    def restore(self) -> None:
        """Undoes `to`, `half`, `eval`, `train`, replaced parts and similar changes, but not those of elements."""
        for part, training in self._flags:
            part.training = training
        for dictionary, contents in self._contents:
            same = list(dictionary) == list(contents)
            if not (same and all(map(operator.is_, dictionary.values(), contents.values()))):
                dictionary.clear()
                dictionary.update(contents)
        for tensor, data in self._places:
            _restore_data(tensor, data)
        for tensor, requires_grad, grad in self._leaves:
            tensor.requires_grad_(requires_grad)
            # A gradient computed in the block does not belong to the training.
            tensor.grad = grad


def _restore_data(tensor: Any, data: Any) -> None:
    """Points a tensor to its old elements again, unless it still does."""
    same = tensor.device == data.device and tensor.dtype == data.dtype and tensor.stride() == data.stride()
    if not same or tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
        tensor.data = data


class _VersionCounters:
    """Autograd's version counters of tensors.

    Results from before the block stay valid after it. A backward pass after the block through results of the block
    fails.
    """

    def __init__(self, tensors: Iterable[Any]):
        torch = torch_module()
        preserve = getattr(getattr(torch, "autograd", None), "_unsafe_preserve_version_counter", None)
        tracked = [tensor for tensor in tensors if is_torch(tensor) and not tensor.is_inference()]
        self._preserved = [(tensor, preserve(tensor)) for tensor in tracked] if preserve is not None else []

    def mark_changed(self) -> None:
        """Counts a change of every tensor."""
        mark_changed(tensor for tensor, _ in self._preserved)

    def restore(self) -> None:
        """Sets the counters to their values before the block."""
        for _, preserved in self._preserved:
            preserved.__exit__()


def mark_changed(tensors: Iterable[Any]) -> None:
    """Informs autograd that tensors have changed."""
    torch = torch_module()
    increment = getattr(getattr(getattr(torch, "autograd", None), "graph", None), "increment_version", None)
    for tensor in tensors:
        if increment is not None and is_torch(tensor) and not tensor.is_inference():
            increment(tensor)


@contextmanager
def swapped_in(tensors: ModuleTensors | MappingTensors, swap: Swap) -> Iterator[None]:
    """Swaps an average into a model for a block; every bit, flag and device is restored when it ends or raises."""
    lender = tensors.lender()
    module = _ModuleState(tensors.model) if isinstance(tensors, ModuleTensors) else None
    versions = _VersionCounters(lender.tensors)
    originals = _native.SavedWeights()
    addresses = addresses_of(lender.tensors)
    block = object()
    try:
        # An interrupt between any two lines finds either the originals filled or nothing written.
        with lender.writing() as (lent, stream):
            swap(originals, lender.layout, lent, stream)
        versions.mark_changed()
        holding[block] = addresses
        if isinstance(tensors, ModuleTensors):
            tensors.model.eval()
        yield
    finally:
        _uninterrupted(lambda: _swap_out(module, lender, originals, versions, block))


def _swap_out(
    module: _ModuleState | None,
    lender: Lender,
    originals: _native.SavedWeights,
    versions: _VersionCounters,
    block: object,
) -> None:
    """Restores the model; may be called again after an interrupt."""
    if module is not None:
        module.restore()
    if originals.filled:
        with lender.writing() as (addresses, stream):
            originals.restore(lender.layout, addresses, stream)
        versions.restore()
    holding.pop(block, None)


def _uninterrupted(act: Callable[[], None]) -> None:
    """Repeats an action until no KeyboardInterrupt cuts it short, and raises the last interrupt then."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            act()
            break
        except KeyboardInterrupt as pressed:
            interrupt = pressed
    if interrupt is not None:
        raise interrupt
