"""Many lengths, one evaluation each, the best kept."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from . import _native
from ._plans import Noise, Plan, noise_text
from ._profiles import Profile

if TYPE_CHECKING:
    from PIL import Image

    from .posthoc_ema import PostHocEMA

__all__ = ["Best", "Swept", "Trial"]

LOG = logging.getLogger("posthoc_ema")

Progress = Callable[[int, int], object] | bool | None
"""A function of the evaluations done and planned, or whether to draw a bar.

None draws a bar where the standard error is a terminal."""


@dataclass(frozen=True)
class Trial:
    """One average and its evaluation."""

    profile: Profile
    score: float | None
    """None where the evaluation failed."""
    error: str | None
    """Why it failed."""
    relative_error: float
    """How far the synthesized profile is from the one asked for (`Plan.relative_error`)."""
    noise_gain: float
    """By how much rounding errors of the snapshots were amplified (`Plan.noise_gain`)."""
    seconds: float
    """How long the evaluation took."""
    refined: bool
    """Whether the refinement chose it; otherwise it was asked for."""

    @property
    def length(self) -> tuple[str, float] | None:
        """What the length is called ("sigma_rel", "half_life", "window" or "fraction") and how long it is; None for a table."""
        return _native.profile_length(self.profile._json)


@dataclass(frozen=True)
class Best:
    """The best average."""

    profile: Profile
    score: float
    state_dict: dict[str, Any]
    """Fresh tensors in host memory, as `PostHocEMA.synthesize` gives them."""
    path: Path | None
    """The safetensors file with the same values: where the sweep has a directory, and the average comes from snapshots."""


@dataclass(frozen=True)
class Swept:
    """What came of a sweep."""

    best: Best
    results: tuple[Trial, ...]
    """All trials in the order of their evaluation, those of an earlier call that was interrupted among them."""
    at: int
    """The step of the averages."""
    minimize: bool
    """Whether small scores are the better ones."""
    edge: Literal["shortest", "longest"] | None
    """At which end of what was evaluated the best lies: targets beyond it may do better."""

    def plot(self, title: str | None = None, figsize: tuple[float, float] = (10, 6)) -> Image.Image:
        """Draws the score over the length, in the family of the best.

        Args:
            title: above the picture.
            figsize: inches, at 150 dots each.

        Returns:
            A picture of PIL.
        """
        from . import visualization

        return visualization.plot_sweep(self, title, figsize)


Averaged = Callable[[Callable[[Any], object]], object]
"""Calls an evaluation with its average, and returns what that returns."""


class Averages:
    """What a sweep evaluates.

    Args:
        ema: the run.
        step: the step of the averages; None for the newest update of a training.
        noise: what is done about the snapshots' rounding.
        model: the model in which averages are evaluated; None for state dicts.
    """

    def __init__(self, ema: PostHocEMA, step: int | None, noise: Noise, model: Any):
        self._ema, self._step, self._noise, self._model = ema, step, noise, model

    def plans(self, profiles: list[Profile]) -> list[Plan]:
        """The solved weights of targets."""
        return self._ema.plan(profiles, self._step, noise=self._noise)

    def each(self, profiles: list[Profile]) -> Iterator[tuple[Profile, Averaged]]:
        """The profiles of a batch one after the other, each with its average for an evaluation."""
        if self._model is not None:
            return ((profile, partial(self._in_model, profile)) for profile in profiles)
        return self._state_dicts(profiles)

    def best(self, trial: Trial, directory: Path | None) -> Best:
        """The best average, synthesized once more: the evaluation may have changed its own."""
        state_dict, path = self._alone(trial.profile), None
        if directory is not None and self._ema._live(self._step) is None:
            path = directory / "best.safetensors"
            noise = noise_text(self._noise)
            self._ema._run().write([trial.profile._json], self._step, noise, [path], None, "cpu", None)
        assert trial.score is not None
        return Best(trial.profile, trial.score, state_dict, path)

    def _state_dicts(self, profiles: list[Profile]) -> Iterator[tuple[Profile, Averaged]]:
        """State dicts of one pass."""
        try:
            state_dicts = self._ema.synthesize(profiles, self._step, noise=self._noise, progress=False)
        except ValueError:
            # An average that its dtype cannot hold fails alone.
            for profile in profiles:
                yield profile, partial(self._evaluate_alone, profile)
            return
        for profile in profiles:
            # Free again when it has been evaluated.
            yield profile, partial(_evaluate, state_dicts.pop(0))

    def _alone(self, profile: Profile) -> dict[str, Any]:
        [state_dict] = self._ema.synthesize([profile], self._step, noise=self._noise, progress=False)
        return state_dict

    def _evaluate_alone(self, profile: Profile, evaluate: Callable[[Any], object]) -> object:
        return evaluate(self._alone(profile))

    def _in_model(self, profile: Profile, evaluate: Callable[[Any], object]) -> object:
        with self._ema.model(self._model, profile, self._step, noise=self._noise) as held:
            return evaluate(held)


def _evaluate(state_dict: dict[str, Any], evaluate: Callable[[Any], object]) -> object:
    return evaluate(state_dict)


class Evaluations:
    """A search under way.

    Args:
        search: what to evaluate next.
        averages: what is evaluated.
        evaluate: the user's function.
    """

    def __init__(self, search: _native.Sweep, averages: Averages, evaluate: Callable[[Any], object]):
        self._search, self._averages, self._evaluate = search, averages, evaluate
        self.first: Exception | None = None
        """What the first evaluation raised that failed."""

    def run(self, batch: int, progress: Progress) -> None:
        """Evaluates until the search is over; each trial is recorded at once."""
        with _following(progress) as told:
            while targets := self._search.next(batch):
                profiles = [Profile(text) for text in targets]
                plans = dict(zip(profiles, self._averages.plans(profiles)))
                for profile, averaged in self._averages.each(profiles):
                    self._evaluate_one(plans[profile], averaged)
                    told(self._search)

    def _evaluate_one(self, plan: Plan, averaged: Averaged) -> None:
        score, error, start = None, None, time.perf_counter()
        try:
            score = _number(averaged(self._evaluate))
        except Exception as raised:
            self.first = self.first or raised
            error = f"{type(raised).__name__}: {raised}"
        seconds = time.perf_counter() - start
        self._search.record(plan.profile._json, score, error, plan.relative_error, plan.noise_gain, seconds)


def trials_of(search: _native.Sweep) -> tuple[Trial, ...]:
    """All trials so far."""

    def trial(found: dict[str, Any]) -> Trial:
        profile = Profile(found.pop("profile"))
        return Trial(profile=profile, score=found.pop("score", None), error=found.pop("error", None), **found)

    return tuple(trial(each) for each in json.loads(search.trials()))


def name_of(evaluate: Callable[..., object]) -> tuple[str, bool]:
    """What a record knows a function by, and whether no other function has that name."""
    if isinstance(evaluate, partial):
        return f"partial({name_of(evaluate.func)[0]})", False
    if not hasattr(evaluate, "__qualname__"):
        kind = type(evaluate)
        return f"{kind.__module__}.{kind.__qualname__}()", False
    name = f"{getattr(evaluate, '__module__', None)}.{evaluate.__qualname__}"
    # What a method is bound to may differ; a function made in another may be another each time.
    bound = getattr(evaluate, "__self__", None)
    own = bound is None or isinstance(bound, (type, ModuleType))
    return name, own and "<" not in name


def check_resumed(search: _native.Sweep, name: str, own: bool, directory: Path | None) -> None:
    """Tells that scores were taken from a record; `own` says that they can only be of this evaluation.

    Raises:
        ValueError: where they may be another's.
    """
    if directory is None or not (count := len(json.loads(search.trials()))):
        return
    file = directory / "sweep.json"
    if not own:
        raise ValueError(
            f"{file}: the {count} scores here are of {name}, and other functions are called so, too: give"
            f" name={name!r} where they are of this one, or another directory; a `name` of its own from the"
            " first call on tells evaluations apart"
        )
    LOG.warning("%s: going on with the %d scores of %s that are recorded here", file, count, name)


def check_apart(out: str | os.PathLike[str], run: Path) -> Path:
    """A sweep's directory, absolute, as an evaluation may change its own; it lies neither in the run's nor below it.

    Raises:
        ValueError: where it does.
    """
    directory, inside = Path(out).absolute(), run.resolve()
    if inside == directory.resolve() or inside in directory.resolve().parents:
        raise ValueError(f"out = {out}: a run's directory holds nothing but its snapshots: sweep elsewhere")
    return directory


def _number(score: object) -> float:
    try:
        return float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"the evaluation returned {score!r:.100}: it must return one number") from error


@contextmanager
def _following(progress: Progress) -> Iterator[Callable[[_native.Sweep], object]]:
    """What is called after each evaluation."""
    if callable(progress):
        tell = progress
        yield lambda search: tell(len(json.loads(search.trials())), search.planned())
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda search: None
        return
    from tqdm import tqdm

    with tqdm(desc="evaluating", unit="average", leave=False) as bar:

        def told(search: _native.Sweep) -> None:
            bar.total, number = search.planned(), search.best()
            if number is not None:
                best = trials_of(search)[number]
                bar.set_postfix_str(f"best so far {best.score:g} at {best.profile}", refresh=False)
            bar.update(len(json.loads(search.trials())) - bar.n)

        yield told
