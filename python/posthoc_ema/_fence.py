"""Copies of tensors that a GPU makes beside the training, until the stream that changes the tensors has waited."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Container
from typing import Any
from weakref import WeakSet

from . import _native
from ._compiled import keep_out_of_graphs
from ._lend import Lender

_pending: WeakSet[CopyFence] = WeakSet()

Fenced = Callable[[], Container[int] | None]
"""Returns the identities of the tensors that do not change before the fence; None for all but buffers."""

CHANGED = "something but the optimizer has changed it since the last update, while a GPU may still be copying it"


def all_parameters() -> None:
    """Chooses all tensors but buffers, which change in each pass of a model."""


class CopyFence:
    """Copy of the newest update, and the tensors that it reads beside the training.

    The first update that could be copied beside the training is not: tensors that then change before the next step of
    an optimizer, such as clipped weights, are always waited for.

    Args:
        native: Tracker whose updates are copied.
    """

    def __init__(self, native: _native.Tracker):
        self._native = native
        self._is_needed: bool = native.needs_fence
        self._has_tried = False
        self._is_trial = False
        # Names of the tensors that change outside of the optimizer.
        self._waited_for: set[str] = set()
        self._lender: Lender | None = None
        self._fenced: list[int] = []
        self._versions: list[int] = []
        self._storages: list[Any] = []

    def begin(self, lender: Lender, choose: Fenced) -> list[bool]:
        """Begins a copy, and returns for each tensor if it is lent until the fence.

        Args:
            lender: Lends the tensors.
            choose: Chooses the tensors that change in the step of an optimizer only.
        """
        self.wait()
        parameters = choose() if self._is_needed else ()
        chosen = [
            i
            for i in lender.lent_on_devices
            if lender.names[i] not in self._waited_for
            and (i not in lender.buffers if parameters is None else id(lender.owners[i]) in parameters)
        ]
        if not chosen:
            return []
        self._is_trial = parameters is not None and not self._has_tried
        self._lender, self._fenced = lender, chosen
        # An optimizer changes the tensor that it holds, which is another one for a sharded parameter.
        self._versions = [lender.owners[i]._version for i in chosen]
        # An assignment to `data` must not free them.
        self._storages = [lender.tensors[i].untyped_storage() for i in chosen]
        _pending.add(self)
        _Steps.watch()
        fenced = [False] * len(lender.tensors)
        for i in chosen:
            fenced[i] = not self._is_trial
        return fenced

    def wait(self) -> None:
        """Makes the current stream wait for the copy, if there is one.

        Raises:
            RuntimeError: If a tensor has changed meanwhile. The message names it.
        """
        lender, self._lender = self._lender, None
        if lender is None:
            return
        _pending.discard(self)
        if not self._is_trial:
            self._native.wait_for_copy(lender.streams)
        versions = [lender.owners[i]._version for i in self._fenced]
        changed = [lender.names[i] for i, now, then in zip(self._fenced, versions, self._versions) if now != then]
        self._storages = []
        self._has_tried = True
        if not changed:
            return
        if not self._is_trial:
            raise RuntimeError(
                f"tensor `{changed[0]}`: {CHANGED}, so that the average may hold a part of both: go back to the last "
                f"state that was saved, and call `wait_for_copy` before such a change"
            )
        self._waited_for.update(changed)
        warnings.warn(
            f"tensor `{changed[0]}`{f' and {len(changed) - 1} others' if changed[1:] else ''}: something but the "
            f"optimizer changes the weights between its steps, so the training waits for each copy of them",
            RuntimeWarning,
            stacklevel=2,
        )

    def reads_any(self, parameters: Any) -> bool:
        """Returns True if the copy reads one of some tensors."""
        lender = self._lender
        ids = {id(lender.owners[i]) for i in self._fenced} if lender is not None else set()
        return any(id(parameter) in ids for parameter in parameters)


def wait_for_copies() -> None:
    """Makes the current stream wait for all copies, before the package changes tensors itself."""
    for fence in list(_pending):
        fence.wait()


class _Steps:
    """Waits before the steps of all optimizers of PyTorch, which may share tensors with the one that counts."""

    _is_watching = False

    @classmethod
    def watch(cls) -> None:
        """Begins to wait, once in a process."""
        if not cls._is_watching:
            cls._is_watching = True
            keep_out_of_graphs(cls, ("before",))
            # Only tensors of PyTorch are on a GPU, so it has been imported.
            optimizer = importlib.import_module("torch.optim.optimizer")
            optimizer.register_optimizer_step_pre_hook(cls.before)

    @staticmethod
    def before(optimizer: Any, *_: object) -> None:
        """Waits for the copies that read a parameter of an optimizer."""
        for fence in list(_pending):
            if fence.reads_any(parameter for group in optimizer.param_groups for parameter in group["params"]):
                fence.wait()
