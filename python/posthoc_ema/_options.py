"""Options of a tracker: defaults, checks, and the form in which the native part takes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import _native
from ._dtypes import average_dtype_name
from ._plans import Retention, growth_number, retention_to_dict
from ._profiles import Profile

DEFAULTS = {"update_every": 10, "update_after_step": 100, "checkpoint_every": 1000, "max_checkpoints": 20}
"""Schedule of a new run, as in pytorch-posthoc-ema."""

SNAPSHOT_GROWTH = float("1.2")
"""Factor between the times of early snapshots in a new run.

An option with this very object was not given: a resumed run then keeps its own factor."""


def tracked_profiles(
    sigma_rels: Iterable[float] | None, gammas: Iterable[float], betas: Iterable[float], profiles: Iterable[Profile]
) -> list[dict[str, Any]]:
    """Returns the descriptions of all profiles to track, in the order of the arguments."""
    powers = [*map(Profile.sigma_rel, sigma_rels or ()), *map(Profile.gamma, gammas)]
    return [profile.to_dict() for profile in [*powers, *map(Profile.beta, betas), *profiles]]


def tracker_options(
    *,
    is_new: bool,
    profiles: list[dict[str, Any]],
    device: str,
    schedule: dict[str, Any],
    snapshot_growth: float | None,
    checkpoint_dtype: Any,
    retention: Retention | None,
    **others: Any,
) -> dict[str, Any]:
    """Returns the options as the native part takes them.

    Args:
        is_new: Fill in `DEFAULTS`; a resumed run has its own.
        profiles: Descriptions of the profiles to track.
        device: Device of the averages.
        schedule: Numbers of steps and snapshots under the names of `DEFAULTS`, None if not given.
        snapshot_growth: Factor between the times of early snapshots; `SNAPSHOT_GROWTH` if it was not given.
        checkpoint_dtype: Dtype of averages in snapshots, or None.
        retention: Rule for the snapshots to keep, or None.
        others: Options that the native part takes as they are; None leaves one out.

    Raises:
        ValueError: If a value is not valid.
    """
    given: dict[str, Any] = {name: whole_number(name, value) for name, value in schedule.items()}
    given |= {
        "retention": None if retention is None else retention_to_dict(retention),
        "checkpoint_dtype": average_dtype_name(checkpoint_dtype),
        **others,
    }
    options = {name: value for name, value in given.items() if value is not None}
    options |= {"profiles": profiles, "device": str(device)}
    if is_new or snapshot_growth is not SNAPSHOT_GROWTH:
        options["snapshot_growth"] = growth_number(snapshot_growth)
    return {**DEFAULTS, **options} if is_new else options


def schedule(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the schedule of a run with these options, for a forecast."""
    return {name: options.get(name, default) for name, default in [*DEFAULTS.items(), ("snapshot_growth", None)]}


def whole_number(name: str, value: Any) -> int | None:
    """Returns a value as an int, or None for None.

    Raises:
        ValueError: If the value is negative or not a whole number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or int(value) != value or value < 0:
        raise ValueError(f"{name} = {value!r}: must be a whole number, 0 or more")
    return int(value)


def check_given(calculation_dtype: Any, on_error: str, on_nonfinite: str | None) -> None:
    """Checks the options that the native part does not see, and the reactions of an update."""
    check_calculation_dtype(calculation_dtype)
    if on_error not in ("raise", "warn"):
        raise ValueError(f'on_error = {on_error!r}: must be "raise" or "warn"')
    if on_nonfinite not in (None, "raise", "skip", "ignore"):
        raise ValueError(f'on_nonfinite = {on_nonfinite!r}: must be "raise", "skip" or "ignore"')


def check_calculation_dtype(dtype: Any) -> None:
    """Checks an option that is accepted for compatibility and changes nothing: sums are always in float64."""
    average_dtype_name(dtype)


def check_device(device: str) -> None:
    """Checks that averages can be kept on a device.

    Raises:
        RuntimeError: If it is a CUDA device that this build or this machine lacks.
    """
    if not str(device).startswith("cuda"):
        return
    if not _native.CUDA:
        raise RuntimeError(
            f"device={device!r}: this build of posthoc_ema has no CUDA kernels: install it again with nvcc on the PATH "
            f"and POSTHOC_EMA_CUDA=1, or keep the averages on the host with device='cpu'"
        )
    devices, reason = _native.cuda_devices()
    if devices == 0:
        raise RuntimeError(f"device={device!r}: {reason}: keep the averages on the host with device='cpu'")
