"""Profiles of averages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import _native

__all__ = ["Profile", "Target"]


class Profile:
    """Weighting of the training by an average: a cumulative distribution over time (Karras et al. 2023, section 3).

    The class methods make profiles. Power functions and exponentials can be tracked during training; all others are
    targets of a synthesis only. A number in the place of a profile stands for `Profile.sigma_rel(number)`.

    Args:
        description: Mapping or JSON text as `to_dict` returns it.

    Raises:
        ValueError: If the description is not of a valid profile.
    """

    __slots__ = ("_json", "_name")

    def __init__(self, description: Mapping[str, Any] | str):
        text = description if isinstance(description, str) else json.dumps(dict(description))
        self._json, self._name = _native.check_profile(text)

    @classmethod
    def sigma_rel(cls, sigma_rel: float) -> Profile:
        """Makes the power function of a relative standard deviation.

        Args:
            sigma_rel: Standard deviation relative to the length of the training so far, in (0, 0.288675].
        """
        return cls(_native.track("sigma_rel", float(sigma_rel)))

    @classmethod
    def gamma(cls, gamma: float) -> Profile:
        """Makes the power function `F_T(t) = (t/T)^(gamma + 1)`.

        Args:
            gamma: Exponent, at least 0; 0 is the plain mean.
        """
        return cls(_native.track("gamma", float(gamma)))

    @classmethod
    def beta(cls, beta: float) -> Profile:
        """Makes the exponential of a decay (classical EMA).

        Args:
            beta: Decay per training step, in (0, 1), whatever the interval of updates.
        """
        return cls(_native.track("beta", float(beta)))

    @classmethod
    def half_life(cls, steps: float) -> Profile:
        """Makes the exponential of a half-life.

        Args:
            steps: Number of newest steps that hold half of the weight.
        """
        return cls(_native.track("half_life", float(steps)))

    @classmethod
    def uniform(cls, steps: float | None = None, *, fraction: float | None = None) -> Profile:
        """Makes the plain mean of a window at the end of the training; a target only.

        Args:
            steps: Length of the window in steps.
            fraction: Length of the window as a fraction of the training, instead.
        """
        return cls({"kind": "uniform", **_window(steps, fraction)})

    @classmethod
    def linear(cls, steps: float | None = None, *, fraction: float | None = None) -> Profile:
        """Makes an average whose weights grow linearly over a window at the end of the training; a target only.

        Args:
            steps: Length of the window in steps.
            fraction: Length of the window as a fraction of the training, instead.
        """
        return cls({"kind": "linear", **_window(steps, fraction)})

    @classmethod
    def lr_decay(cls, shape: str, steps: float | None = None, *, fraction: float | None = None) -> Profile:
        """Makes the average that replaces a decay of the learning rate; a target only.

        See checkpoint merging, arXiv:2505.12082 and arXiv:2507.17634.

        Args:
            shape: Shape of the decay: "linear", "cosine" or "1-sqrt".
            steps: Length of the decay in steps, at the end of the training.
            fraction: Length of the decay as a fraction of the training, instead.
        """
        return cls({"kind": "lr-decay", "shape": shape, **_window(steps, fraction)})

    @classmethod
    def table(cls, points: Iterable[tuple[float, float]]) -> Profile:
        """Makes a profile from a table; a target only.

        Args:
            points: Growing pairs of time as a fraction of the training, and the share of the weight up to that time.
        """
        return cls({"kind": "table", "points": [[float(x), float(share)] for x, share in points]})

    def cumulative(self, times: Sequence[float], at: float) -> list[float]:
        """Returns the share of the average at a time that belongs to the training up to earlier times.

        Args:
            times: Times, in the unit of `at`.
            at: Time of the average.

        Returns:
            A share in [0, 1] for each of `times`.
        """
        return _native.cumulative(self._json, [float(time) for time in times], float(at))

    @property
    def as_sigma_rel(self) -> float | None:
        """Relative standard deviation of a power function; None for other profiles."""
        return _native.as_sigma_rel(self._json)

    def to_dict(self) -> dict[str, Any]:
        """Returns the description that the constructor takes."""
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
"""A profile, or a number that stands for `Profile.sigma_rel(number)`."""


def _window(steps: float | None, fraction: float | None) -> dict[str, float]:
    """Describes a window whose length is given in one of two ways."""
    if (steps is None) == (fraction is None):
        raise ValueError(
            f"steps = {steps}, fraction = {fraction}: give the window either in steps or as a fraction of the training"
        )
    return {"window": float(steps)} if steps is not None else {"fraction": float(fraction)}  # type: ignore[arg-type]


def as_profile(target: Target) -> Profile:
    """Returns the profile that a target stands for."""
    return target if isinstance(target, Profile) else Profile.sigma_rel(target)


def profile_json(target: Target) -> str:
    """Returns a target as the native part takes it."""
    return as_profile(target)._json


def to_json(targets: Iterable[Target]) -> list[str]:
    """Returns targets as the native part takes them."""
    return [profile_json(target) for target in targets]
