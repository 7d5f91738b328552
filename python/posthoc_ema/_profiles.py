"""Profiles, which say how an average weighs time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import _native

__all__ = ["Profile", "Target"]


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
