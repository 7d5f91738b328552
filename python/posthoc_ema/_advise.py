"""Advice before a training: profiles to track, spacing and number of snapshots."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from . import _native
from ._dtypes import average_dtype_name
from ._options import DEFAULTS, SNAPSHOT_GROWTH
from ._plans import Predicted, check_one_movement, growth_number
from ._profiles import Profile
from ._progress import Progress, byte_progress

__all__ = ["Advice", "advise"]


@dataclass(frozen=True)
class Advice:
    """A choice of profiles, spacing and number of snapshots, and its errors over the last tenth of the training."""

    profiles: tuple[Profile, ...]
    """Profiles to track: the `profiles` of `PostHocEMA.from_model`."""
    checkpoint_every: int
    """Steps between snapshots."""
    max_checkpoints: int
    """Number of steps whose snapshots are kept."""
    relative_error: float
    """Largest relative error of a profile over the range."""
    noise_gain: float
    """Largest noise gain over the range."""
    error: float
    """Largest error of the profile and of the snapshots' rounding together, which the advice minimises."""
    sigma_rel: float
    """Length at which that error is largest."""
    disk: int
    """Largest size of the run on disk, in bytes."""
    predicted: Predicted | None = None
    """Largest predicted error over the range at the end of the training; None without `movement` or `like`."""


def advise(
    *,
    steps: int,
    parameters: int,
    disk: float,
    sigma_rels: tuple[float, float] = (0.05, 0.28),
    checkpoint_dtype: Any = "float32",
    update_every: int = DEFAULTS["update_every"],
    update_after_step: int = DEFAULTS["update_after_step"],
    snapshot_growth: float | None = SNAPSHOT_GROWTH,
    movement: str | None = None,
    like: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> list[Advice]:
    """Finds the best choices of two, three and four profiles for half, all and twice a disk, in this order.

    The error of a choice is the largest after any snapshot of the last tenth of the training, with the snapshots that
    are kept by then.

    Args:
        steps: Length of the training in steps.
        parameters: Number of averaged elements of the model.
        disk: Bytes that the run may take.
        sigma_rels: Shortest and longest length that will be asked for. Pass the range as `retention`, too.
        checkpoint_dtype: Dtype of averages in snapshots.
        update_every: Steps between updates.
        update_after_step: First step at which an update may happen.
        snapshot_growth: Factor between the times of further snapshots early in the training, None for none.
        movement: Movement of the weights, as for `plan`: each choice then has a predicted error.
        like: Directory of another training's run, to predict errors as if the weights moved as there.
        progress: Function of the parts of the search done so far and in total, True for a bar, or False for none;
            default a bar on a terminal.

    Returns:
        Three choices of two profiles, then of three and of four. Choices for which the disk is too small, and those
        that more disk does not change, are left out.

    Raises:
        ValueError: If the disk is too small for one step's snapshots of two profiles, the range, the schedule or the
            movement is not valid, or `like` does not show how its weights move.
        OSError: If `like` cannot be read.
    """
    check_one_movement(movement, like)
    known = {
        "steps": int(steps),
        "parameters": int(parameters),
        "disk": int(disk),
        "range": [float(sigma_rel) for sigma_rel in sigma_rels],
        "dtype": average_dtype_name(checkpoint_dtype),
        "update_every": int(update_every),
        "update_after_step": int(update_after_step),
        "snapshot_growth": growth_number(snapshot_growth),
        "movement": movement,
        "like": None if like is None else os.fspath(like),
    }
    with byte_progress(progress, _native.advice_parts, "trying profiles and spacings", unit="part") as report:
        text = _native.advise(json.dumps(known), report)
    return [_advice(found, predicted) for found, predicted in json.loads(text)]


def _advice(found: dict[str, Any], predicted: dict[str, float] | None) -> Advice:
    del found["sigma_rels"]
    profiles = tuple(map(Profile, found.pop("tracked")))
    return Advice(profiles=profiles, predicted=Predicted(**predicted) if predicted is not None else None, **found)
