"""Plans: the weights with which snapshots make an average."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from . import _native
from ._dtypes import average_dtype_name
from ._profiles import Profile, Target, to_json

__all__ = ["LaterTensors", "Noise", "Plan", "Predicted", "Retention", "Weight", "plan"]


@dataclass(frozen=True)
class Weight:
    """Weight of one snapshot in a plan."""

    index: int
    """Number of the snapshot's profile among the tracked ones."""
    step: int
    """Step of the last update that the snapshot contains."""
    weight: float
    """Factor of the snapshot in the blend."""


@dataclass(frozen=True)
class Predicted:
    """Predicted error of an average: root mean square over its elements, relative to that of the weights."""

    profile: float
    """Part that comes from the difference between the blend's profile and the target's."""
    rounding: float
    """Part that comes from the rounding of stored snapshots."""
    total: float
    """Both parts together."""


@dataclass(frozen=True)
class WorstGroup:
    """Group of tensors with the largest predicted error, relative to its own weights.

    Tensors that move by similar shares of their weights are one group."""

    tensors: tuple[str, ...]
    """Names of the tensors."""
    share: float
    """Share of all averaged elements."""
    predicted: Predicted
    """Predicted error of the group, relative to the root mean square of its own weights."""

    @staticmethod
    def _from_dict(group: dict[str, Any] | None) -> WorstGroup | None:
        if group is None:
            return None
        return WorstGroup(tuple(group["tensors"]), group["share"], Predicted(**group["predicted"]))


@dataclass(frozen=True)
class MovementEvent:
    """One event between two snapshots that makes the most of a predicted error: a jump, a spike or a fast start.

    Snapshots show its size and not its time, so the error is known to a range only."""

    after: int
    """Step of the snapshot before the event; 0 for the beginning."""
    before: int
    """Step of the snapshot after it."""
    least: float
    """Smallest error of the average, as `Predicted.total`."""
    most: float
    """Largest error of the average."""


@dataclass(frozen=True)
class HeldBack:
    """Regularisation that `noise="auto"` does not use, because it would make a group of tensors worse by more than 5%.

    The whole would have a clearly smaller error with it: `noise=rho` uses it all the same."""

    tensors: tuple[str, ...]
    """Names of the tensors that would be worse."""
    rho: float
    """The regularisation."""
    predicted: Predicted
    """Predicted error of all elements with it."""

    @staticmethod
    def _from_dict(held: dict[str, Any] | None) -> HeldBack | None:
        return None if held is None else HeldBack(tuple(held["tensors"]), held["rho"], Predicted(**held["predicted"]))


Noise = Literal["off", "auto"] | float
"""Regularisation of a solve against the rounding of stored snapshots.

"off" is none, "auto" the one with the smallest predicted error, and a number sets it."""


def noise_text(noise: Noise) -> str:
    """Returns the option as the native part takes it."""
    return noise if isinstance(noise, str) else repr(float(noise))


@dataclass(frozen=True)
class LaterTensors:
    """Tensors whose averages began after the run did, and their weights in a plan."""

    since: int
    """Step at which their averages began, with their values at that step."""
    tensors: tuple[str, ...]
    """Names of the tensors."""
    relative_error: float
    """As `Plan.relative_error`, over the updates since they began."""
    noise_gain: float
    """As `Plan.noise_gain`."""
    weights: tuple[Weight, ...]
    """Weights of the snapshots that have the tensors."""

    @staticmethod
    def _from_dict(later: dict[str, Any]) -> LaterTensors:
        weights = tuple(Weight(**weight) for weight in later.pop("weights"))
        return LaterTensors(tensors=tuple(later.pop("tensors")), weights=weights, **later)


@dataclass(frozen=True)
class Plan:
    """Solved weights of a target, and their error."""

    profile: Profile
    """Profile of the target."""
    at: int
    """Step of the target."""
    relative_error: float
    """Distance between the blend's profile and the target's, relative to the norm of the target."""
    noise_gain: float
    """Factor by which rounding errors of the stored snapshots are amplified."""
    condition: float
    """Condition number of the scaled system."""
    sum: float
    """Sum of the weights, which is 1 apart from rounding."""
    rho: float
    """Regularisation of the solve; 0 is none."""
    predicted: Predicted | None
    """Predicted error of the average before it is rounded to its dtype; None for a reason that `no_prediction` has."""
    warning: str | None
    """Reason of a relative error above 5%, with a remedy; None for a smaller one."""
    weights: tuple[Weight, ...]
    """Weights of the snapshots."""
    worst_group: WorstGroup | None = None
    """Group of tensors with the largest predicted error; None if all move alike or nothing is predicted."""
    later: tuple[LaterTensors, ...] = ()
    """Tensors whose averages began after the run did (`extend=True`): they have weights of their own. So have groups of
    tensors in a joint sweep."""
    groups: Mapping[str, Profile] = field(default_factory=dict)
    """Profiles of groups of tensors by their glob, in a joint sweep."""
    held_back: HeldBack | None = None
    """Better regularisation that `noise="auto"` left out, and the tensors that it would make worse; mostly None."""
    no_prediction: str | None = None
    """Reason for having no predicted error, with a remedy; None if there is one."""
    event: MovementEvent | None = None
    """Event between two snapshots that makes the most of the predicted error, with its range; None if none does."""

    def __str__(self) -> str:
        """Says in one line how far the average is from what was asked for."""
        text = f"{self.profile} at step {self.at}: relative error {self.relative_error:.2g}"
        text += f", noise gain {self.noise_gain:.2g}, "
        if self.predicted is None:
            return text + f"no predicted error: {self.no_prediction}"
        text += f"predicted error {self.predicted.total:.2g} of the weights"
        text += f" ({self.predicted.profile:.2g} by profile, {self.predicted.rounding:.2g} by rounding)"
        if self.event is None:
            return text
        least, most, after, before = self.event.least, self.event.most, self.event.after, self.event.before
        return text + f", {least:.2g} to {most:.2g} by when one event between steps {after} and {before} was"

    @staticmethod
    def from_json(text: str) -> list[Plan]:
        """Returns plans as the native part describes them."""

        def plan(plan: dict[str, Any]) -> Plan:
            plan["profile"] = Profile(plan["profile"])
            plan["weights"] = tuple(Weight(**weight) for weight in plan["weights"])
            found = plan["predicted"]
            plan["predicted"] = Predicted(**found) if found is not None else None
            event = plan.get("event")
            plan["event"] = MovementEvent(**event) if event is not None else None
            plan["worst_group"] = WorstGroup._from_dict(plan.get("worst_group"))
            plan["held_back"] = HeldBack._from_dict(plan.get("held_back"))
            plan["later"] = tuple(map(LaterTensors._from_dict, plan.get("later", ())))
            plan["groups"] = {name: Profile(profile) for name, profile in plan.get("groups", {}).items()}
            return Plan(**plan)

        return [plan(each) for each in json.loads(text)]


Retention = str | Sequence[float]
"""Rule for the snapshots to keep: "latest", a range of sigma_rel such as `(0.05, 0.28)`, or a list of whole steps."""


def retention_to_dict(retention: Retention) -> Any:
    """Returns the rule as the native part takes it.

    Raises:
        ValueError: If it is not "latest", two sigma_rel or whole numbers.
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


def growth_number(snapshot_growth: float | None) -> float:
    """Returns the factor between the times of early snapshots as the native part takes it: 0 for none.

    Raises:
        ValueError: If it is infinite or NaN.
    """
    growth = float(snapshot_growth or 0.0)
    if not math.isfinite(growth):
        raise ValueError(f"snapshot_growth: {growth}: a factor of at least 1.01 is needed; 0 switches it off")
    return growth


def check_one_movement(movement: str | None, like: str | os.PathLike[str] | None) -> None:
    """Checks that the movement of the weights is given in one way.

    Raises:
        ValueError: If it is given in two.
    """
    if movement is not None and like is not None:
        raise ValueError(f"movement = {movement!r} and like = {os.fspath(like)!r}: give one of them")


def plan(
    targets: Iterable[Target],
    *,
    steps: int,
    sigma_rels: Iterable[float] | None = None,
    profiles: Iterable[Profile] = (),
    update_every: int = 10,
    update_after_step: int = 100,
    checkpoint_every: int = 1000,
    snapshot_growth: float | None = 1.2,
    max_checkpoints: int = 20,
    retention: Retention = (0.05, 0.28),
    step: int | None = None,
    checkpoint_dtype: Any = "float32",
    movement: str | None = None,
    like: str | os.PathLike[str] | None = None,
    noise: Noise = "off",
) -> list[Plan]:
    """Predicts how well averages can be synthesized after a training that has not begun.

    With `movement` or `like`, the plans have a predicted error of the weights.

    Args:
        targets: Profiles, or numbers as sigma_rel.
        steps: Length of the training in steps.
        sigma_rels: Power-function profiles to track; default 0.05 and 0.28 if `profiles` is empty, too.
        profiles: Further profiles to track.
        update_every: Steps between updates.
        update_after_step: First step at which an update may happen.
        checkpoint_every: Steps between snapshots.
        snapshot_growth: Factor between the times of further snapshots early in the training, None for none.
        max_checkpoints: Number of steps whose snapshots are kept.
        retention: Rule for the snapshots to keep: a range of sigma_rel to serve best, "latest", or a list of steps.
        step: Step of the averages; default that of the last snapshot.
        checkpoint_dtype: Dtype of averages in snapshots, for their predicted rounding.
        movement: Movement of the weights over the training: "walk", "cosine" (a walk with a learning rate that falls
            as a cosine), "line", "converge" (`exp(-t/0.2T)`) or "noise" (of each update). A size relative to the
            weights may follow, and several kinds add up: "walk:0.3+noise:0.01". Default size 1.
        like: Directory of another training's run, to predict errors as if the weights moved as there.
        noise: Regularisation; "auto" needs `movement` or `like`.

    Returns:
        A plan for each target, in their order.

    Raises:
        ValueError: If a profile, the schedule or the movement is not valid, or `like` does not show how its weights
            move.
        OSError: If `like` cannot be read.
    """
    check_one_movement(movement, like)
    if noise == "auto" and movement is None and like is None:
        raise ValueError("noise = 'auto' needs to know how the weights move: give movement or like, or a number")
    tracked = [*(Profile.sigma_rel(sigma_rel) for sigma_rel in sigma_rels or ()), *profiles]
    tracked = tracked or [Profile.sigma_rel(0.05), Profile.sigma_rel(0.28)]
    training = {
        "steps": int(steps),
        "update_every": int(update_every),
        "update_after_step": int(update_after_step),
        "checkpoint_every": int(checkpoint_every),
        "snapshot_growth": growth_number(snapshot_growth),
        "max_checkpoints": int(max_checkpoints),
        "retention": retention_to_dict(retention),
        "tracked": [profile.to_dict() for profile in tracked],
        "dtype": average_dtype_name(checkpoint_dtype or "float32"),
        "noise": noise_text(noise),
        "movement": movement,
        "like": None if like is None else os.fspath(like),
    }
    return Plan.from_json(_native.forecast(json.dumps(training), to_json(targets), step))
