"""The training side of a run: updates of the averages from the model that trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import _accuracy, _native, _swap
from ._fence import CopyFence, Fenced, wait_for_copies
from ._lend import Lender
from ._lifetime import Resume, TrackerLifetime, open_tracker, state_file, stored_complex
from ._model import MappingTensors, Model, ModuleTensors, tensors_of
from ._parts import reshard
from ._profiles import Target, profile_json
from ._sharded_start import ShardedStart
from ._spectral import refresh_spectral_norms


class ModelTracker:
    """Running averages of the tensors of one model.

    Args:
        model: Model to track.
        directory: Directory of the run.
        options: Options as the native part takes them.
        only_save_diff: Track only parameters that require grad, and the batch statistics.
        leave_out: Names and globs of tensors to leave out; None if not given.
        resume: Continue the run in the directory, if there is one; or the path of the live state to continue it from.
        on_error: Effect of a storage error on an update: "raise" or "warn".
        in_parts: Track what this process holds of sharded tensors.
        start: Start of a run that all ranks track; None if this process tracks alone.
    """

    def __init__(
        self,
        model: Model,
        directory: Path,
        options: dict[str, Any],
        only_save_diff: bool,
        leave_out: Sequence[str] | None,
        *,
        resume: Resume,
        on_error: str,
        in_parts: bool = False,
        start: ShardedStart | None = None,
    ):
        self._only_save_diff = only_save_diff
        self._leave_out = tuple(leave_out or ())
        self._on_error = on_error
        self._in_parts = in_parts
        # Tensors of all captures, the newest last. Their graphs use the memory of the copies.
        self._captured: list[Lender] = []
        self._stored_complex = stored_complex(state_file(directory, resume)) if resume else frozenset()
        self.tensors = tensors_of(model, only_save_diff, (), leave_out or (), self._stored_complex, in_parts)
        """Tensors of the model that trains."""
        lender = self.tensors.lender()
        _swap.check_own_weights(lender.tensors)
        if leave_out is not None:
            options = {**options, "leave_out": self.tensors.patterns_in_use(leave_out)}
        open_native = open_tracker if start is None else start.open
        self.lifetime = TrackerLifetime(open_native(directory, lender, options, resume), directory)
        self.native: _native.Tracker = self.lifetime.native
        self.fence = CopyFence(self.native)
        """Copy of the newest update that the training has not waited for."""
        if isinstance(self.tensors, ModuleTensors):
            self.tensors.keep = frozenset(lender.names)

    def update(self, model: Model, parameters: Fenced) -> None:
        """Counts a step at which `skip` of the native tracker found something due, and updates the averages.

        Args:
            model: Model that trains.
            parameters: Tensors for whose copy the training waits before the next step of an optimizer only.
        """
        lender = self._lender(model)
        fenced = self.fence.begin(lender, parameters)
        with self._storing(6), lender.reading() as (addresses, streams):
            self.native.update(lender.layout, addresses, streams, fenced)

    def update_at(self, time: int, model: Model) -> None:
        """Updates the averages at a time of the caller's own clock, if that is due."""
        lender = self._lender(model)
        self.fence.wait()
        with self._storing(5), lender.reading() as (addresses, streams):
            self.native.update_at(time, lender.layout, addresses, streams)

    def capture_update(self, model: Model) -> None:
        """Adds an update to the CUDA graph that PyTorch's current stream is captured into."""
        lender = self._lender(model)
        if len(lender.streams) != 1:
            raise ValueError(
                "an update in a CUDA graph needs a model on one GPU, averages beside it (`device='cuda'`), and a build "
                "of the package with CUDA"
            )
        with lender.reading() as (addresses, streams):
            self.native.capture_update(lender.layout, addresses, streams)
        self._captured = [each for each in self._captured if each is not lender] + [lender]

    def replay(self, graph: Any, time: int | None) -> None:
        """Counts a step and replays a CUDA graph, in which the averages are updated if that is due."""
        if not self._captured:
            raise RuntimeError("no CUDA graph has an update of these averages: call `capture_update_` in its capture")
        lender = self._captured[-1]
        if _swap.holding:
            _swap.check_own_weights(lender.tensors)
        with self._storing(5):
            self.native.replay(lender.streams, graph.replay, time)

    def switch(self, model: Model, target: Target) -> None:
        """Replaces the model's weights by an average at the newest update."""
        profile = profile_json(target)
        lender = self._lender(model)
        wait_for_copies()
        if lender.parts:
            reshard(model)
        with lender.writing() as (addresses, streams):
            self.native.switch_to(profile, lender.layout, addresses, streams)
        # A backward pass through results of the old weights must fail instead of being wrong.
        _swap.mark_changed(lender.all_tensors())
        if isinstance(self.tensors, ModuleTensors):
            refresh_spectral_norms(model)
        _accuracy.warn()

    @property
    def step(self) -> int:
        """Steps counted so far."""
        return self.native.step if self.lifetime.closed_at is None else self.lifetime.closed_at

    @contextmanager
    def _storing(self, caller: int) -> Iterator[None]:
        """Applies `on_error` to a storage error; the update itself is complete by then.

        Args:
            caller: Level of the stack at which the caller of `PostHocEMA` is.
        """
        try:
            yield
        except OSError as error:
            if self._on_error == "raise":
                raise
            text = f"a snapshot was not stored, and training continues: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=caller)

    def _lender(self, model: Model) -> Lender:
        """Lends the tensors of the model that trains, and keeps them listed."""
        self.tensors = self.tensors_of(model)
        lender = self.tensors.lender()
        _swap.check_own_weights(lender.tensors)
        return lender

    def tensors_of(self, model: Model) -> ModuleTensors | MappingTensors:
        """Returns the tensors of a model; only another object than last time is listed again."""
        if self.tensors.model is model:
            return self.tensors
        keep = self.tensors.keep if isinstance(self.tensors, ModuleTensors) else ()
        return tensors_of(model, self._only_save_diff, keep, self._leave_out, self._stored_complex, self._in_parts)
