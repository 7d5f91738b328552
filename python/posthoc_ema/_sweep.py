"""Sweeps: averages of many lengths are evaluated, and the best one is returned."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from . import _accuracy, _native
from ._evaluation import Evaluation, EvaluationLoop
from ._model import Model
from ._options import whole_number
from ._plans import Noise, noise_text
from ._profiles import Profile, to_json
from ._progress import wants_bar
from ._run_reader import RunReader
from ._sweep_averages import WITH, SweepAverages, SweptRun, Synthesizer, grouped
from ._trials import Best, Comparison, Swept, Trial, lines_from_json, profiles_from, trials_from_json
from ._written_averages import AverageWriter, FormOptions

LOG = logging.getLogger("posthoc_ema")

SweepProgress = Callable[[int, int], object] | bool | None
"""Progress of a sweep: a function of the evaluations done and planned, True for a bar, or False for none.

The default None draws a bar if standard error is a terminal."""


@dataclass(frozen=True)
class JointOptions:
    """Options of a joint sweep."""

    groups: tuple[str, ...] = ()
    """Globs of tensors with a length of their own."""
    second: tuple[Synthesizer, RunReader] | None = None
    """Second run."""
    second_model: Model = None
    """Model that holds its averages, or one for each job."""
    rounds: int = 2
    """Turns in which each length is swept at most."""
    second_form: FormOptions = FormOptions()
    """Form of the second run's averages."""

    def __post_init__(self) -> None:
        if self.second is not None and WITH in self.groups:
            raise ValueError(f"groups: {WITH!r} is the name of the second run: write '[w]ith'")

    def settings(self, profiles: list[Profile], noise: Noise) -> dict[str, Any]:
        """Returns the settings as the native part takes them."""
        rounds = whole_number("rounds", self.rounds) or 0
        return {"groups": self.groups, "with": second_identity(self, profiles, noise), "rounds": rounds}

    def swept_run(self, noise: Noise, jobs: int, directory: Path | None) -> SweptRun | None:
        """Returns the second run as a sweep takes it."""
        if self.second is None:
            return None
        writer = AverageWriter(self.second_form.read(), directory, "evaluating-with")
        return SweptRun(*self.second, None, noise, models("with_model", self.second_model, jobs), writer)


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
    jobs: int = 1,
    joint: JointOptions = JointOptions(),
    form: FormOptions,
) -> Swept:
    """Evaluates averages of many lengths; see `PostHocEMA.sweep`.

    Args:
        ema: Run, which synthesizes.
        reader: Reading side of the same run.
        profiles: Targets to evaluate.
        joint: Groups and second run that have lengths of their own.
        form: Form of the averages.

    The other arguments are those of `PostHocEMA.sweep`.
    """
    positive("batch", batch)
    if not profiles:
        raise ValueError("there is nothing to evaluate: give targets or sigma_rels")
    if joint.groups and reader.live(step) is not None:
        raise ValueError("groups: an average of the newest update has one length: give the `step` of a snapshot")
    first_target = grouped(profiles[0], {group: profiles[0] for group in joint.groups})
    at = ema.plan([first_target], step, noise=noise)[0].at
    reader.warn_of(profiles, step, noise)
    # Only snapshots can be named by a step, not the newest update of a tracker.
    step = step if reader.live(step) is not None else at
    directory = None if out is None else check_output_directory(out, reader.directory)
    name, is_unique = (name, True) if name is not None else evaluation_name(evaluate)
    settings = {
        "minimize": minimize,
        "metrics": [f"{metric}:{direction}" for metric, direction in (metrics or {}).items()],
        "repeats": positive("repeats", repeats),
        "refine": whole_number("refine", refine) or 0,
        "jobs": positive("jobs", jobs),
        **joint.settings(profiles, noise),
        "run": reader.identity(),
        "at": at,
        "evaluation": name,
        "noise": noise_text(noise),
    }
    writer = AverageWriter(form.read(), directory, "evaluating")
    first = SweptRun(ema, reader, step, noise, models("model", model, jobs), writer)
    averages = SweepAverages(first, joint.swept_run(noise, jobs, directory))
    warn_of_form(averages.check(first_target, profiles[0]))
    search = _native.Sweep(to_json(profiles), json.dumps(settings), directory, *averages.forms())
    try:
        check_recorded_scores(search, name, is_unique, directory)
        loop = EvaluationLoop(search, averages, joint.groups, evaluate, tuple(metrics or ()), jobs)
        with _accuracy.silenced():
            with _evaluation_progress(progress) as report:
                loop.run(batch, report)
            return result(search, averages, at, directory, loop.first_error)
    finally:
        averages.close()
        search.close()


def warn_of_form(notes: list[str]) -> None:
    """Warns of tensors that are renamed or left out to fit a form."""
    for note in notes:
        warnings.warn(note, stacklevel=4)


def positive(name: str, value: int) -> int:
    """Returns a number that is at least 1.

    Raises:
        ValueError: If it is below 1.
    """
    if (whole_number(name, value) or 0) < 1:
        raise ValueError(f"{name} = {value}: must be at least 1")
    return value


def models(name: str, model: Model, jobs: int) -> list[Model] | None:
    """Returns the model of each job; None to evaluate state dicts.

    Raises:
        ValueError: If jobs would share a model.
    """
    if model is None:
        return None
    if jobs == 1 and not isinstance(model, (list, tuple)):
        return [model]
    if not isinstance(model, (list, tuple)) or len(model) != jobs:
        raise ValueError(f"{name}: {jobs} evaluations at a time need a list of {jobs} models, one for each job")
    if len({id(each) for each in model}) != jobs:
        raise ValueError(f"{name}: two jobs have the same model: give each a copy of its own")
    return list(model)


def second_identity(joint: JointOptions, profiles: list[Profile], noise: Noise) -> str | None:
    """Returns the name under which a sweep records the second run and the step of its averages."""
    if joint.second is None:
        return None
    ema, reader = joint.second
    at = ema.plan(profiles, None, noise=noise)[0].at
    return f"{reader.identity()} at step {at}"


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
    lines = lines_from_json(search.lines())
    comparisons: dict[str, Comparison] = {}
    for found in json.loads(search.metrics()):
        trial = results[found["best"]]
        score = trial.means[found["name"]]
        assert score is not None
        along = [line for line in lines if line.metric == found["name"]]
        comparisons[found["name"]] = Comparison(
            best=best(averages, trial, score, directory, found["name"] if comparisons else None),
            minimize=found["minimize"],
            flat=all(line.flat for line in along) if along else found["flat"],
            standard_error=found.get("standard_error"),
            as_good=profiles_from(found["as_good"]),
        )
    first = next(iter(comparisons.values()))
    return Swept(
        best=first.best,
        results=results,
        at=at,
        minimize=first.minimize,
        edge=None if lines else search.edge(),
        at_limit=not lines and search.is_at_limit(averages.is_reached),
        flat=first.flat,
        metrics=comparisons,
        unbeaten=tuple(results[number] for number in search.unbeaten()),
        lines=lines,
        settled=search.is_settled(),
    )


def best(averages: SweepAverages, trial: Trial, score: float, directory: Path | None, metric: str | None) -> Best:
    """Synthesizes a best average again: the evaluation may have changed its own.

    Args:
        averages: Averages of the sweep.
        trial: Trial of the average.
        score: Its score.
        directory: Directory of the file or folder; None for none.
        metric: Metric that it is named after; None for the first one.
    """
    stem = "best" if metric is None else f"best-{metric}"
    groups = {name: profile for name, profile in trial.groups.items() if averages.second is None or name != WITH}
    target = grouped(trial.profile, groups)
    second, with_target = averages.second, trial.groups.get(WITH)
    extension, with_extension = averages.extensions()
    with_state, with_path = None, None
    if second is not None and with_target is not None:
        with_state = second.synthesize(with_target)
        with_path = second.write(with_target, directory and directory / f"{stem}-with{with_extension}")
    return Best(
        profile=trial.profile,
        score=score,
        state_dict=averages.first.synthesize(target),
        path=averages.first.write(target, directory and directory / f"{stem}{extension}"),
        groups=trial.groups,
        with_state_dict=with_state,
        with_path=with_path,
    )


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
