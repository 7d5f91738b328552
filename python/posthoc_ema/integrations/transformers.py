"""Callback for the Trainer of transformers, and for those of TRL, which derive from it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from .._attach import Attachment
from .._parts import is_sharded
from .._profiles import Target
from ..posthoc_ema import PostHocEMA
from ._trainer_run import average_in, check_options, open_run, saved_state

__all__ = ["PostHocEMACallback"]


class PostHocEMACallback(TrainerCallback):  # type: ignore[misc]
    """Tracks averages of the model that trains, by optimizer steps.

    Each folder `checkpoint-N` holds the model's own weights, and the live state of the averages, from which
    `trainer.train(resume_from_checkpoint=...)` continues with the same bits. After the training, `ema` synthesizes from
    the run.

    Args:
        directory: Directory of the run.
        evaluate_with: Length of the average, or any profile, with which the evaluations of a training are made; None
            for the model's own weights. An evaluation before the first update has those, too.
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
        begin_late: bool = False,
        **options: Any,
    ):
        self.directory = Path(directory)
        self.evaluate_with = evaluate_with
        self._begin_late = begin_late
        self._options = check_options(options)
        self._updates: Attachment | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins or resumes the run."""
        trainer, resumed_from = _calling_trainer()
        # A training that failed has left it open.
        self._close(trainer)
        model = kwargs["model"]
        folder = resumed_from or os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        trained = state.global_step if args.process_index == 0 or is_sharded(model) else 0
        ema = open_run(
            model,
            self.directory,
            self._options,
            state=saved_state(folder) if trained > 0 else None,
            trained=trained,
            begin_late=self._begin_late,
        )
        if trainer.accelerator.scaler is None and not self._begin_late:
            ema.check_step(state.global_step)
        try:
            self._updates = ema.attach(kwargs["optimizer"], model)
        except TypeError:
            # DeepSpeed's optimizers call no hooks: each of the trainer's steps counts.
            self._updates = None
        if self.evaluate_with is not None:
            trainer.evaluate = partial(self._evaluate, trainer, trainer.evaluate)
        self.ema = ema

    def _evaluate(self, trainer: Any, evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluates the trainer's model with the average in it."""
        assert self.ema is not None and self.evaluate_with is not None
        if not self.ema.has_average:
            return evaluate(*args, **kwargs)
        with average_in(self.ema, trainer.model, self.evaluate_with, trainer, "save_model"):
            return evaluate(*args, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the step, if no hook of the optimizer does."""
        if self._updates is None:
            assert self.ema is not None
            self.ema.update_(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stores the live state in the checkpoint's folder."""
        assert self.ema is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.ema._is_sharded:
            # Rank 0 may not have come to it yet.
            folder.mkdir(parents=True, exist_ok=True)
        if self.ema._tracker is not None and not folder.is_dir():
            raise FileNotFoundError(f"{folder}: the trainer has saved no checkpoint there to store the averages in")
        self.ema.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stores the newest update, and releases the run."""
        assert self.ema is not None
        self.ema.finish()
        self._close(_calling_trainer()[0])

    def _close(self, trainer: Any) -> None:
        """Ends the updates and the evaluations with the average, and releases the run."""
        vars(trainer).pop("evaluate", None)
        if self._updates is not None:
            self._updates.remove()
        if self.ema is not None:
            self.ema.close()


def _calling_trainer() -> tuple[Any, str | None]:
    """Returns the trainer that calls a callback, and the checkpoint that it resumes from.

    A callback is not given its trainer, but only a method of the trainer calls it.
    """
    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("PostHocEMACallback: only a Trainer of transformers can call it")
