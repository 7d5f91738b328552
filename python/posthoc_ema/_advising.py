"""Before a training: which profiles to track, how often to store them and how many to keep."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from . import _native
from ._dtypes import stored_name
from ._options import DEFAULTS
from ._profiles import Profile


@dataclass(frozen=True)
class Advice:
    """A choice of profiles, spacing and number of snapshots, and what it misses at the end of the training."""

    profiles: tuple[Profile, ...]
    """What to track: the `profiles` of `PostHocEMA.from_model`."""
    checkpoint_every: int
    """Steps between snapshots."""
    max_checkpoints: int
    """How many steps' snapshots are kept."""
    relative_error: float
    """The largest relative error of a profile over the range."""
    noise_gain: float
    """The largest noise gain over the range."""
    error: float
    """The largest error of the profile and of the snapshots' rounding together: what is made small."""
    sigma_rel: float
    """The length at which that is largest."""
    disk: int
    """What the run takes on disk at most, in bytes."""


def advise(
    *,
    steps: int,
    parameters: int,
    disk: float,
    sigma_rels: tuple[float, float] = (0.05, 0.28),
    checkpoint_dtype: Any = "float32",
    update_every: int = DEFAULTS["update_every"],
    update_after_step: int = DEFAULTS["update_after_step"],
) -> list[Advice]:
    """The best choices of two and of three profiles, for half, all and twice a disk, in this order.

    Args:
        steps: length of the training in steps.
        parameters: averaged elements of the model.
        disk: bytes that the run may take.
        sigma_rels: the shortest and the longest length that will be asked for; pass it as `retention`, too.
        checkpoint_dtype: dtype of averages in snapshots.
        update_every: steps between updates.
        update_after_step: no update before this step.

    Raises:
        ValueError: for a disk that does not hold one step's snapshots of two profiles, and a range or schedule that makes no sense.
    """
    known = {
        "steps": int(steps),
        "parameters": int(parameters),
        "disk": int(disk),
        "range": [float(sigma_rel) for sigma_rel in sigma_rels],
        "dtype": stored_name(checkpoint_dtype),
        "update_every": int(update_every),
        "update_after_step": int(update_after_step),
    }
    return [_advice(found) for found in json.loads(_native.advise(json.dumps(known)))]


def _advice(found: dict[str, Any]) -> Advice:
    del found["sigma_rels"]
    return Advice(profiles=tuple(map(Profile, found.pop("tracked"))), **found)
