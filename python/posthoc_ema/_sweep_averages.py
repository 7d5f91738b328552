"""Averages that a sweep evaluates: of one run, or of two."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from . import _native
from ._model import Model
from ._plans import Noise, Plan
from ._profiles import Profile, Target
from ._run_reader import RunReader
from ._written_averages import AverageWriter

WITH = "with"
"""Name of the second run among the parts of a joint sweep."""

Enter = Callable[[ExitStack, int], object]
"""Returns an average for an evaluation, given what ends with the evaluation and the number of the job."""


class GroupedTarget(Profile):
    """Target of an average in which groups of tensors have profiles of their own.

    Args:
        profile: Profile of the tensors without a group.
        groups: Profile of each group, by the glob that chooses its tensors.
    """

    def __init__(self, profile: Profile, groups: dict[str, Profile]):
        self._json = json.dumps({"profile": profile.to_dict(), "groups": {g: p.to_dict() for g, p in groups.items()}})
        self._name = ", ".join([str(profile), *(f"{other} for {group}" for group, other in groups.items())])


def grouped(profile: Profile, groups: dict[str, Profile]) -> Profile:
    """Returns the target of an average; a plain profile without groups."""
    return GroupedTarget(profile, groups) if groups else profile


@dataclass(frozen=True)
class Candidate:
    """Averages that are evaluated together."""

    key: str
    """Profile that is searched, as JSON."""
    target: Profile
    """Target of the run."""
    second: Profile | None
    """Target of the second run."""


class Synthesizer(Protocol):
    """The methods of `PostHocEMA` that a sweep calls."""

    def plan(self, targets: Sequence[Target], step: int | None, *, noise: Noise) -> list[Plan]: ...
    def synthesize(
        self, targets: Sequence[Target], step: int | None, *, noise: Noise, progress: bool
    ) -> list[dict[str, Any]]: ...
    def model(
        self, model: Model, sigma_rel: Target, step: int | None, *, noise: Noise
    ) -> AbstractContextManager[Model]: ...


class SweptRun:
    """A run of a sweep.

    Args:
        ema: Run, which synthesizes.
        reader: Reading side of the same run.
        step: Step of the averages; None for the newest update of a training.
        noise: Noise option of the synthesis.
        models: Models that hold the averages, one for each job; None to evaluate state dicts or paths.
        writer: Writer of averages in a form, whose paths are evaluated unless there are models.
    """

    def __init__(
        self,
        ema: Synthesizer,
        reader: RunReader,
        step: int | None,
        noise: Noise,
        models: Sequence[Model] | None,
        writer: AverageWriter,
    ):
        self._ema = ema
        self._reader = reader
        self._step = step
        self._noise = noise
        self._models = models
        self._writer = writer
        self.form = writer.form
        """Form of its averages."""

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

    def prepare(self, targets: list[Profile]) -> list[Enter]:
        """Returns for each target of a batch the function that enters its average.

        State dicts are synthesized in one pass, and are free when their function is.
        """
        if self._models is not None:
            return [self._in_model(target) for target in targets]
        if not self._writer.form.is_plain():
            return self._written(targets)
        try:
            state_dicts = self._ema.synthesize(targets, self._step, noise=self._noise, progress=False)
        except ValueError:
            # One average does not fit its dtype: synthesized alone, no other one fails with it.
            return [self._alone(target) for target in targets]
        return [_given(state_dict) for state_dict in state_dicts]

    def synthesize(self, target: Profile) -> dict[str, Any]:
        """Returns the state dict of an average."""
        if self._models is not None:
            [found] = self._reader.synthesize([target], self._step, None, self._noise, False, self._models[0])
        else:
            [found] = self._ema.synthesize([target], self._step, noise=self._noise, progress=False)
        return found

    def write(self, target: Profile, path: Path | None) -> Path | None:
        """Writes an average. Returns None, and writes nothing, without a path and for the newest update."""
        if path is None or self._reader.live(self._step) is not None:
            return None
        self._writer.replace(path, target, self._write_paths)
        return path

    def extension(self) -> str:
        """Returns the extension of written averages."""
        return self._writer.extension()

    def _write_paths(self, targets: list[Profile], paths: list[Path], form: _native.OutputForm) -> None:
        self._reader.write_paths(targets, paths, self._step, self._noise, form)

    def check(self, target: Profile) -> list[str]:
        """Checks that averages fit the form, and returns notes on it.

        Raises:
            ValueError: If they do not, or are of the newest update of a training, which is not written.
        """
        if self._writer.form.is_plain():
            return []
        if self._reader.live(self._step) is not None:
            raise ValueError("like, shard_size, rename: give the `step` of a snapshot, as only these are written")
        return self._reader.check_form([target], self._step, self._writer.form)

    def close(self) -> None:
        """Removes written averages."""
        self._writer.close()

    def _written(self, targets: list[Profile]) -> list[Enter]:
        """Returns the paths of averages, each of which is removed after its evaluations."""
        plans = self.plans(targets)
        try:
            return list(self._writer.write(targets, plans, self._write_paths))
        except ValueError:
            if len(targets) == 1:
                # Only its own evaluation fails.
                return [self._failed(targets[0], plans[0])]
            return [enter for target in targets for enter in self._written([target])]

    def _failed(self, target: Profile, plan: Plan) -> Enter:
        def enter(stack: ExitStack, job: int) -> object:
            [average] = self._writer.write([target], [plan], self._write_paths)
            return average(stack, job)

        return enter

    def _alone(self, target: Profile) -> Enter:
        return lambda stack, job: self.synthesize(target)

    def _in_model(self, target: Profile) -> Enter:
        def enter(stack: ExitStack, job: int) -> object:
            assert self._models is not None
            model = self._models[job]
            return stack.enter_context(self._ema.model(model, target, self._step, noise=self._noise))

        return enter


def _given(state_dict: dict[str, Any]) -> Enter:
    return lambda stack, job: state_dict


class SweepAverages:
    """The averages of a sweep over one or two runs."""

    def __init__(self, first: SweptRun, second: SweptRun | None):
        self.first = first
        self.second = second

    def candidate(self, key: str, point: Iterable[str], groups: Sequence[str]) -> Candidate:
        """Returns the averages of a point: of the tensors without a group, of each group, and of the second run."""
        base, *others = map(Profile, point)
        parts = dict(zip(groups, others))
        return Candidate(key, grouped(base, parts), others[len(groups)] if self.second is not None else None)

    def plans(self, candidates: list[Candidate]) -> list[Plan]:
        """Returns the plan of each candidate in the run."""
        return self.first.plans([candidate.target for candidate in candidates])

    def is_reached(self, profile: str) -> bool:
        """Returns True if all runs make a profile, given as JSON, with a relative error of at most 5%."""
        return self.first.is_reached(profile) and (self.second is None or self.second.is_reached(profile))

    def prepare(self, candidates: list[Candidate]) -> deque[list[Enter]]:
        """Returns for each candidate of a batch the functions that enter its averages."""
        prepared = [self.first.prepare([candidate.target for candidate in candidates])]
        if self.second is not None:
            prepared.append(self.second.prepare([c.second for c in candidates if c.second is not None]))
        return deque(map(list, zip(*prepared)))

    def check(self, target: Profile, second: Profile) -> list[str]:
        """Checks that the averages of all runs fit their forms, and returns notes on these."""
        notes = self.first.check(target)
        return notes if self.second is None else notes + self.second.check(second)

    def forms(self) -> tuple[_native.OutputForm, _native.OutputForm]:
        """Returns the forms of the averages of the run and of the second one."""
        return self.first.form, (self.second or self.first).form

    def extensions(self) -> tuple[str, str]:
        """Returns the extensions of written averages of the run and of the second one."""
        return self.first.extension(), self.second.extension() if self.second is not None else ""

    def close(self) -> None:
        """Removes written averages."""
        self.first.close()
        if self.second is not None:
            self.second.close()
