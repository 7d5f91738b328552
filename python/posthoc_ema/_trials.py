"""Results of a sweep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import _native
from ._profiles import Profile, profile_json

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Best", "Comparison", "SweepLine", "Swept", "Trial"]


@dataclass(frozen=True)
class Trial:
    """An average and its evaluation."""

    profile: Profile
    """Profile of the average."""
    score: float | None
    """What the evaluation returned; None if it failed."""
    error: str | None
    """Reason of the failure; None for an evaluation with a score."""
    relative_error: float
    """Relative error of the synthesized profile, as in `Plan.relative_error`."""
    noise_gain: float
    """Amplification of the snapshots' rounding errors, as in `Plan.noise_gain`."""
    seconds: float
    """Duration of the evaluation."""
    refined: bool
    """True if the refinement chose the length, False if the caller asked for it."""
    means: Mapping[str, float | None] = field(default_factory=dict)
    """Mean of each metric over the repeats; None for a failure. Without metrics, the score under the name "score"."""
    repeats: Mapping[str, Any] = field(default_factory=dict)
    """Values by number of the repeat, in the order of the metrics; empty for a single value."""
    groups: Mapping[str, Profile] = field(default_factory=dict)
    """Profiles of groups of tensors by their glob, and of the second run as "with"; other tensors have `profile`."""

    @property
    def length(self) -> tuple[str, float] | None:
        """Name of the length ("sigma_rel", "half_life", "window" or "fraction") and its value; None for a table."""
        return _profile_length(self.profile)


@dataclass(frozen=True)
class Best:
    """The average with the best score."""

    profile: Profile
    """Profile of the average."""
    score: float
    """What the evaluation returned."""
    state_dict: dict[str, Any]
    """The average as `PostHocEMA.synthesize` returns it: new tensors in host memory."""
    path: Path | None
    """Safetensors file with the same values. None without `out`, and for the newest update of a training."""
    groups: Mapping[str, Profile] = field(default_factory=dict)
    """Profiles of groups of tensors by their glob, and of the second run as "with"."""
    with_state_dict: dict[str, Any] | None = None
    """The average of the second run that goes with it; None without one."""
    with_path: Path | None = None
    """Safetensors file of that average."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of the lengths by one metric."""

    best: Best
    """The best average by this metric. With repeats, the one as good as the best whose neighbours agree."""
    minimize: bool
    """True if small values are better, False if large ones are."""
    flat: bool
    """True if all lengths have the same score, with repeats within their noise. A flat curve is not refined."""
    standard_error: float | None
    """Standard error of a mean, without what all lengths share in a repeat; None without repeats. Of a joint sweep, see
    `Swept.lines`."""
    as_good: tuple[Profile, ...]
    """Profiles that the repeats do not tell from the best one, at a risk of 5%; empty without repeats. Of a joint
    sweep, see `Swept.lines`."""


@dataclass(frozen=True)
class SweepLine:
    """Last sweep along one length of a joint sweep, with the other ones at their best."""

    metric: str
    """Metric whose best it looks for; "score" if none was named."""
    part: str | None
    """Group that has the length, or "with" for the second run; None for the tensors without a group."""
    best: Profile
    """Best profile of this part along the line."""
    flat: bool
    """True if all lengths have the same score, with repeats within their noise."""
    edge: Literal["shortest", "longest"] | None
    """End of the evaluated lengths at which the best one is; None inside the range."""
    standard_error: float | None
    """As `Comparison.standard_error`."""
    as_good: tuple[Profile, ...]
    """As `Comparison.as_good`."""
    points: tuple[tuple[Profile, float | None, bool], ...]
    """Profile, score, and True for a refinement, of each trial along the line; None for a failure."""


@dataclass(frozen=True)
class Swept:
    """Result of a sweep."""

    best: Best
    """The best average, by the first metric."""
    results: tuple[Trial, ...]
    """All trials in the order of their evaluation, including those of an earlier call that was interrupted."""
    at: int
    """Step of the averages."""
    minimize: bool
    """True if small scores are better, False if large ones are."""
    edge: Literal["shortest", "longest"] | None
    """End of the evaluated lengths at which the best one is: lengths beyond it may do better. None inside the range."""
    at_limit: bool = False
    """True at an edge beyond which the run makes no average with a relative error of at most 5%."""
    flat: bool = False
    """True if all lengths have the same score, with repeats within their noise. A flat curve is not refined."""
    metrics: Mapping[str, Comparison] = field(default_factory=dict)
    """Comparison by each metric, in their order; by "score" if none was named."""
    unbeaten: tuple[Trial, ...] = ()
    """Trials that no other one beats: none is as good in all metrics, and better in one."""
    lines: tuple[SweepLine, ...] = ()
    """Last sweep along each length of a joint sweep, by metric; empty for a plain one."""
    settled: bool = True
    """False if the turns of a joint sweep ended before its lengths settled: more `rounds` may do better."""

    def plot(self, title: str | None = None, figsize: tuple[float, float] = (10, 6)) -> Image.Image:
        """Draws the score over the length.

        The picture is that of `posthoc-ema sweep --plot`. It shows the trials of the best one's family: a dot for each
        target, a ring for each step of the refinement, a label at the best, and a cross at the axis for each failure.
        With repeats, bars are one standard error to each side, and lengths as good as the best are shaded. Each metric
        has a panel. So has each length of a joint sweep.

        Args:
            title: Title of the picture; by default the best profile and its score.
            figsize: Width and height in inches, at 150 dots per inch. The picture keeps its proportions.

        Returns:
            An RGB image.

        Raises:
            ValueError: If the best profile is a table, which has no length.
        """
        from . import _draw

        best = self._trial(self.best.profile)
        if best.length is None:
            raise ValueError(f"the best profile is a {best.profile}, which has no length to draw the score over")
        groups = "".join(f", {profile} for {group}" for group, profile in self.best.groups.items())
        title = title or f"Best: {best.profile}{groups}, score {self.best.score:.6g}"
        if self.lines:
            return _draw.draw_scores([_line_curve(line) for line in self.lines], title, figsize)
        family = [trial for trial in self.results if _family(trial) == _family(best)]
        names: list[str | None] = [*self.metrics] or [None]
        return _draw.draw_scores([self._curve(name, family, best.length[0]) for name in names], title, figsize)

    def _trial(self, profile: Profile) -> Trial:
        return next(trial for trial in self.results if trial.profile == profile)

    def _curve(self, name: str | None, family: list[Trial], length_name: str) -> Curve:
        """Returns the curve of a metric."""
        comparison = None if name is None else self.metrics[name]
        best = self._trial(self.best.profile if comparison is None else comparison.best.profile)
        as_good = () if comparison is None else comparison.as_good
        points = [
            (
                trial.length[1],
                trial.score if name is None else trial.means.get(name),
                trial.refined,
                trial.profile in as_good,
            )
            for trial in family
            if trial.length is not None
        ]
        error = None if comparison is None else comparison.standard_error
        return points, family.index(best) if best in family else None, name or "score", length_name, error


Curve = tuple[list[tuple[float, float | None, bool, bool]], int | None, str, str, float | None]
"""Points, index of the best one, names of the scores and of the lengths, and standard error."""


def _line_curve(line: SweepLine) -> Curve:
    """Returns the curve of a line: the points of the best one's family."""
    family = _profile_length(line.best)
    points: list[tuple[float, float | None, bool, bool]] = []
    best = None
    for profile, score, refined in line.points:
        length = _profile_length(profile)
        if length is None or family is None or length[0] != family[0]:
            continue
        if profile == line.best:
            best = len(points)
        points.append((length[1], score, refined, profile in line.as_good))
    name = family[0] if family is not None else ""
    return points, best, line.metric, f"{name} of {line.part or 'other tensors'}", line.standard_error


def _profile_length(profile: Profile) -> tuple[str, float] | None:
    return _native.profile_length(profile_json(profile))


def _family(trial: Trial) -> tuple[object, ...] | None:
    """Returns a key that the trials of one curve share; None for a table."""
    if trial.length is None:
        return None
    description = trial.profile.to_dict()
    return (description["kind"], description.get("shape"), trial.length[0])


def profiles_from(descriptions: Iterable[dict[str, Any]]) -> tuple[Profile, ...]:
    """Returns profiles as the native part describes them."""
    return tuple(map(Profile, descriptions))


def lines_from_json(text: str) -> tuple[SweepLine, ...]:
    """Returns the lines of a joint sweep as the native part describes them."""

    def line(found: dict[str, Any]) -> SweepLine:
        points = tuple((Profile(profile), score, refined) for profile, score, refined in found.pop("points"))
        return SweepLine(
            best=Profile(found.pop("best")), as_good=profiles_from(found.pop("as_good")), points=points, **found
        )

    # A line without a success has none.
    return tuple(line(each) for each in json.loads(text) if each["best"] is not None)


def trials_from_json(text: str) -> tuple[Trial, ...]:
    """Returns trials as the native part describes them."""

    def trial(found: dict[str, Any]) -> Trial:
        profile = Profile(found.pop("profile"))
        groups = {name: Profile(description) for name, description in found.pop("groups", {}).items()}
        score, error = found.pop("score", None), found.pop("error", None)
        return Trial(profile=profile, score=score, error=error, groups=groups, **found)

    return tuple(trial(each) for each in json.loads(text))
