"""Parts of the integrations with trainers: opening the run of a training, and evaluating with an average."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._lifetime import STATE
from .._parts import is_sharded
from .._profiles import Target
from .._ranks import on_all_ranks
from ..posthoc_ema import PostHocEMA

STATE_FILE = "posthoc-ema.safetensors"
"""File in a trainer's checkpoint folder that holds the live state of the averages."""


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options for `PostHocEMA.from_model`.

    Raises:
        ValueError: If they contain `resume`.
    """
    if "resume" in options:
        raise ValueError(
            "resume: the averages resume when the trainer does, from the state in its checkpoint: leave the option out"
        )
    return options


def saved_state(folder: str | os.PathLike[str]) -> Path | None:
    """Returns a checkpoint's folder if it holds the live state of the averages, else None."""
    path = Path(folder)
    has_state = (path / STATE_FILE).is_file() or any(path.glob("posthoc-ema-part-*.safetensors"))
    return path if has_state else None


def open_run(
    model: Any,
    directory: str | os.PathLike[str],
    options: dict[str, Any],
    *,
    state: Path | bool | None,
    trained: int,
    begin_late: bool,
) -> PostHocEMA:
    """Begins the run of a training, or resumes it from the state in the trainer's checkpoint.

    All ranks track a sharded model, and rank 0 any other.

    Args:
        model: Model that trains.
        directory: Directory of the run.
        options: Options of `PostHocEMA.from_model`.
        state: File or folder with the live state, if there is one; True for that of the run itself.
        trained: Steps that the trainer has taken before.
        begin_late: Begin a run although the trainer has taken steps.

    Raises:
        ValueError: If the trainer resumes without a state, and the run may not begin late.
    """

    def check() -> None:
        if state is not None or trained == 0 or begin_late:
            return
        remedy = "continue from a checkpoint that has one" if (Path(directory) / STATE).exists() else "pass begin_late"
        raise ValueError(
            f"the training continues from step {trained}, from a checkpoint without the state of the averages in "
            f"{directory}: {remedy}; with begin_late=True a new run begins here and counts from 0"
        )

    on_all_ranks("on_train_begin", check)
    options = {"rank_zero_only": not is_sharded(model), **options}
    if state is not None:
        options["resume"] = state
    return PostHocEMA.from_model(model, directory, **options)


@contextmanager
def average_in(ema: PostHocEMA, model: Any, target: Target, saver: Any, method: str) -> Iterator[None]:
    """Puts an average into a model for an evaluation; a checkpoint that is saved meanwhile has the model's own weights.

    Args:
        ema: Averages.
        model: Model that trains.
        target: Length of the average, or any profile.
        saver: Object that saves checkpoints.
        method: Name of its method that does.
    """
    block = ema.model(model, target)
    original = getattr(saver, method)
    own = vars(saver).get(method)

    def save(*args: Any, **kwargs: Any) -> Any:
        nonlocal block
        block.__exit__(None, None, None)
        try:
            return original(*args, **kwargs)
        finally:
            block = ema.model(model, target)
            block.__enter__()

    block.__enter__()
    setattr(saver, method, save)
    try:
        yield
    finally:
        if own is None:
            delattr(saver, method)
        else:
            setattr(saver, method, own)
        block.__exit__(None, None, None)
