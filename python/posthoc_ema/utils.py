"""Conversions between the lengths of averages, and the closed forms of Karras et al. 2023 (arXiv:2312.02696).

| paper | here | what |
| --- | --- | --- |
| sigma_rel | `sigma_rel` | standard deviation of a power-function profile, relative to the training so far |
| gamma | `gamma` | its exponent: `p_T(t) = (gamma + 1) t^gamma / T^(gamma + 1)` for `0 <= t <= T` |
| beta | `beta` | decay per training step of an exponential (classical EMA) |
| <p_a, p_b> | `p_dot_p` | inner product of two profiles, the integral of `p_a p_b` |

Every function takes floats, NumPy arrays and torch tensors, element by element and with broadcasting, and computes in
f64. Of floats it gives a float; of arrays an array and of tensors a tensor (on the device of the first, without a
gradient), in the widest floating-point dtype among them, f64 where there is none.
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

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_SIGMA_REL",
    "beta_to_sigma_rel",
    "gamma_to_sigma_rel",
    "p_dot_p",
    "sigma_rel_to_beta",
    "sigma_rel_to_gamma",
    "solve_weights",
]

MAX_SIGMA_REL = 1.0 / math.sqrt(12.0)
"""The longest power-function profile: gamma 0, the plain mean."""

# What a function is given, it gives back; functions of several values take a mixture of them.
Values = TypeVar("Values", bound="float | npt.NDArray[Any] | torch.Tensor")
_Floats = npt.NDArray[np.float64]


def sigma_rel_to_gamma(sigma_rel: Values) -> Values:
    """The exponent of the power-function profile of this length (Algorithm 2).

    Args:
        sigma_rel: relative standard deviations, in (0, 1/sqrt 12].

    Returns:
        The largest real root of ``g^3 + 7 g^2 + (16 - sigma_rel^-2) g + (12 - sigma_rel^-2)``: at least 0.

    Raises:
        ValueError: outside of that range: 1/sqrt 12 is the plain mean, and no power-function profile is longer.
    """
    return _each(_sigma_rel_to_gamma, sigma_rel)


def gamma_to_sigma_rel(gamma: Values) -> Values:
    """The relative standard deviation of the power-function profile with this exponent (eq. 123).

    Args:
        gamma: exponents, at least 0.

    Returns:
        ``sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)``, in (0, 1/sqrt 12].

    Raises:
        ValueError: for exponents below 0 and those that are not finite.
    """
    return _each(_gamma_to_sigma_rel, gamma)


def beta_to_sigma_rel(beta: Values, steps: float | None = None) -> Values:
    """The length of the power-function profile whose standard deviation is that of a classical EMA after `steps` steps.

    A classical EMA looks back about ``1 / (1 - beta)`` steps however long the training is; sigma_rel is a share of the
    training. The two agree at one length of training only.

    Args:
        beta: decays per training step, in (0, 1).
        steps: the length of training, in steps, at which the two shall agree.

    Returns:
        ``1 / ((1 - beta) steps)``.

    Raises:
        ValueError: without `steps`, for a decay outside of (0, 1), and where the EMA looks back further than the plain
            mean of all steps, which no power-function profile does.
    """
    steps = _checked_steps(steps, f"beta_to_sigma_rel({_shown(beta)}, steps=100_000)")
    return _each(lambda one: _beta_to_sigma_rel(one, steps), beta)


def sigma_rel_to_beta(sigma_rel: Values, steps: float | None = None) -> Values:
    """The decay of the classical EMA whose standard deviation after `steps` steps is that of a power-function profile.

    The inverse of `beta_to_sigma_rel`, which says why it needs a length of training.

    Args:
        sigma_rel: relative standard deviations, in (0, 1/sqrt 12].
        steps: the length of training, in steps, at which the two shall agree.

    Returns:
        ``1 - 1 / (sigma_rel steps)``, the decay per training step, in (0, 1).

    Raises:
        ValueError: without `steps`, for a sigma_rel out of its range, and for an average no longer than one step.
    """
    steps = _checked_steps(steps, f"sigma_rel_to_beta({_shown(sigma_rel)}, steps=100_000)")
    return _each(lambda one: _sigma_rel_to_beta(one, steps), sigma_rel)


def p_dot_p(t_a: Values, gamma_a: Values, t_b: Values, gamma_b: Values) -> Values:
    """The inner product of two power-function profiles, the integral of their product over time (eq. 151).

    ``(gamma_a + 1)(gamma_b + 1) (min(t_a, t_b) / max(t_a, t_b))^gamma / ((gamma_a + gamma_b + 1) max(t_a, t_b))``,
    gamma that of the later profile.

    The profile of time 0 has all its mass there, and its product with a later one is that one's density at 0. Two of
    time 0 have no finite product: they get that of time 1, as in the published implementations.

    Args:
        t_a, t_b: times at which the averages are taken, at least 0, all in the same unit.
        gamma_a, gamma_b: their exponents, at least 0.

    Returns:
        The inner products, per unit of time.

    Raises:
        ValueError: for a time or an exponent below 0, and one that is not finite.
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
    """The weights with which stored averages make that of `target_gamma` at the last of `timesteps` (Algorithm 3).

    Plain least squares over the closed form `p_dot_p`, for averages updated at every step. The plans of this package
    (`posthoc_ema.plan`, `PostHocEMA.plan`), which synthesis uses, do more: they take the updates that really
    were made, and hold the sum of the weights at 1, which is only nearly so here.

    Args:
        gammas: ``(n,)``, the exponent of each stored average.
        timesteps: ``(n,)``, the time of each, above 0; the target is at the last one.
        target_gamma: exponent of the target, at least 0.
        calculation_dtype: dtype of the weights, that of `gammas` where it is not given; they are solved in f64 always.
        target_sigma_rel: the same target as a length; checked against `target_gamma`, no more.

    Returns:
        The weights, ``(n,)``, where `gammas` are: a tensor or an array.

    Raises:
        ValueError: for shapes that differ or are empty, times not above 0, exponents below 0, anything that is not
            finite, and a `target_sigma_rel` of another profile.
    """
    _check_same_target(target_gamma, target_sigma_rel)
    stored_gammas, times = as_floats(gammas), as_floats(timesteps)
    if stored_gammas.ndim != 1 or stored_gammas.shape != times.shape or times.size == 0:
        raise ValueError(
            f"gammas of shape {stored_gammas.shape} and timesteps of shape {times.shape}: give one of each for every "
            "stored average"
        )
    _check_at_least_zero("gammas", stored_gammas)
    _check_at_least_zero("timesteps", times)
    if not (times > 0.0).all():
        raise ValueError("timesteps: nothing is averaged at time 0; leave that average out")
    weights = _like((gammas,), _least_squares(stored_gammas, times, float(target_gamma)))
    if calculation_dtype is None:
        return weights
    return weights.to(calculation_dtype) if _is_tensor(weights) else weights.astype(calculation_dtype)


def _least_squares(gammas: _Floats, times: _Floats, target_gamma: float) -> _Floats:
    """Minimises ``|| sum_i x_i p_i - r ||`` by the normal equations (Algorithm 3), profiles scaled to length 1.

    The scaling keeps early snapshots, whose profiles are large, from deciding alone what counts as singular; equal
    profiles share their weight.
    """
    gram = _p_dot_p(times[:, None], gammas[:, None], times[None, :], gammas[None, :])
    right = _p_dot_p(times, gammas, times[-1], np.asarray(target_gamma))
    scale = 1.0 / np.sqrt(np.diagonal(gram))
    return scale * np.linalg.lstsq(scale[:, None] * gram * scale, scale * right, rcond=None)[0]


def _p_dot_p(t_a: _Floats, gamma_a: _Floats, t_b: _Floats, gamma_b: _Floats) -> _Floats:
    # Eq. 151.
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
    _native.track("beta", beta)  # which checks its range
    sigma_rel = 1.0 / ((1.0 - beta) * steps)
    # Conversions back and forth may round across the end of the range.
    if sigma_rel > MAX_SIGMA_REL * (1.0 + 1e-12):
        raise ValueError(
            f"beta = {beta}: after {steps:g} steps this is sigma_rel {sigma_rel:.4g}, and no power-function profile is "
            f"longer than the plain mean, {MAX_SIGMA_REL:.6f}"
        )
    return min(sigma_rel, MAX_SIGMA_REL)


def _sigma_rel_to_beta(sigma_rel: float, steps: float) -> float:
    _native.track("sigma_rel", sigma_rel)  # which checks its range
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
            "beta and sigma_rel agree at one length of training only: sigma_rel = 1 / ((1 - beta) steps). Pass it, as "
            f"in {example}. Without it pytorch-posthoc-ema computes numbers that belong to no length of training"
        )
    if not (math.isfinite(steps) and steps > 0):
        raise ValueError(f"steps = {steps}: a length of training is above 0")
    return float(steps)


def _shown(values: Any) -> str:
    return f"{values:g}" if isinstance(values, float) else "..."


def _check_at_least_zero(name: str, values: _Floats) -> None:
    bad = values[~(np.isfinite(values) & (values >= 0.0))]
    if bad.size:
        raise ValueError(f"{name} = {bad.flat[0]}: must be finite and at least 0")


def _check_same_target(gamma: float, sigma_rel: float | None) -> None:
    expected = _gamma_to_sigma_rel(float(gamma))
    # Callers may have gone through f32 on the way.
    if sigma_rel is not None and not math.isclose(sigma_rel, expected, rel_tol=1e-5):
        raise ValueError(f"target_sigma_rel = {sigma_rel}: target_gamma {gamma} is sigma_rel {expected:.6g}")


def _each(function: Callable[[float], float], values: Values) -> Values:
    """Applies a function of floats to every element."""
    floats = as_floats(values)
    results = np.fromiter((function(one) for one in floats.flat), np.float64, floats.size)
    return _like((values,), results.reshape(floats.shape))


def _is_tensor(value: object) -> bool:
    # Where torch was never imported, nothing is one of its tensors.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_floats(values: Any) -> _Floats:
    """A NumPy array, f64, of floats, arrays or tensors anywhere."""
    if _is_tensor(values):
        import torch

        return values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _like(given: Sequence[Any], result: _Floats) -> Any:
    """The result as what was given: see the head of this module."""
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
