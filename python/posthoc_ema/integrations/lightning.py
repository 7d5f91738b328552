"""Callback for Lightning's Trainer, of `lightning.pytorch` and `pytorch_lightning` alike."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .._parts import is_sharded
from .._profiles import Target
from ..posthoc_ema import PostHocEMA
from ._trainer_run import STATE_FILE, average_in, check_options, open_run

__all__ = ["PostHocEMACallback"]


def _callback_classes() -> tuple[type, ...]:
    """Returns the class `Callback` of each package that is in use; else of the first that is installed."""
    packages = ("lightning", "pytorch_lightning")
    used = [package for package in packages if package in sys.modules]
    chosen = used or [package for package in packages if importlib.util.find_spec(package) is not None][:1]
    if not chosen:
        raise ModuleNotFoundError("neither lightning nor pytorch_lightning is installed: pip install lightning")
    modules = ["lightning.pytorch" if package == "lightning" else package for package in chosen]
    return tuple(importlib.import_module(module).Callback for module in modules)


_Callbacks: Any = _callback_classes()


class PostHocEMACallback(*_Callbacks):  # type: ignore[misc]
    """Tracks averages of the module that trains, by optimizer steps.

    Each checkpoint of Lightning holds the module's own weights, and the live state of the averages, from which
    `fit(ckpt_path=...)` continues with the same bits. After the training, `ema` synthesizes from the run.

    Args:
        directory: Directory of the run.
        evaluate_with: Length of the average, or any profile, with which the validations of a training are made; None
            for the module's own weights. A validation before the first update has those, too.
        optimizer: Index of the optimizer whose steps count, if there are several.
        begin_late: Begin a new run if the training continues from a checkpoint without averages.
        options: Options of `PostHocEMA.from_model`, such as `sigma_rels`.
    """

    ema: PostHocEMA | None = None
    """Averages; None before the training."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        evaluate_with: Target | None = None,
        optimizer: int | None = None,
        begin_late: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.directory = Path(directory)
        self.evaluate_with = evaluate_with
        self._optimizer = optimizer
        self._begin_late = begin_late
        self._options = check_options(options)
        # State in the checkpoint that was loaded, or at the end of the last training.
        self._state: dict[str, Any] = {}
        self._updates = ExitStack()
        self._evaluation = ExitStack()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins or resumes the run."""
        if trainer.fast_dev_run:
            return
        optimizer = self._chosen(trainer.optimizers)
        trained = trainer.global_step
        loaded = self._state if trained > 0 else {}
        tracks = trainer.is_global_zero or is_sharded(pl_module)
        with _file_of(loaded.get("state") if tracks else None, self.directory) as state:
            ema = open_run(
                pl_module,
                self.directory,
                self._options,
                state=True if loaded.get("is_in_run") else state,
                trained=trained if tracks else 0,
                begin_late=self._begin_late,
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if len(trainer.optimizers) == 1 and scaler is None and not self._begin_late:
            ema.check_step(trained)
        self._updates.enter_context(ema.attach(optimizer, pl_module))
        self.ema = ema
        self._state = {}

    def _chosen(self, optimizers: list[Any]) -> Any:
        if self._optimizer is None and len(optimizers) != 1:
            names = ", ".join(f"{i}: {type(each).__name__}" for i, each in enumerate(optimizers))
            raise ValueError(
                f"the module has {len(optimizers)} optimizers ({names}): name the one whose steps count, with "
                f"PostHocEMACallback(..., optimizer=0)"
            )
        return optimizers[self._optimizer or 0]

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts the average into the module."""
        ema = self._open()
        if ema is None or self.evaluate_with is None or trainer.state.fn != "fit":
            return
        if ema.has_average:
            average = average_in(ema, pl_module, self.evaluate_with, trainer, "save_checkpoint")
            self._evaluation.enter_context(average)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Gives the module its own weights back."""
        self._evaluation.close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stores the newest update."""
        ema = self._open()
        if ema is not None:
            ema.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Gives the module its own weights back, and releases the run with the state for `save_on_exception`."""
        self._evaluation.close()
        try:
            self._close()
        except (OSError, RuntimeError) as error:
            # The error of the training must reach the caller, not one of the disk.
            warnings.warn(f"{self.directory}: the state of the averages was not stored: {error}", stacklevel=2)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Releases the run; checkpoints that are saved later have its last state."""
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Returns the live state of the averages, as bytes in a tensor that is mapped from a file.

        That of a sharded model stays in the run, as its newest state.
        """
        ema = self._open()
        if ema is None:
            return self._state
        if ema._is_sharded:
            ema.save()
            return {"step": ema.step, "state": None, "is_in_run": True}
        if ema._tracker is None:
            return {"step": ema.step, "state": None}
        with _temporary_file(self.directory) as path:
            ema.save(path)
            # The mapping keeps the file's content after its removal.
            content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        return {"step": ema.step, "state": content}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state of a checkpoint until the training starts."""
        self._state = state_dict

    def _open(self) -> PostHocEMA | None:
        """Returns the averages while they track."""
        return self.ema if self.ema is not None and not self.ema._is_closed else None

    def _close(self) -> None:
        self._updates.close()
        ema = self._open()
        if ema is None:
            return
        try:
            # Closing stores the state in the run, without a wait for ranks that may have failed.
            is_in_run = {"step": ema.step, "state": None, "is_in_run": True}
            self._state = is_in_run if ema._is_sharded else self.state_dict()
        finally:
            ema.close()


@contextmanager
def _temporary_file(directory: Path) -> Iterator[Path]:
    """Returns the path of a file beside a run's directory, which is removed after the block."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".posthoc-ema-", dir=directory.parent) as folder:
        yield Path(folder) / STATE_FILE


@contextmanager
def _file_of(content: torch.Tensor | None, directory: Path) -> Iterator[Path | None]:
    """Writes bytes to a temporary file for a block."""
    if content is None:
        yield None
        return
    with _temporary_file(directory) as path:
        content.numpy().tofile(path)
        yield path
