"""Profiles, which say how an average weighs time, and plans, which say how snapshots make one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import _native

__all__ = ["Noise", "Plan", "Predicted", "Profile", "Retention", "Target", "Weight", "plan"]


class Profile:
    """How an average weighs time: a cumulative distribution over the training (Karras et al. 2023, section 3).

    Made by one of the class methods. Power functions and exponentials can be tracked while training; all others are
    targets of a synthesis only. Wherever a profile is expected, a number stands for ``Profile.sigma_rel(number)``.
    """

    __slots__ = ("_json", "_name")

    def __init__(self, description: Mapping[str, Any] | str):
        text = description if isinstance(description, str) else json.dumps(dict(description))
        self._json, self._name = _native.check_profile(text)

    @classmethod
    def sigma_rel(cls, sigma_rel: float) -> Profile:
        """The power function with this standard deviation relative to the training so far: in (0, 0.288675]."""
        return cls(_native.track("sigma_rel", float(sigma_rel)))

    @classmethod
    def gamma(cls, gamma: float) -> Profile:
        """The power function ``F_T(t) = (t/T)^(gamma + 1)``, gamma at least 0 (0 is the plain mean)."""
        return cls(_native.track("gamma", float(gamma)))

    @classmethod
    def beta(cls, beta: float) -> Profile:
        """The exponential (classical EMA) with this decay per training step, in (0, 1), whatever the interval of updates."""
        return cls(_native.track("beta", float(beta)))

    @classmethod
    def half_life(cls, steps: float) -> Profile:
        """The exponential of which half lies within so many newest steps."""
        return cls(_native.track("half_life", float(steps)))

    @classmethod
    def uniform(cls, steps: float | None = None, *, fraction: float | None = None) -> Profile:
        """The plain mean of the last `steps` steps, or of the last `fraction` of the training. A target only."""
        return cls({"kind": "uniform", **_window(steps, fraction)})

    @classmethod
    def linear(cls, steps: float | None = None, *, fraction: float | None = None) -> Profile:
        """Linearly growing weights over such a window. A target only."""
        return cls({"kind": "linear", **_window(steps, fraction)})

    @classmethod
    def lr_decay(cls, shape: str, steps: float | None = None, *, fraction: float | None = None) -> Profile:
        """The average that stands in for decaying the learning rate over such a window: shape "linear", "cosine" or
        "1-sqrt" (checkpoint merging, arXiv:2505.12082, arXiv:2507.17634). A target only."""
        return cls({"kind": "lr-decay", "shape": shape, **_window(steps, fraction)})

    @classmethod
    def table(cls, points: Iterable[tuple[float, float]]) -> Profile:
        """Any other: growing pairs of time as a share of the training, and cumulative share. A target only."""
        return cls({"kind": "table", "points": [[float(x), float(share)] for x, share in points]})

    def cumulative(self, times: Sequence[float], at: float) -> list[float]:
        """The share of the average at time `at` that belongs to what was seen by each of `times`."""
        return _native.cumulative(self._json, [float(time) for time in times], float(at))

    @property
    def as_sigma_rel(self) -> float | None:
        """The relative standard deviation of a power function; None for others."""
        return _native.as_sigma_rel(self._json)

    def to_dict(self) -> dict[str, Any]:
        """The description that the constructor takes."""
        return json.loads(self._json)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Profile) and self._json == other._json

    def __hash__(self) -> int:
        return hash(self._json)

    def __repr__(self) -> str:
        return f"<Profile {self._name}>"

    def __str__(self) -> str:
        return self._name


Target = float | Profile
"""A profile, or a number that stands for ``Profile.sigma_rel(number)``."""


def _window(steps: float | None, fraction: float | None) -> dict[str, float]:
    if (steps is None) == (fraction is None):
        raise ValueError("give the window either in steps or as a fraction of the training")
    return {"window": float(steps)} if steps is not None else {"fraction": float(fraction)}  # type: ignore[arg-type]


def as_profile(target: Target) -> Profile:
    """The profile that a target stands for."""
    return target if isinstance(target, Profile) else Profile.sigma_rel(target)


def to_json(targets: Iterable[Target]) -> list[str]:
    """What the native part takes."""
    return [as_profile(target)._json for target in targets]


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
