"""Swaps an average into a model for a while, and gives the model its own state back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from . import _native
from ._fence import wait_for_copies
from ._lend import Lender, address, is_torch, torch_module
from ._model import MappingTensors, ModuleTensors
from ._module_state import ModuleState, Problems, TensorStates, attempt, restore_contents
from ._parts import reshard
from ._spectral import refresh_spectral_norms

Swap = Callable[[_native.SavedWeights, _native.Layout, list[int], dict[int, int]], None]
"""Writes an average to tensors at addresses, on streams, and moves their old elements into the first argument."""

holding: dict[_Block, frozenset[int]] = {}
"""Tensors that hold an average at the moment, by their marks, for each open block in the order of their beginning."""

_entering = threading.RLock()


def check_own_weights(tensors: Iterable[Any]) -> None:
    """Refuses tensors that hold an average: averages of averages would spoil a run.

    Raises:
        RuntimeError: If the model is inside a block of `PostHocEMA.model`.
    """
    if holding and not marks_of(tensors).isdisjoint(frozenset().union(*list(holding.values()))):
        raise RuntimeError(
            "the model holds an average at the moment, and averages of averages would spoil the run: "
            "leave the `with` block of `PostHocEMA.model` first"
        )


def marks_of(tensors: Iterable[Any]) -> frozenset[int]:
    """Returns what tensors are known by: the address of their elements, if there are any, and their identity.

    A tensor that the block moves keeps its identity, and another tensor of the same elements has their address.
    """
    tensors = list(tensors)
    return frozenset(map(address, tensors)) - {0} | frozenset(map(id, tensors))


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
    forget_casts()
    increment = getattr(getattr(getattr(torch, "autograd", None), "graph", None), "increment_version", None)
    for tensor in tensors:
        if increment is not None and is_torch(tensor) and not tensor.is_inference():
            increment(tensor)


class _Block:
    """Block in which a model holds an average."""

    def __init__(self, tensors: ModuleTensors | MappingTensors):
        self._lender: Lender = tensors.lender()
        self._model: Any = tensors.model
        self._is_module = isinstance(tensors, ModuleTensors)
        self._module: ModuleState | None = None
        self._contents: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._tensors: TensorStates | None = None
        self._versions = _VersionCounters(())
        self._originals = _native.SavedWeights()
        self._marks = marks_of([*self._lender.tensors, *self._lender.originals])
        self._owner = _owner()
        self._left_before: list[_Block] = []
        self._is_restored = False

    def enter(self, swap: Swap, written: frozenset[str]) -> None:
        """Puts an average into the model.

        Args:
            swap: Function that writes the average.
            written: Names of the tensors that it writes.

        Raises:
            RuntimeError: If another thread is inside a block of the same tensors.
        """
        with _entering:
            for other, marks in holding.items():
                if other._owner != self._owner and not marks.isdisjoint(self._marks):
                    raise RuntimeError(
                        "another thread or task has put an average into this model, and evaluates it: wait until that "
                        "`with` block of `PostHocEMA.model` has ended, or give each thread a copy of the model"
                    )
            holding[self] = self._marks
        # Only now: the state that another thread's block leaves behind is not the model's own.
        if self._lender.parts:
            reshard(self._model)
        self._record(written)
        # An interrupt between any two lines finds either the originals filled or nothing written.
        wait_for_copies()
        with self._lender.writing() as (lent, streams):
            swap(self._originals, self._lender.layout, lent, streams)
        self._versions.mark_changed()
        if self._tensors is not None:
            self._tensors.begin()
        if self._module is not None:
            self._module.begin()
            self._model.eval()
            refresh_spectral_norms(self._model)

    def _record(self, written: frozenset[str]) -> None:
        """Records the state that the end of the block gives back."""
        changing = self._lender.all_tensors(written)
        of_torch = [tensor for tensor in self._lender.originals if is_torch(tensor)]
        if self._is_module:
            self._module = ModuleState(self._model, changing)
        elif of_torch:
            self._tensors = TensorStates(of_torch)
        if isinstance(self._model, dict):
            self._contents = [(self._model, dict(self._model))]
        self._versions = _VersionCounters(changing)

    def leave(self) -> None:
        """Gives the model its own state back; may be called again after an interrupt.

        If a block that began later still holds the same tensors, it is done when that one ends.

        Raises:
            RuntimeError: If something could not be restored. The message names it.
        """
        problems: Problems = []
        with _entering:
            later = list(holding)
            later = later[later.index(self) + 1 :] if self in holding else []
            inner = next((block for block in later if not holding[block].isdisjoint(self._marks)), None)
            if inner is None:
                self._restore_all(problems)
            elif self not in inner._left_before:
                inner._left_before.append(self)
        if problems:
            raise RuntimeError("the model could not be given back as it was: " + "; ".join(dict.fromkeys(problems)))

    def _restore_all(self, problems: Problems) -> None:
        """Restores the model, and what blocks that began and were left earlier have to restore."""
        if self in holding and not self._is_restored:
            self._restore(problems)
            self._is_restored = True
        while self._left_before:
            self._left_before[-1]._restore_all(problems)
            self._left_before.pop()
        holding.pop(self, None)

    def _restore(self, problems: Problems) -> None:
        if self._lender.parts:
            # The next pass must not read the averages that FSDP has put together in the block.
            attempt(problems, "the shards of the parameters", reshard, self._model)
        restore_contents(self._contents)
        if self._tensors is not None:
            self._tensors.restore(problems)
        if self._module is not None:
            self._module.restore(problems)
        if self._originals.filled:
            attempt(problems, "the elements of the run's tensors", self._write_originals)
            self._versions.restore()
            forget_casts()

    def _write_originals(self) -> None:
        self._lender.check_storages()
        with self._lender.writing() as (addresses, streams):
            self._originals.restore(self._lender.layout, addresses, streams)


def _owner() -> tuple[int, Any]:
    """Returns the thread and the task of asyncio that run this code."""
    asyncio = sys.modules.get("asyncio")
    try:
        task = asyncio.current_task() if asyncio is not None else None
    except RuntimeError:
        task = None
    return threading.get_ident(), task


def forget_casts() -> None:
    """Clears the converted weights that autocast keeps, which are not those that a model holds now."""
    clear = getattr(torch_module(), "clear_autocast_cache", None)
    if clear is not None:
        clear()


@contextmanager
def swapped_in(tensors: ModuleTensors | MappingTensors, swap: Swap, written: frozenset[str]) -> Iterator[None]:
    """Swaps an average into a model for a block; every bit, flag and device is restored when it ends or raises.

    Args:
        tensors: Tensors of the model.
        swap: Function that writes the average.
        written: Names of the tensors that it writes.
    """
    block = _Block(tensors)
    try:
        block.enter(swap, written)
        yield
    finally:
        _uninterrupted(block.leave)


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
