"""Plans, which say how snapshots make an average."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import _native
from ._profiles import Profile, Target, to_json

__all__ = ["Noise", "Plan", "Predicted", "Retention", "Weight", "plan"]


@dataclass(frozen=True)
class Weight:
    """The weight of one snapshot in a plan."""

    index: int
    """The number of the tracked profile."""
    step: int
    """The step of the snapshot's last update."""
    weight: float


@dataclass(frozen=True)
class Predicted:
    """The error that is to be expected of an average: root mean squares over its elements, relative to the weights'."""

    profile: float
    """Because the blend's profile is not the target's."""
    rounding: float
    """Because snapshots are stored rounded."""
    total: float
    """Both together."""


Noise = Literal["off", "auto"] | float
"""What a solve does against the rounding of stored snapshots: nothing, the regularisation of which the smallest error is
predicted, or a given one."""


def noise_text(noise: Noise) -> str:
    """What the native part takes."""
    return noise if isinstance(noise, str) else repr(float(noise))


@dataclass(frozen=True)
class Plan:
    """The solved weights of a target, with their error."""

    profile: Profile
    at: int
    """The step of the target."""
    relative_error: float
    """How far the blend's profile is from the target's, relative to the target's norm."""
    noise_gain: float
    """By how much rounding errors of the stored snapshots are amplified."""
    condition: float
    """The condition number of the scaled system."""
    sum: float
    """The sum of the weights: 1 but for rounding."""
    rho: float
    """The regularisation of the solve; 0 for none."""
    predicted: Predicted | None
    """The error of the average before it is rounded to its dtype. None before training, for averages at the newest update of a
    training, and where stored snapshots are too few (fewer than three steps) or tell no updates."""
    weights: tuple[Weight, ...]

    @staticmethod
    def from_json(text: str) -> list[Plan]:
        """Plans as the native part gives them."""

        def plan(plan: dict[str, Any]) -> Plan:
            weights = tuple(Weight(**weight) for weight in plan.pop("weights"))
            found = plan.pop("predicted")
            predicted = Predicted(**found) if found is not None else None
            return Plan(profile=Profile(plan.pop("profile")), weights=weights, predicted=predicted, **plan)

        return [plan(each) for each in json.loads(text)]


Retention = str | Sequence[float]
"""Which snapshots are kept: "latest", a range of sigma_rel such as ``(0.05, 0.28)``, or a list of steps (whole numbers)."""


def retention_to_dict(retention: Retention) -> Any:
    """As the native part reads it.

    Raises:
        ValueError: for anything else than "latest", two sigma_rel or whole numbers.
    """
    if retention == "latest":
        return retention
    if isinstance(retention, str):
        raise ValueError(
            f"retention = {retention!r}: must be 'latest', a range such as (0.05, 0.28), or a list of steps"
        )
    values = list(retention)
    if all(float(value).is_integer() and value >= 0 for value in values):
        return {"steps": [int(value) for value in values]}
    if len(values) != 2:
        raise ValueError(f"retention = {retention!r}: a range is two sigma_rel, steps are whole numbers")
    return {"range": {"from": float(values[0]), "to": float(values[1])}}


def plan(
    targets: Iterable[Target],
    *,
    steps: int,
    sigma_rels: Iterable[float] | None = None,
    profiles: Iterable[Profile] = (),
    update_every: int = 10,
    update_after_step: int = 100,
    checkpoint_every: int = 1000,
    max_checkpoints: int = 20,
    retention: Retention = (0.05, 0.28),
    step: int | None = None,
) -> list[Plan]:
    """Tells before a training how well each target can be synthesized after it.

    Args:
        targets: profiles, or numbers as sigma_rel.
        steps: length of the training in steps.
        sigma_rels: power-function profiles to track; 0.05 and 0.28 where nothing else is given.
        profiles: further profiles to track.
        update_every: steps between updates.
        update_after_step: no update before this step.
        checkpoint_every: steps between snapshots.
        max_checkpoints: how many steps' snapshots are kept.
        retention: which ones: those that serve a range of sigma_rel best, "latest", or a list of steps.
        step: the step of the targets; the last snapshot where it is not given.

    Raises:
        ValueError: for a profile or a schedule that makes no sense.
    """
    tracked = [*(Profile.sigma_rel(sigma_rel) for sigma_rel in sigma_rels or ()), *profiles]
    tracked = tracked or [Profile.sigma_rel(0.05), Profile.sigma_rel(0.28)]
    training = {
        "steps": int(steps),
        "update_every": int(update_every),
        "update_after_step": int(update_after_step),
        "checkpoint_every": int(checkpoint_every),
        "max_checkpoints": int(max_checkpoints),
        "retention": retention_to_dict(retention),
        "tracked": [profile.to_dict() for profile in tracked],
    }
    return Plan.from_json(_native.forecast(json.dumps(training), to_json(targets), step))
