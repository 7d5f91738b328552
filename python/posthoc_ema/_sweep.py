"""Sweeps: averages of many lengths are evaluated, and the best one is returned."""

from __future__ import annotations

import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from . import _accuracy, _native
from ._model import Model
from ._options import whole_number
from ._plans import Noise, Plan, noise_text
from ._profiles import Profile, Target, profile_json, to_json
from ._progress import wants_bar
from ._run_reader import RunReader
from ._trials import Best, Comparison, Swept, Trial, trials_from_json

LOG = logging.getLogger("posthoc_ema")

SweepProgress = Callable[[int, int], object] | bool | None
"""Progress of a sweep: a function of the evaluations done and planned, True for a bar, or False for none.

The default None draws a bar if standard error is a terminal."""

Evaluation = Callable[..., object]
"""Function of the caller that returns the score of an average."""

ApplyEvaluation = Callable[[Evaluation], object]
"""Calls an evaluation with one average, and returns its result."""


class Synthesizer(Protocol):
    """The methods of `PostHocEMA` that a sweep calls."""

    def plan(self, targets: Sequence[Target], step: int | None, *, noise: Noise) -> list[Plan]: ...
    def synthesize(
        self, targets: Sequence[Target], step: int | None, *, noise: Noise, progress: bool
    ) -> list[dict[str, Any]]: ...
    def model(
        self, model: Model, sigma_rel: Target, step: int | None, *, noise: Noise
    ) -> AbstractContextManager[Model]: ...


def sweep(
    ema: Synthesizer,
    reader: RunReader,
    evaluate: Evaluation,
    profiles: list[Profile],
    *,
    model: Model,
    minimize: bool,
    metrics: Mapping[str, str] | None,
    repeats: int,
    refine: int,
    step: int | None,
    noise: Noise,
    out: str | os.PathLike[str] | None,
    name: str | None,
    batch: int,
    progress: SweepProgress,
) -> Swept:
    """Evaluates averages of many lengths; see `PostHocEMA.sweep`.

    Args:
        ema: Run, which synthesizes.
        reader: Reading side of the same run.
        profiles: Targets to evaluate.

    The other arguments are those of `PostHocEMA.sweep`.
    """
    if batch < 1:
        raise ValueError(f"batch = {batch}: must be at least 1")
    if not profiles:
        raise ValueError("there is nothing to evaluate: give targets or sigma_rels")
    at = ema.plan(profiles, step, noise=noise)[0].at
    reader.warn_of(profiles, step, noise)
    # Only snapshots can be named by a step, not the newest update of a tracker.
    step = step if reader.live(step) is not None else at
    directory = None if out is None else check_output_directory(out, reader.directory)
    name, is_unique = (name, True) if name is not None else evaluation_name(evaluate)
    search = _native.Sweep(
        to_json(profiles),
        minimize,
        whole_number("refine", refine) or 0,
        directory,
        reader.identity(),
        at,
        name,
        noise_text(noise),
        [f"{metric}:{direction}" for metric, direction in (metrics or {}).items()],
        check_repeats(repeats),
    )
    try:
        check_recorded_scores(search, name, is_unique, directory)
        averages = SweepAverages(ema, reader, step, noise, model)
        loop = EvaluationLoop(search, averages, evaluate, tuple(metrics or ()))
        with _accuracy.silenced():
            loop.run(batch, progress)
            return result(search, averages, at, directory, loop.first_error)
    finally:
        search.close()


def check_repeats(repeats: int) -> int:
    """Returns a number of repeats.

    Raises:
        ValueError: If it is below 1.
    """
    if (whole_number("repeats", repeats) or 0) < 1:
        raise ValueError(f"repeats = {repeats}: must be at least 1")
    return repeats


def result(
    search: _native.Sweep, averages: SweepAverages, at: int, directory: Path | None, first_error: Exception | None
) -> Swept:
    """Returns the result of a finished search, with the best average by each metric.

    Raises:
        RuntimeError: If all evaluations failed.
    """
    results = trials_from_json(search.trials())
    if search.best() is None:
        reasons = "; ".join(f"{trial.profile}: {trial.error}" for trial in results)
        raise RuntimeError(f"all {len(results)} evaluations failed: {reasons}") from first_error
    comparisons: dict[str, Comparison] = {}
    for found in json.loads(search.metrics()):
        file = "best.safetensors" if not comparisons else f"best-{found['name']}.safetensors"
        trial = results[found["best"]]
        score = trial.means[found["name"]]
        assert score is not None
        comparisons[found["name"]] = Comparison(
            best=averages.best(trial, score, None if directory is None else directory / file),
            minimize=found["minimize"],
            flat=found["flat"],
            standard_error=found["standard_error"],
            as_good=tuple(Profile(json.dumps(profile)) for profile in found["as_good"]),
        )
    first = next(iter(comparisons.values()))
    return Swept(
        best=first.best,
        results=results,
        at=at,
        minimize=first.minimize,
        edge=search.edge(),
        at_limit=search.is_at_limit(averages.is_reached),
        flat=first.flat,
        metrics=comparisons,
        unbeaten=tuple(results[number] for number in search.unbeaten()),
    )


class SweepAverages:
    """The averages that a sweep evaluates.

    Args:
        ema: Run, which synthesizes.
        reader: Reading side of the same run.
        step: Step of the averages; None for the newest update of a training.
        noise: Noise option of the synthesis.
        model: Model that holds each average for its evaluation; None to evaluate state dicts.
    """

    def __init__(self, ema: Synthesizer, reader: RunReader, step: int | None, noise: Noise, model: Model):
        self._ema = ema
        self._reader = reader
        self._step = step
        self._noise = noise
        self._model = model

    def plans(self, profiles: list[Profile]) -> list[Plan]:
        """Returns the plan of each profile."""
        return self._ema.plan(profiles, self._step, noise=self._noise)

    def is_reached(self, profile: str) -> bool:
        """Returns True if the run makes a profile, given as JSON, with a relative error of at most 5%."""
        try:
            [plan] = self.plans([Profile(profile)])
        except ValueError:
            return False
        return plan.warning is None

    def each(self, profiles: list[Profile]) -> Iterator[tuple[Profile, ApplyEvaluation]]:
        """Yields each profile of a batch with the function that evaluates its average."""
        if self._model is not None:
            return ((profile, partial(self._evaluate_in_model, profile)) for profile in profiles)
        return self._state_dicts(profiles)

    def best(self, trial: Trial, score: float, path: Path | None) -> Best:
        """Synthesizes a best average again: the evaluation may have changed its own."""
        state_dict = self._synthesize_one(trial.profile)
        if path is not None and self._reader.live(self._step) is None:
            self._reader.write_best(trial.profile, path, self._step, self._noise)
        else:
            path = None
        return Best(trial.profile, score, state_dict, path)

    def _state_dicts(self, profiles: list[Profile]) -> Iterator[tuple[Profile, ApplyEvaluation]]:
        """Synthesizes a batch in one pass."""
        try:
            state_dicts = self._ema.synthesize(profiles, self._step, noise=self._noise, progress=False)
        except ValueError:
            # One average does not fit its dtype: synthesized alone, no other one fails with it.
            for profile in profiles:
                yield profile, partial(self._evaluate_one, profile)
            return
        for profile in profiles:
            # Popped, so that its memory is free after the evaluation.
            yield profile, partial(_apply, state_dicts.pop(0))

    def _synthesize_one(self, profile: Profile) -> dict[str, Any]:
        if self._model is not None:
            [state_dict] = self._reader.synthesize([profile], self._step, None, self._noise, False, self._model)
        else:
            [state_dict] = self._ema.synthesize([profile], self._step, noise=self._noise, progress=False)
        return state_dict

    def _evaluate_one(self, profile: Profile, evaluate: Evaluation) -> object:
        return evaluate(self._synthesize_one(profile))

    def _evaluate_in_model(self, profile: Profile, evaluate: Evaluation) -> object:
        with self._ema.model(self._model, profile, self._step, noise=self._noise) as averaged:
            return evaluate(averaged)


def _apply(state_dict: dict[str, Any], evaluate: Evaluation) -> object:
    return evaluate(state_dict)


class EvaluationLoop:
    """Evaluates the averages that a search asks for.

    Args:
        search: Search that chooses targets and records scores.
        averages: Averages of the run.
        evaluate: Function of the caller.
        metrics: Names of the metrics that it returns; none if it returns one number.
    """

    def __init__(
        self, search: _native.Sweep, averages: SweepAverages, evaluate: Evaluation, metrics: tuple[str, ...] = ()
    ):
        self._search = search
        self._averages = averages
        self._evaluate = evaluate
        self._metrics = metrics
        self._takes_repeat = takes_repeat(evaluate)
        self.first_error: Exception | None = None
        """Exception of the first evaluation that failed."""

    def run(self, batch: int, progress: SweepProgress) -> None:
        """Evaluates until the search ends; each repeat is recorded at once."""
        with _evaluation_progress(progress) as report:
            while targets := self._search.next(batch, self._averages.is_reached):
                profiles = [Profile(text) for text in targets]
                plans = dict(zip(profiles, self._averages.plans(profiles)))
                for profile, apply in self._averages.each(profiles):
                    for repeat in self._search.missing(profile_json(profile)):
                        has_score = self._record(plans[profile], repeat, apply)
                        report(self._search)
                        if not has_score:
                            break

    def _record(self, plan: Plan, repeat: int, apply: ApplyEvaluation) -> bool:
        """Evaluates one average and records its values or its error. Returns False after an error."""
        values = None
        error = None
        evaluate = partial(self._evaluate, repeat=repeat) if self._takes_repeat else self._evaluate
        start = time.perf_counter()
        try:
            values = as_values(apply(evaluate), self._metrics)
        except Exception as raised:
            self.first_error = self.first_error or raised
            error = f"{type(raised).__name__}: {raised}"
        seconds = time.perf_counter() - start
        target = profile_json(plan.profile)
        return self._search.record(target, repeat, values, error, plan.relative_error, plan.noise_gain, seconds)


def takes_repeat(evaluate: Evaluation) -> bool:
    """Returns True if a function has a parameter with the name `repeat`."""
    try:
        parameters = inspect.signature(evaluate).parameters
    except (TypeError, ValueError):
        # Some functions of C have no signature.
        return False
    return "repeat" in parameters


def as_values(returned: object, metrics: tuple[str, ...]) -> list[float]:
    """Returns the values of the metrics that an evaluation returned.

    Raises:
        TypeError: If a value is not a number, or the metrics are not in a dictionary.
        ValueError: If a metric is missing.
    """
    if not metrics:
        return [_as_score(returned)]
    if not isinstance(returned, Mapping):
        raise TypeError(f"the evaluation returned {returned!r:.100}: it must return a dictionary of {list(metrics)}")
    if missing := [name for name in metrics if name not in returned]:
        raise ValueError(f"the evaluation returned no {missing[0]}, but {sorted(map(str, returned))}")
    return [_as_score(returned[name]) for name in metrics]


def evaluation_name(evaluate: Callable[..., object]) -> tuple[str, bool]:
    """Returns the name under which an evaluation is recorded, and True if no other function has it."""
    if isinstance(evaluate, partial):
        return f"partial({evaluation_name(evaluate.func)[0]})", False
    if not hasattr(evaluate, "__qualname__"):
        kind = type(evaluate)
        return f"{kind.__module__}.{kind.__qualname__}()", False
    name = f"{getattr(evaluate, '__module__', None)}.{evaluate.__qualname__}"
    # Methods of two objects share a name. So do lambdas, and functions that are defined within another one.
    bound = getattr(evaluate, "__self__", None)
    is_unique = bound is None or isinstance(bound, (type, ModuleType))
    return name, is_unique and "<" not in name


def check_recorded_scores(search: _native.Sweep, name: str, is_unique: bool, directory: Path | None) -> None:
    """Logs that a sweep continues from recorded scores.

    Args:
        search: Search that has read the record.
        name: Name of the evaluation.
        is_unique: True if no other evaluation can have this name.
        directory: Directory of the record; None if there is none.

    Raises:
        ValueError: If the scores may be those of another evaluation.
    """
    if directory is None or not (count := _count(search)):
        return
    file = directory / "sweep.json"
    if not is_unique:
        raise ValueError(
            f"{file}: its {count} scores are of {name}, a name that other functions may share: give name={name!r} if"
            " they are of this one, else another directory; a `name` from the first call on keeps evaluations apart"
        )
    LOG.warning("%s: continuing with the %d scores of %s that are recorded here", file, count, name)


def check_output_directory(out: str | os.PathLike[str], run: Path) -> Path:
    """Returns the absolute path of a sweep's directory: an evaluation may change the working directory.

    Raises:
        ValueError: If it is the run's directory or below it.
    """
    directory = Path(out).absolute()
    inside = run.resolve()
    if inside == directory.resolve() or inside in directory.resolve().parents:
        raise ValueError(f"out = {out}: a run's directory holds nothing but its snapshots: give one outside of {run}")
    return directory


def _as_score(score: object) -> float:
    try:
        return float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"the evaluation returned {score!r:.100}: it must return one number") from error


def _count(search: _native.Sweep) -> int:
    return len(json.loads(search.trials()))


@contextmanager
def _evaluation_progress(progress: SweepProgress) -> Iterator[Callable[[_native.Sweep], object]]:
    """Yields the function that is called after each evaluation."""
    if callable(progress):
        report = progress
        yield lambda search: report(search.done(), search.planned())
    elif wants_bar(progress):
        from tqdm import tqdm

        with tqdm(desc="evaluating", unit="average", leave=False) as bar:
            yield partial(_advance, bar)
    else:
        yield lambda search: None


def _advance(bar: Any, search: _native.Sweep) -> None:
    """Moves a bar to the evaluations done, and shows the best one so far."""
    bar.total = search.planned()
    number = search.best()
    if number is not None:
        best = trials_from_json(search.trials())[number]
        bar.set_postfix_str(f"best so far {best.score:g} at {best.profile}", refresh=False)
    bar.update(search.done() - bar.n)
