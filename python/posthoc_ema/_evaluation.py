"""Evaluations of a sweep: one after the other, or several at a time on threads."""

from __future__ import annotations

import contextvars
import inspect
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event

from . import _native
from ._plans import Plan
from ._sweep_averages import Candidate, Enter, SweepAverages

Evaluation = Callable[..., object]
"""Function of the caller that returns the score of an average."""


@dataclass
class CandidateTasks:
    """Evaluations of one candidate."""

    candidate: Candidate
    plan: Plan
    averages: list[Enter]
    """Functions that enter its averages; empty when no repeat is left."""
    left: int
    """Number of repeats that have not ended."""
    has_failed: bool = False


@dataclass(frozen=True)
class Outcome:
    """Result of one evaluation."""

    tasks: CandidateTasks
    repeat: int
    values: list[float] | None
    error: Exception | None
    seconds: float


class EvaluationLoop:
    """Evaluates the averages that a search asks for.

    Args:
        search: Search that chooses targets and records scores.
        averages: Averages of the runs.
        groups: Globs of the groups that have lengths of their own.
        evaluate: Function of the caller.
        metrics: Names of the metrics that it returns; none if it returns one number.
        jobs: Number of evaluations at a time.
    """

    def __init__(
        self,
        search: _native.Sweep,
        averages: SweepAverages,
        groups: tuple[str, ...],
        evaluate: Evaluation,
        metrics: tuple[str, ...],
        jobs: int,
    ):
        self._search = search
        self._averages = averages
        self._groups = groups
        self._evaluate = evaluate
        self._metrics = metrics
        self._jobs = jobs
        self._options = parameters(evaluate) & {"repeat", "job"}
        self.first_error: Exception | None = None
        """Exception of the first evaluation that failed."""

    def run(self, batch: int, report: Callable[[_native.Sweep], object]) -> None:
        """Evaluates until the search ends; each repeat is recorded at once."""
        while found := self._search.next(batch, self._averages.is_reached):
            candidates = [self._averages.candidate(key, point, self._groups) for key, point in found]
            keys = [candidate.key for candidate in candidates]
            plans = self._averages.plans(candidates)
            prepared = self._averages.prepare(candidates)
            repeats = [self._search.missing(key) for key in keys]
            tasks = [
                (CandidateTasks(candidate, plan, prepared.popleft(), len(missing)), missing)
                for candidate, plan, missing in zip(candidates, plans, repeats)
            ]
            # Ends all threads before an error of the record, or Ctrl-C, goes on.
            with closing(self._outcomes(tasks)) as outcomes:
                for outcome in outcomes:
                    self._record(outcome, keys)
                    report(self._search)

    def _outcomes(self, tasks: list[tuple[CandidateTasks, list[int]]]) -> Generator[Outcome, None, None]:
        """Yields the outcomes of a batch as they come. After a failure, no other repeat of its candidate begins."""
        each = [(of_candidate, repeat) for of_candidate, missing in tasks for repeat in missing]
        if self._jobs == 1:
            found = (self._outcome(of_candidate, repeat, 0) for of_candidate, repeat in each)
            yield from (outcome for outcome in found if outcome is not None)
            return
        free: SimpleQueue[int] = SimpleQueue()
        for job in range(self._jobs):
            free.put(job)

        is_over = Event()

        def with_job(of_candidate: CandidateTasks, repeat: int) -> Outcome | None:
            job = free.get()
            try:
                return None if is_over.is_set() else self._outcome(of_candidate, repeat, job)
            except BaseException:
                # Such as SystemExit: no other evaluation begins.
                is_over.set()
                raise
            finally:
                free.put(job)

        with ThreadPoolExecutor(self._jobs, thread_name_prefix="posthoc_ema sweep") as pool:
            futures: list[Future[Outcome | None]] = [
                pool.submit(contextvars.copy_context().run, with_job, of_candidate, repeat)
                for of_candidate, repeat in each
            ]
            try:
                for future in as_completed(futures):
                    if (outcome := future.result()) is not None:
                        yield outcome
            finally:
                is_over.set()

    def _outcome(self, tasks: CandidateTasks, repeat: int, job: int) -> Outcome | None:
        """Evaluates one repeat; None if another one has failed."""
        if tasks.has_failed:
            return None
        numbers = {"repeat": repeat, "job": job}
        options = {name: numbers[name] for name in self._options}
        values, error = None, None
        start = time.perf_counter()
        try:
            with ExitStack() as stack:
                averages = [enter(stack, job) for enter in tasks.averages]
                values = as_values(self._evaluate(*averages, **options), self._metrics)
                del averages
        except Exception as raised:
            tasks.has_failed = True
            error = raised
        seconds = time.perf_counter() - start
        tasks.left -= 1
        if tasks.has_failed or tasks.left == 0:
            # The memory of state dicts is free for the next ones.
            tasks.averages = []
        return Outcome(tasks, repeat, values, error, seconds)

    def _record(self, outcome: Outcome, batch: list[str]) -> None:
        error = None
        if outcome.error is not None:
            self.first_error = self.first_error or outcome.error
            error = f"{type(outcome.error).__name__}: {outcome.error}"
        plan = outcome.tasks.plan
        self._search.record(
            outcome.tasks.candidate.key,
            outcome.repeat,
            outcome.values,
            error,
            plan.relative_error,
            plan.noise_gain,
            outcome.seconds,
            batch,
        )


def parameters(evaluate: Evaluation) -> set[str]:
    """Returns the names of a function's parameters; none for functions of C without a signature."""
    try:
        return set(inspect.signature(evaluate).parameters)
    except (TypeError, ValueError):
        return set()


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


def _as_score(score: object) -> float:
    try:
        return float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"the evaluation returned {score!r:.100}: it must return one number") from error
