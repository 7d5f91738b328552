"""Conversions between the lengths of averages, and the closed forms of Karras et al. 2023 (arXiv:2312.02696).

`refresh_spectral_norms` prepares a model that has loaded an average. The other functions are of numbers.

| paper | here | meaning |
| --- | --- | --- |
| sigma_rel | `sigma_rel` | standard deviation of a power-function profile, relative to the training so far |
| gamma | `gamma` | exponent of the profile: `p_T(t) = (gamma + 1) t^gamma / T^(gamma + 1)` for `0 <= t <= T` |
| beta | `beta` | decay per training step of an exponential (classical EMA) |
| <p_a, p_b> | `p_dot_p` | inner product of two profiles, the integral of `p_a p_b` |

Every other function takes floats, NumPy arrays and torch tensors, elementwise and with broadcasting, and computes in
float64. Floats give a float, arrays an array, and tensors a tensor on the device of the first, without a gradient. The
dtype is the widest floating-point dtype among the arguments, or float64 if there is none.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import _native
from ._spectral import refresh_spectral_norms

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_SIGMA_REL",
    "beta_to_sigma_rel",
    "gamma_to_sigma_rel",
    "p_dot_p",
    "refresh_spectral_norms",
    "sigma_rel_to_beta",
    "sigma_rel_to_gamma",
    "solve_weights",
]

MAX_SIGMA_REL = 1.0 / math.sqrt(12.0)
"""Length of the longest power-function profile: gamma 0, the plain mean."""

# A function returns the type that it was given; functions of several values take a mixture.
Values = TypeVar("Values", bound="float | npt.NDArray[Any] | torch.Tensor")
_Floats = npt.NDArray[np.float64]


def sigma_rel_to_gamma(sigma_rel: Values) -> Values:
    """Returns the exponent of the power-function profile of a length (Algorithm 2).

    Args:
        sigma_rel: Relative standard deviations, in (0, 1/sqrt 12].

    Returns:
        The largest real root of `g^3 + 7 g^2 + (16 - sigma_rel^-2) g + (12 - sigma_rel^-2)`, at least 0.

    Raises:
        ValueError: If a length is outside that range: 1/sqrt 12 is the plain mean, and no power-function profile is
            longer.
    """
    return _each(_sigma_rel_to_gamma, sigma_rel)


def gamma_to_sigma_rel(gamma: Values) -> Values:
    """Returns the relative standard deviation of the power-function profile with an exponent (eq. 123).

    Args:
        gamma: Exponents, at least 0.

    Returns:
        `sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)`, in (0, 1/sqrt 12].

    Raises:
        ValueError: If an exponent is below 0 or not finite.
    """
    return _each(_gamma_to_sigma_rel, gamma)


def beta_to_sigma_rel(beta: Values, steps: float | None = None) -> Values:
    """Returns the length of the power-function profile with the standard deviation of a classical EMA.

    A classical EMA looks back about `1 / (1 - beta)` steps, however long the training is; sigma_rel is a fraction of
    the training. The two agree at one length of training only.

    Args:
        beta: Decays per training step, in (0, 1).
        steps: Length of training in steps at which the two agree; required.

    Returns:
        `1 / ((1 - beta) steps)`.

    Raises:
        ValueError: If `steps` is missing, a decay is outside (0, 1), or the EMA looks back further than the plain mean
            of all steps, which no power-function profile does.
    """
    steps = _checked_steps(steps, f"beta_to_sigma_rel({_shown(beta)}, steps=100_000)")
    return _each(lambda one: _beta_to_sigma_rel(one, steps), beta)


def sigma_rel_to_beta(sigma_rel: Values, steps: float | None = None) -> Values:
    """Returns the decay of the classical EMA with the standard deviation of a power-function profile.

    This is the inverse of `beta_to_sigma_rel`, which explains why it needs a length of training.

    Args:
        sigma_rel: Relative standard deviations, in (0, 1/sqrt 12].
        steps: Length of training in steps at which the two agree; required.

    Returns:
        `1 - 1 / (sigma_rel steps)`, the decay per training step, in (0, 1).

    Raises:
        ValueError: If `steps` is missing, a sigma_rel is out of its range, or the average is no longer than one step.
    """
    steps = _checked_steps(steps, f"sigma_rel_to_beta({_shown(sigma_rel)}, steps=100_000)")
    return _each(lambda one: _sigma_rel_to_beta(one, steps), sigma_rel)


def p_dot_p(t_a: Values, gamma_a: Values, t_b: Values, gamma_b: Values) -> Values:
    """Returns the inner product of two power-function profiles, the integral of their product over time (eq. 151).

    It is `(gamma_a + 1)(gamma_b + 1) (min(t_a, t_b) / max(t_a, t_b))^gamma / ((gamma_a + gamma_b + 1) max(t_a, t_b))`,
    with the gamma of the later profile.

    A profile of time 0 has all its mass there. Its product with a later profile is the density of the later one at 0.
    Two profiles of time 0 have no finite product: the result is that of time 1, as in the published implementations.

    Args:
        t_a: Times of the first averages, at least 0.
        gamma_a: Their exponents, at least 0.
        t_b: Times of the second averages, at least 0, in the same unit.
        gamma_b: Their exponents, at least 0.

    Returns:
        The inner products, per unit of time.

    Raises:
        ValueError: If a time or an exponent is below 0 or not finite.
    """
    given = (t_a, gamma_a, t_b, gamma_b)
    times_a, gammas_a, times_b, gammas_b = (as_floats(each) for each in given)
    for name, values in (("t_a", times_a), ("gamma_a", gammas_a), ("t_b", times_b), ("gamma_b", gammas_b)):
        _check_at_least_zero(name, values)
    return _like(given, _p_dot_p(times_a, gammas_a, times_b, gammas_b))


def solve_weights(
    gammas: torch.Tensor,
    timesteps: torch.Tensor,
    target_gamma: float,
    *,
    calculation_dtype: torch.dtype | None = None,
    target_sigma_rel: float | None = None,
) -> torch.Tensor:
    """Returns the weights with which stored averages make that of `target_gamma` at the last timestep (Algorithm 3).

    This is plain least squares over the closed form `p_dot_p`, for averages updated at every step. A synthesis uses
    plans instead (`posthoc_ema.plan`, `PostHocEMA.plan`): they know the actual updates, and hold the sum of the weights
    at 1, which is only approximate here.

    Args:
        gammas: Exponent of each stored average, shape `(n,)`.
        timesteps: Time of each stored average, shape `(n,)`, above 0. The target is at the last one.
        target_gamma: Exponent of the target, at least 0.
        calculation_dtype: Dtype of the weights; default that of `gammas`. They are always solved in float64.
        target_sigma_rel: Length of the same target, only checked against `target_gamma`.

    Returns:
        The weights, shape `(n,)`: a tensor on the device of `gammas`, or an array.

    Raises:
        ValueError: If the shapes differ or are empty, a time is not above 0, an exponent is below 0, a value is not
            finite, or `target_sigma_rel` is of another profile.
    """
    _check_same_target(target_gamma, target_sigma_rel)
    stored_gammas = as_floats(gammas)
    times = as_floats(timesteps)
    if stored_gammas.ndim != 1 or stored_gammas.shape != times.shape or times.size == 0:
        raise ValueError(
            f"gammas of shape {stored_gammas.shape} and timesteps of shape {times.shape}: give one of each for every "
            "stored average"
        )
    _check_at_least_zero("gammas", stored_gammas)
    _check_at_least_zero("timesteps", times)
    if not (times > 0.0).all():
        raise ValueError("timesteps contains 0: nothing is averaged at time 0; leave that average out")
    weights = _like((gammas,), _least_squares(stored_gammas, times, float(target_gamma)))
    if calculation_dtype is None:
        return weights
    return weights.to(calculation_dtype) if _is_tensor(weights) else weights.astype(calculation_dtype)


def _least_squares(gammas: _Floats, times: _Floats, target_gamma: float) -> _Floats:
    """Minimises `|| sum_i x_i p_i - r ||` by the normal equations (Algorithm 3), profiles scaled to length 1.

    Without the scaling, the large profiles of early snapshots alone would set the threshold of singularity. Equal
    profiles share their weight.
    """
    gram = _p_dot_p(times[:, None], gammas[:, None], times[None, :], gammas[None, :])
    right = _p_dot_p(times, gammas, times[-1], np.asarray(target_gamma))
    scale = 1.0 / np.sqrt(np.diagonal(gram))
    return scale * np.linalg.lstsq(scale[:, None] * gram * scale, scale * right, rcond=None)[0]


def _p_dot_p(t_a: _Floats, gamma_a: _Floats, t_b: _Floats, gamma_b: _Floats) -> _Floats:
    """Computes eq. 151 in float64."""
    last = np.maximum(t_a, t_b)
    last = np.where(last == 0.0, 1.0, last)
    ratio = np.where((t_a == 0.0) & (t_b == 0.0), 1.0, np.minimum(t_a, t_b) / last)
    gamma_of_last = np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1.0) * (gamma_b + 1.0) * ratio**gamma_of_last / ((gamma_a + gamma_b + 1.0) * last)


def _sigma_rel_to_gamma(sigma_rel: float) -> float:
    return json.loads(_native.track("sigma_rel", sigma_rel))["gamma"]


def _gamma_to_sigma_rel(gamma: float) -> float:
    return _native.as_sigma_rel(_native.track("gamma", gamma))  # type: ignore[return-value]


def _beta_to_sigma_rel(beta: float, steps: float) -> float:
    _native.track("beta", beta)  # checks the range
    sigma_rel = 1.0 / ((1.0 - beta) * steps)
    # A conversion back may round across the end of the range.
    if sigma_rel > MAX_SIGMA_REL * (1.0 + 1e-12):
        raise ValueError(
            f"beta = {beta}: after {steps:g} steps this is sigma_rel {sigma_rel:.4g}, and no power-function profile is "
            f"longer than the plain mean, {MAX_SIGMA_REL:.6f}"
        )
    return min(sigma_rel, MAX_SIGMA_REL)


def _sigma_rel_to_beta(sigma_rel: float, steps: float) -> float:
    _native.track("sigma_rel", sigma_rel)  # checks the range
    beta = 1.0 - 1.0 / (sigma_rel * steps)
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"sigma_rel = {sigma_rel}: after {steps:g} steps this average is no longer than one step, and no classical "
            "EMA matches it"
        )
    return beta


def _checked_steps(steps: float | None, example: str) -> float:
    if steps is None:
        raise ValueError(
            "beta and sigma_rel agree at one length of training only: sigma_rel = 1 / ((1 - beta) steps). Pass the "
            f"length, as in {example}. The numbers that pytorch-posthoc-ema returns without it belong to no length of "
            f"training"
        )
    if not (math.isfinite(steps) and steps > 0):
        raise ValueError(f"steps = {steps}: a length of training is above 0 and finite")
    return float(steps)


def _shown(values: Any) -> str:
    return f"{values:g}" if isinstance(values, float) else "..."


def _check_at_least_zero(name: str, values: _Floats) -> None:
    bad = values[~(np.isfinite(values) & (values >= 0.0))]
    if bad.size:
        raise ValueError(f"{name} = {bad.flat[0]}: must be finite and at least 0")


def _check_same_target(gamma: float, sigma_rel: float | None) -> None:
    expected = _gamma_to_sigma_rel(float(gamma))
    # Some callers compute one of the two in float32.
    if sigma_rel is not None and not math.isclose(sigma_rel, expected, rel_tol=1e-5):
        raise ValueError(
            f"target_sigma_rel = {sigma_rel}: target_gamma = {gamma} is sigma_rel {expected:.6g}: give one of the two"
        )


def _each(function: Callable[[float], float], values: Values) -> Values:
    """Applies a function of floats to every element."""
    floats = as_floats(values)
    results = np.fromiter((function(one) for one in floats.flat), np.float64, floats.size)
    return _like((values,), results.reshape(floats.shape))


def _is_tensor(value: object) -> bool:
    # A program that has not imported torch has no tensor of it.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_floats(values: Any) -> _Floats:
    """Converts floats, arrays or tensors on any device to a float64 array."""
    if _is_tensor(values):
        import torch

        return values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _like(given: Sequence[Any], result: _Floats) -> Any:
    """Converts a result to the type of the arguments, as this module promises."""
    tensors = [value for value in given if _is_tensor(value)]
    if tensors:
        import torch

        floating = [tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point]
        dtype = floating[0] if floating else torch.float64
        for other in floating:
            dtype = torch.promote_types(dtype, other)
        return torch.from_numpy(np.array(result)).to(tensors[0].device, dtype)
    arrays = [value for value in given if isinstance(value, np.ndarray)]
    if arrays:
        floating = [array.dtype for array in arrays if np.issubdtype(array.dtype, np.floating)]
        return result.astype(np.result_type(*floating) if floating else np.float64)
    return float(result) if np.ndim(result) == 0 else result
