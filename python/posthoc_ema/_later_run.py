"""A run that is opened at the first step of a training, for classes whose constructor knows too little to open it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import _native
from ._lend import is_torch, torch_module
from ._model import Model
from ._parts import is_sharded
from .posthoc_ema import PostHocEMA

STATE_NAME = "posthoc-ema.safetensors"
"""File that `PostHocEMA.save` writes into a folder."""


class LaterRun:
    """Run of a training that may still load the state from which it continues.

    At the end of the process, or when nothing refers to this object any more, the run is finished.

    Args:
        directory: Directory of the run; None if it is set before the run is opened.
        options: Options of `PostHocEMA.from_model`. `rank_zero_only` is on by default, unless the model is sharded.
        defaults: Further defaults of a new run; one that is continued keeps its own values.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, options: Mapping[str, Any], **defaults: Any):
        self.directory = None if directory is None else Path(directory)
        self._options = dict(options)
        self._defaults = defaults
        self.ema: PostHocEMA | None = None
        """The run, once it is open."""
        self._state: Any = None
        self._finalizer: Any = None

    @property
    def state(self) -> Any:
        """State to continue from: a path, a tensor of bytes, or None; that of the newest step once the run is open.

        None on a process that leaves the tracking to another rank.

        Raises:
            ValueError: If the model is sharded: its state is in files of all ranks.
        """
        if self.ema is None:
            return self._state
        if self.ema._is_sharded:
            raise ValueError(
                "the model is sharded, so no rank has the whole state of its averages: save it with `save(folder)` on "
                "all ranks, and continue with `resume=folder`"
            )
        with tempfile.TemporaryDirectory() as folder:
            self.ema.save(folder)
            file = Path(folder, STATE_NAME)
            torch = torch_module()
            assert torch is not None
            return torch.from_numpy(np.fromfile(file, np.uint8)) if file.is_file() else None

    @state.setter
    def state(self, state: Any) -> None:
        if self.ema is not None:
            self._finalizer.detach()
            self.ema.close()
            self.ema = None
        self._state = state

    def saved_step(self) -> int:
        """Returns the step from which the option `resume` continues; 0 without it.

        Raises:
            ValueError: If the stored state is damaged.
            OSError: If it cannot be read.
        """
        assert self.directory is not None
        resume = self._options.get("resume", False)
        if isinstance(resume, bool):
            return (_native.saved_step(self.directory) or 0) if resume else 0
        return _native.state_step(resume)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the state into an existing folder, if there is one.

        Raises:
            OSError: If it cannot be written.
        """
        if self.ema is not None:
            self.ema.save(folder)
            return
        with self._state_file() as path:
            target = Path(folder, STATE_NAME)
            if path is None or (target.exists() and path.samefile(target)):
                return
            # Under its name only when it is whole.
            with tempfile.TemporaryDirectory(prefix=".posthoc-ema-", dir=folder) as beside:
                shutil.copyfile(path, Path(beside, STATE_NAME)).replace(target)

    def open(self, model: Model) -> PostHocEMA:
        """Opens the run for a model, at the state to continue from.

        Raises:
            ValueError: As for `PostHocEMA.from_model`.
            OSError: As for `PostHocEMA.from_model`.
        """
        assert self.directory is not None
        with self._state_file() as path:
            options = {"rank_zero_only": not is_sharded(model), **self._options}
            if path is not None:
                options["resume"] = path
            if not options.get("resume"):
                options = {**self._defaults, **options}
            ema = PostHocEMA.from_model(model, self.directory, **options)
        self._finalizer = weakref.finalize(self, _finish, ema, os.getpid())
        self._state = None
        self.ema = ema
        return ema

    @contextmanager
    def _state_file(self) -> Iterator[Path | None]:
        """Yields the path of the state to continue from."""
        if not is_torch(self._state):
            yield None if self._state is None else Path(self._state)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, STATE_NAME)
            self._state.cpu().numpy().tofile(path)
            yield path


def _finish(ema: PostHocEMA, process: int) -> None:
    """Stores the newest update of a run that its user has not closed."""
    tracker = ema._tracker
    if tracker is None or tracker.lifetime.closed_at is not None:
        return
    if os.getpid() != process or not ema.checkpoint_dir.is_dir():
        return
    try:
        ema.finish()
        ema.close()
    except (OSError, RuntimeError, ValueError) as error:
        warnings.warn(f"{ema.checkpoint_dir}: the newest averages were not stored: {error}", stacklevel=1)


def new_directory(name: str) -> Path:
    """Returns the path of a new directory, which has the time in its name."""
    wanted = Path("posthoc-ema", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    directory, others = wanted, 1
    while directory.exists():
        others += 1
        directory = wanted.with_name(f"{wanted.name}-{others}")
    return directory
