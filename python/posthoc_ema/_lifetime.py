"""Opening, storing and closing a run that is tracked."""

from __future__ import annotations

import json
import math
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from . import _native
from ._dtypes import DTYPES
from ._launch import distributed
from ._lend import Lender

STATE = "state.safetensors"
"""File of a run that holds the live state."""

SAVED_STATE = "posthoc-ema.safetensors"
"""File of a live state that is saved into a folder."""

Resume: TypeAlias = bool | str | os.PathLike[str] | None
"""Whether to continue a run, or the path of the live state to continue it from. None is False."""


_LONGEST_HEADER = 100_000_000
"""Bytes of the longest header of a safetensors file."""


class StepCounter:
    """Counts steps in the place of updates, on a process that does not track.

    Args:
        steps: Steps counted so far.
        last_update: Step of the newest update so far.
        schedule: Intervals of the run under their names; without them no update is known.
    """

    def __init__(self, steps: int = 0, last_update: int | None = None, schedule: Mapping[str, Any] | None = None):
        given = schedule or {}
        self.steps = steps
        # Step of the newest update by the schedule, and the number of updates since the counter was made.
        self._last_update = last_update
        self.updates = 0
        # Returns True if there was an update. Without it the schedule decides.
        self.is_begun: Callable[[], bool] | None = None
        # Each snapshot at another time than these is also at a multiple of `update_every`.
        self._intervals = [given[name] for name in ("update_every", "checkpoint_every") if given.get(name)]
        self._first = given.get("update_after_step", 0)
        self._next_update = self._multiple_after(steps)

    def __call__(self) -> bool:
        self.steps += 1
        if self.steps >= self._next_update:
            self._note_update()
            self._next_update = self._multiple_after(self.steps)
        return True

    def count_to(self, time: int) -> None:
        """Counts up to a time."""
        is_due = self.is_due(time)
        self.steps = time
        if is_due:
            self._note_update()
        self._next_update = self._multiple_after(time)

    @property
    def last_update(self) -> int | None:
        """Step of the newest update by the schedule; None if rank 0 has left out all so far."""
        is_begun = self._last_update is not None and (self.is_begun is None or self.is_begun())
        return self._last_update if is_begun else None

    def _note_update(self) -> None:
        self._last_update = self.steps
        self.updates += 1

    def is_due(self, time: int) -> bool:
        """Returns True if the process that tracks updates at a time."""
        return time >= self._first and any(time // every > self.steps // every for every in self._intervals)

    def _multiple_after(self, time: int) -> float:
        """Returns the first time of an update after a time, if each step is counted."""
        last = max(time, self._first - 1)
        return min(((last // every + 1) * every for every in self._intervals), default=math.inf)


def refuse_update(directory: Path) -> bool:
    """Raises the error of an update of a run that was opened by path."""
    raise RuntimeError(
        f"{directory} was opened to synthesize from: to continue training, open it with "
        f"PostHocEMA.from_model(model, {str(directory)!r}, resume=True)"
    )


def check_old_checkpoints(directory: Path, problem: str) -> None:
    """Checks that a directory holds no checkpoints of another tool.

    Args:
        directory: Directory to check; it may be missing.
        problem: Start of the error after the directory, such as "already contains checkpoints".

    Raises:
        ValueError: If it holds such checkpoints.
    """
    old = next(directory.glob("*.*.pt"), None) if directory.is_dir() else None
    if old is not None and old.stem.replace(".", "").isdigit():
        raise ValueError(
            f"{directory} {problem} ({old.name}), which pytorch-posthoc-ema or ema-pytorch wrote: import them with "
            f"`posthoc_ema.import_run` (or `posthoc-ema import`), and use another directory for new ones"
        )


def _state(resume: Resume) -> str | os.PathLike[str] | None:
    """Returns the path of the live state to continue from, if one is given.

    Raises:
        TypeError: If `resume` is neither a truth value nor a path.
        ValueError: If it is an empty path.
    """
    if resume is None or isinstance(resume, bool):
        return None
    if not os.fspath(resume):
        raise ValueError("resume = '': must be True, False, or the path of a state that `save` wrote")
    return resume


def step_counter(directory: Path, resume: Resume, schedule: Mapping[str, Any]) -> StepCounter:
    """Returns a counter that begins at the step that a training continues from."""
    if distributed() is not None:
        # Rank 0 sends its step: the files may be on its machine only.
        return StepCounter(schedule=schedule)
    state = _state(resume)
    if state is not None:
        return StepCounter(_native.state_step(state), schedule=schedule)
    return StepCounter((_native.saved_step(directory) or 0) if resume else 0, schedule=schedule)


def state_file(directory: Path, resume: Resume) -> Path:
    """Returns the file of the live state that a training continues from; it may be missing."""
    state = _state(resume)
    if state is None:
        return directory / STATE
    path = Path(state)
    files = [path / SAVED_STATE, path / STATE] if path.is_dir() else [path]
    return next(filter(Path.exists, files), files[0])


def begins(directory: Path, resume: Resume) -> bool:
    """Returns True if opening the run begins a new one.

    Raises:
        TypeError: If `resume` is neither a truth value nor a path.
        ValueError: If it is an empty path.
    """
    has_state = (directory / STATE).exists() or any(directory.glob("state-*-part-*.safetensors"))
    return _state(resume) is None and not (resume and has_state)


def open_tracker(directory: Path, lender: Lender, options: dict[str, Any], resume: Resume) -> _native.Tracker:
    """Opens a run for the tensors of a model, which become the first averages of a new one.

    Raises:
        ValueError: If the directory holds a run that may not or cannot be resumed.
        RuntimeError: If a tracker is writing the run that is to be resumed.
    """
    try:
        with lender.reading() as (addresses, streams):
            lent = (lender.layout, addresses, streams, _state(resume))
            return _native.Tracker.open(str(directory), "either" if resume else "create", json.dumps(options), *lent)
    except FileExistsError as error:
        remedy = f"there is no {STATE} to resume from" if resume else "continue it with `resume=True`"
        raise ValueError(
            f"{directory} already contains checkpoints: {remedy}, read them with `PostHocEMA.from_path`, "
            f"or choose another directory"
        ) from error
    except BlockingIOError as error:
        if resume:
            raise RuntimeError(str(error)) from None
        raise ValueError(
            f"{directory} already contains checkpoints, or will: this process is writing them: call `close()` of the "
            f"object that does and continue with `resume=True`, or choose another directory"
        ) from error


def stored_complex(state: Path) -> frozenset[str]:
    """Returns the names of the tensors that a live state holds as complex numbers, as older versions stored them."""
    if not state.is_file():
        return frozenset()
    with state.open("rb") as file:
        try:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))
            entries = [(name, entry.get("dtype")) for name, entry in header.items()]
        except (ValueError, AttributeError, OverflowError, MemoryError):
            # The native part names what is damaged.
            return frozenset()
    return frozenset(name.removeprefix("copied.") for name, dtype in entries if dtype == DTYPES["complex64"])


class TrackerLifetime:
    """Stores and closes a native tracker, at the latest when nothing refers to it any more or the interpreter ends.

    Args:
        native: Tracker.
        directory: Directory of its run.
    """

    def __init__(self, native: _native.Tracker, directory: Path):
        self.native = native
        self.closed_at: int | None = None
        """Step at which the tracker was closed; None while it is open."""
        self._directory = directory
        self._finalizer = weakref.finalize(self, _end, native, directory, os.getpid())

    def flush(self) -> None:
        """Waits until every snapshot is on disk; does nothing once closed."""
        if self.closed_at is None:
            self.native.flush()

    def close(self) -> None:
        """Waits for the snapshots, stores the live state, and releases the run; does nothing once closed.

        A state that cannot be stored is a warning.
        """
        if self.closed_at is not None:
            return
        self.closed_at = self.native.step
        self._finalizer.detach()
        try:
            try:
                self.native.flush()
            finally:
                _store_state(self.native, self._directory)
        finally:
            self.native.close()

    def leave(self, failed: bool) -> None:
        """Ends a `with` block: finishes and closes the run, or only closes it if the block failed."""
        if failed:
            # The error of the block must reach the caller, not one of the disk or of the averages.
            try:
                self.close()
            except (OSError, RuntimeError) as error:
                warnings.warn(f"a snapshot was not stored, or an update left out: {error}", stacklevel=3)
            return
        try:
            self.native.finish()
        finally:
            self.close()


def _end(native: _native.Tracker, directory: Path, process: int) -> None:
    """Waits for snapshots that are being written, and stores the live state.

    A forked child has neither the writing thread nor anything to write. A run whose directory was removed is not
    missed.
    """
    if os.getpid() != process or not directory.is_dir():
        return
    try:
        native.flush()
    except (OSError, RuntimeError) as error:
        if directory.is_dir():
            reason = f"a snapshot was not stored, or an update left out: {error}"
            warnings.warn(reason, RuntimeWarning, stacklevel=2)
    _store_state(native, directory)


def _store_state(native: _native.Tracker, directory: Path) -> None:
    """Stores the live state unless it is on disk, so that a resume loses nothing. Warns if that fails."""
    if not directory.is_dir() or native.is_saved():
        return
    try:
        native.save()
    except (OSError, RuntimeError) as error:
        if directory.is_dir():
            # An update that was left out is an error after the state was stored.
            lost = "" if native.is_saved() else ", and its live state could not be stored"
            warnings.warn(
                f"{directory}: the run ends at step {native.step}{lost}: {error}", RuntimeWarning, stacklevel=3
            )
