"""Running averages of a model while it trains, and averages of any length afterwards (Karras et al. 2023)."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _native, _swap, _sweeping
from ._dtypes import stored_name
from ._lend import Lender, is_torch, torch_module
from ._model import MappingTensors, ModuleTensors, tensors_of
from ._options import (
    DEFAULTS,
    STATE,
    Counter,
    check_calculation_dtype,
    check_device,
    check_old_checkpoints,
    count,
    rank,
    refuse,
)
from ._outputs import Fresh
from ._plans import Noise, Plan, Retention, noise_text, plan, retention_to_dict
from ._profiles import Profile, Target, as_profile, to_json
from ._progress import Progress, following
from ._tracked_average import TrackedAverage

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PostHocEMA"]

Model = Any
"""A module of PyTorch, or a mapping of names to tensors of PyTorch, arrays of numpy, or anything with DLPack."""


class PostHocEMA:
    """Tracks running averages of a model, stores snapshots of them, and synthesizes averages of any length from these.

    Made by :meth:`from_model` to train, and by :meth:`from_path` to synthesize afterwards.

    A floating-point tensor (f32, f16, bf16, f64) is averaged in f32 with a compensation term, exact for any interval of
    updates; integers and booleans are copied from the newest update. Sums of a synthesis are taken in f64. A number as a
    target is a ``sigma_rel``, the standard deviation of the average relative to the training so far, in (0, 0.288675];
    see :class:`posthoc_ema.Profile` for others.
    """

    def __init__(self) -> None:
        raise TypeError("make one with PostHocEMA.from_model or PostHocEMA.from_path")

    checkpoint_dir: Path
    """The run's directory."""
    profiles: list[Profile]
    """What is tracked."""
    ema_models: list[TrackedAverage] | None = None
    """The running averages, where the model is a module; None without one."""

    # None where the run is only read, and on a process that is switched off.
    _tracker: _native.Tracker | None = None
    # What was whole when the run was opened, where what is damaged is left out.
    _sound: _native.Run | None = None
    # Whether an update warns of what could not be stored, and goes on.
    _warns = False
    # Those of the model that was given last.
    _tensors: ModuleTensors | MappingTensors | None = None
    # Empty where the run is only read.
    _options: dict[str, Any]
    _only_save_diff = False
    _leave_out: tuple[str, ...] = ()
    # Whether a synthesis gives tensors of PyTorch, or arrays of numpy.
    _of_torch = True
    # The step at which a tracker was closed.
    _closed_at: int | None = None
    # What is called when nothing refers to this object any more, or the interpreter ends.
    _settled: weakref.finalize[..., PostHocEMA]
    # Counts a step at which nothing is due.
    _skip: Callable[[], bool]

    @classmethod
    def from_model(
        cls,
        model: Model,
        checkpoint_dir: str | os.PathLike[str],
        max_checkpoints: int | None = None,
        sigma_rels: Iterable[float] | None = None,
        update_every: int | None = None,
        checkpoint_every: int | None = None,
        checkpoint_dtype: Any = None,
        calculation_dtype: Any = None,
        only_save_diff: bool = False,
        update_after_step: int | None = None,
        *,
        gammas: Iterable[float] = (),
        betas: Iterable[float] = (),
        profiles: Iterable[Profile] = (),
        device: str = "cpu",
        resume: bool = False,
        average: Sequence[str] | None = None,
        copy: Sequence[str] | None = None,
        leave_out: Sequence[str] | None = None,
        compensated: bool | None = None,
        retention: Retention | None = None,
        checkpoint_in_background: bool = True,
        on_error: str = "raise",
        rank_zero_only: bool = False,
    ) -> PostHocEMA:
        """Begins to track a model, or goes on with a run.

        An option that is not given has its default in a new run, and on a resume what the run has.

        Args:
            model: a module of PyTorch (wrappers such as DistributedDataParallel and ``torch.compile`` are looked
                through), or a mapping of names to tensors or arrays.
            checkpoint_dir: the run's directory; made where it is not there.
            max_checkpoints: how many steps' snapshots are kept; default 20.
            sigma_rels: power-function profiles to track; 0.05 and 0.28 where no profile is given at all.
            update_every: steps between updates; default 10.
            checkpoint_every: steps between snapshots, default 1000; the averages are updated at each.
            checkpoint_dtype: dtype of averages in snapshots, such as ``torch.float16``; each tensor's own where it is None.
            calculation_dtype: taken for compatibility; sums are always in f64.
            only_save_diff: track parameters that require grad and the statistics of batch normalisation, nothing else.
            update_after_step: no update before this step; default 100.
            gammas: power-function profiles to track, by exponent.
            betas: classical EMAs to track, by decay per training step (not per update).
            profiles: further profiles to track.
            device: where averages are kept: "cpu" (no memory of the GPU is taken), "cuda" or "cuda:N" (beside the
                parameters; an update is one launch), "auto" (on the device where they take at most a quarter of what is
                free). It makes no difference to any bit.
            resume: go on with the run in `checkpoint_dir` where there is one: :attr:`step` tells from where.
            average: names or globs of the only tensors to average; others are copied.
            copy: names or globs of tensors to copy from the newest update instead of averaging them.
            leave_out: names or globs of tensors to leave out altogether.
            compensated: keep a low-order term of each average, without which late updates are lost: 6 bytes a parameter
                and profile instead of 4; the default.
            retention: which steps' snapshots are kept: those that serve a range of sigma_rel best, by default ``(0.05, 0.28)``;
                "latest"; or, for each step of a list, the first snapshot at or after it, however many.
            checkpoint_in_background: write snapshots while the training goes on, which is held up for a copy of the averages
                only. Its memory, as much as the averages take themselves, is the price; it is taken here, and between
                checkpoints the system may give it to others. Without it, and where the memory cannot be had, the training
                waits until they are on disk.
            on_error: what an update does where a snapshot could not be stored: "raise" an OSError, or "warn" and go on. The
                averages lose nothing either way, and the snapshot is tried again.
            rank_zero_only: switch off on all processes of ``torch.distributed`` but that of rank 0, which there only
                count steps, from where the run is. Under data parallelism all ranks hold the same parameters, and a run has one writer.

        Raises:
            ValueError: "already contains checkpoints" where there is a run and `resume` is not set, and for options or
                tensors that make no sense, naming them.
            OSError: where the directory cannot be made or written.
        """
        check_calculation_dtype(calculation_dtype)
        if on_error not in ("raise", "warn"):
            raise ValueError(f'on_error is "raise" or "warn", not {on_error!r}')
        directory = Path(checkpoint_dir)
        check_old_checkpoints(directory, "already contains checkpoints")
        tracked = [*map(Profile.sigma_rel, sigma_rels or ()), *map(Profile.gamma, gammas), *map(Profile.beta, betas)]
        tracked += profiles
        given: dict[str, Any] = {
            "update_every": count("update_every", update_every),
            "update_after_step": count("update_after_step", update_after_step),
            "checkpoint_every": count("checkpoint_every", checkpoint_every),
            "max_checkpoints": count("max_checkpoints", max_checkpoints),
            "retention": None if retention is None else retention_to_dict(retention),
            "checkpoint_dtype": stored_name(checkpoint_dtype),
            "compensated": compensated,
            "checkpoint_in_background": checkpoint_in_background,
            "average": average,
            "copy": copy,
        }
        options = {name: value for name, value in given.items() if value is not None}
        options |= {"profiles": [profile.to_dict() for profile in tracked], "device": str(device)}
        if not (resume and (directory / STATE).exists()):
            options = {**DEFAULTS, **options}
        self = cls._bare(directory, options)
        self._warns = on_error == "warn"
        if rank_zero_only and rank() != 0:
            self._skip = Counter(_native.saved_step(directory) or 0 if resume else 0)
            return self
        check_device(device)
        tensors = tensors_of(model, only_save_diff, leave_out=leave_out or ())
        lender = tensors.lender()
        _swap.check_own_weights(lender.tensors)
        if leave_out is not None:
            options["leave_out"] = tensors.patterns_in_use(leave_out)
        try:
            with lender.reading() as (addresses, stream):
                lent = (lender.layout, addresses, stream)
                tracker = _native.Tracker.open(
                    str(directory), "either" if resume else "create", json.dumps(options), *lent
                )
        except FileExistsError as error:
            go_on = f"there is no {STATE} to go on from" if resume else "go on with them with `resume=True`"
            raise ValueError(
                f"{directory} already contains checkpoints: {go_on}, read them with `PostHocEMA.from_path`, "
                f"or choose another directory"
            ) from error
        if isinstance(tensors, ModuleTensors):
            tensors.keep = frozenset(lender.names)
        self._only_save_diff, self._leave_out = only_save_diff, tuple(leave_out or ())
        self._tracker, self._tensors, self._of_torch = tracker, tensors, any(map(is_torch, lender.tensors))
        self._skip = tracker.skip
        self._settled = weakref.finalize(self, _settle, tracker, os.getpid())
        self.profiles = [Profile(text) for text in tracker.profiles()]
        self._track_models(tensors, tracker)
        return self

    @classmethod
    def from_path(
        cls,
        checkpoint_dir: str | os.PathLike[str],
        model: Model = None,
        max_checkpoints: int = 20,
        sigma_rels: Iterable[float] | None = None,
        update_every: int = 10,
        checkpoint_every: int = 1000,
        checkpoint_dtype: Any = None,
        only_save_diff: bool = False,
        calculation_dtype: Any = None,
        *,
        skip_damaged: bool = False,
    ) -> PostHocEMA:
        """Opens a run to synthesize from; to go on training, use :meth:`from_model` with ``resume=True``.

        The snapshots themselves tell their profiles and updates, so that the other options, which are taken for
        compatibility, decide nothing.

        Args:
            checkpoint_dir: the run's directory.
            model: a model of the run's structure, for :attr:`ema_models`; it is not changed.
            sigma_rels: where given, checked against the run's profiles.
            skip_damaged: read every byte of the run first, warn of each snapshot that is damaged or does not belong to it,
                and go on without them. Snapshots that are stored later are not seen then.

        Raises:
            FileNotFoundError: where there is no run.
            ValueError: for other `sigma_rels` than the run's, damaged snapshots, and checkpoints of other tools, with
                the command that imports them.
        """
        check_calculation_dtype(calculation_dtype)
        directory = Path(checkpoint_dir)
        check_old_checkpoints(directory, "holds checkpoints of another tool")
        run, left_out = _native.Run.open_sound(directory) if skip_damaged else (_native.Run(directory), [])
        for why in left_out:
            warnings.warn(f"left out: {why}", RuntimeWarning, stacklevel=2)
        self = cls._bare(directory, {})
        self._sound = run if skip_damaged else None
        self.profiles = [Profile(text) for _, text in sorted(run.profiles().items())]
        if sigma_rels is not None and [Profile.sigma_rel(s) for s in sigma_rels] != self.profiles:
            tracked = ", ".join(map(str, self.profiles))
            raise ValueError(f"{directory} tracked {tracked}, not sigma_rels {list(sigma_rels)}: leave them out here")
        torch = torch_module() is not None or importlib.util.find_spec("torch") is not None
        self._of_torch, self._only_save_diff = torch, only_save_diff
        if model is not None:
            self._tensors = tensors_of(model, only_save_diff, self._names(run))
            self._of_torch = any(map(is_torch, self._tensors.lender().tensors))
            self._track_models(self._tensors, directory)
        return self

    @classmethod
    def _bare(cls, directory: Path, options: dict[str, Any]) -> PostHocEMA:
        self = object.__new__(cls)
        self.checkpoint_dir, self._options = directory, options
        self.profiles = []
        # No method of its own: an object that refers to itself would hold the run's lock for longer than it is held.
        self._skip = Counter() if options else partial(refuse, directory)
        return self

    def _track_models(self, tensors: ModuleTensors | MappingTensors, source: _native.Tracker | Path) -> None:
        if isinstance(tensors, ModuleTensors):
            profiles = enumerate(self.profiles)
            self.ema_models = [TrackedAverage(index, profile, tensors.model, source) for index, profile in profiles]

    # --- while training

    def update_(self, model: Model) -> None:
        """To be called once after each training step: updates the averages and stores snapshots when they are due.

        A step at which nothing is due costs less than a microsecond or two.

        Raises:
            ValueError: for a model whose tensors are not those the run began with, naming the first difference.
            RuntimeError: where an average to be stored holds NaN or infinity (nothing is written then), where the model
                holds an average, and where a device fails.
            OSError: unless ``on_error`` is "warn", where an earlier snapshot could not be written in the background: this call has done its part, training
                can go on, and that snapshot is tried once more before the next one. With
                ``checkpoint_in_background=False`` it is the snapshot of this call, tried again before the next update.
        """
        if _swap.holding:
            _swap.check_own_weights(self._tensors_of(model).lender().tensors)
        if self._skip():
            return
        assert self._tracker is not None
        lender = self._tracked(model)
        with self._storing(), lender.reading() as (addresses, stream):
            self._tracker.update(lender.layout, addresses, stream)

    def update_at_(self, time: int, model: Model) -> None:
        """As :meth:`update_`, on a clock of the caller's own, such as images or tokens seen: `time` must grow.

        Intervals are in the units of that clock.
        """
        if self._tracker is None:
            self._skip()
            if isinstance(self._skip, Counter):
                self._skip.steps = time
            return
        lender = self._tracked(model)
        with self._storing(), lender.reading() as (addresses, stream):
            self._tracker.update_at(time, lender.layout, addresses, stream)

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Warns of what could not be stored, where that was asked for: the update has done its part by then."""
        try:
            yield
        except OSError as error:
            if not self._warns:
                raise
            warnings.warn(f"the training goes on: {error}", RuntimeWarning, stacklevel=4)

    def _tracked(self, model: Model) -> Lender:
        """The tensors of the model that trains; they are kept listed."""
        self._tensors = self._tensors_of(model)
        lender = self._tensors.lender()
        _swap.check_own_weights(lender.tensors)
        return lender

    def _tensors_of(self, model: Model) -> ModuleTensors | MappingTensors:
        """The tensors of a model, listed anew only for another object than that of last time."""
        if self._tensors is not None and self._tensors.model is model:
            return self._tensors
        if self._tracker is None:
            keep: Container[str] = self._names(self._run())
        else:
            keep = self._tensors.keep if isinstance(self._tensors, ModuleTensors) else ()
        return tensors_of(model, self._only_save_diff, keep, self._leave_out)

    @staticmethod
    def _names(run: _native.Run) -> frozenset[str]:
        """The names that a run's tensors have in the model."""
        return frozenset([name for name, _, _ in run.tensors()]) | frozenset(run.tied())

    @property
    def step(self) -> int:
        """The steps counted so far: where training goes on after a resume. Of a run opened by path, the newest snapshot's."""
        if self._closed_at is not None:
            return self._closed_at
        if self._tracker is not None:
            return self._tracker.step
        return self._skip.steps if isinstance(self._skip, Counter) else max(step for _, step in self._run().snapshots())

    @property
    def sigma_rels(self) -> tuple[float, ...]:
        """The relative standard deviations of the tracked power functions; exponentials have none."""
        return tuple(s for s in (profile.as_sigma_rel for profile in self.profiles) if s is not None)

    @property
    def gammas(self) -> tuple[float, ...]:
        """The exponents of the tracked power functions."""
        described = (profile.to_dict() for profile in self.profiles)
        return tuple(description["gamma"] for description in described if description["kind"] == "power")

    def save(self) -> None:
        """Stores the live state, from which ``resume=True`` goes on with the same bits; no snapshot is written.

        To be called wherever the training's own checkpoints are saved.
        """
        if self._tracker is not None:
            self._tracker.save()

    def flush(self) -> None:
        """Waits until every snapshot so far is on disk: for who reads the run's directory while the training goes on.

        Raises:
            OSError: where one could not be written and no call has told it yet.
        """
        if self._tracker is not None and self._closed_at is None:
            self._tracker.flush()

    def finish(self) -> None:
        """Ends the run: stores a snapshot of the newest update where there is none yet, and the live state."""
        if self._tracker is not None:
            self._tracker.finish()

    def close(self) -> None:
        """Gives the run free for another tracker, without storing anything more: call :meth:`finish` or :meth:`save` before.

        What is stored can still be synthesized from. It happens by itself when nothing refers to this object any more.

        Raises:
            OSError: where a snapshot could not be written and no call has told it yet; the run is free then, too.
        """
        if self._tracker is not None and self._closed_at is None:
            self._closed_at = self._tracker.step
            self._settled.detach()
            try:
                self._tracker.flush()
            finally:
                self._tracker.close()

    def __enter__(self) -> PostHocEMA:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # After an error the averages are left as they were last stored, and it is that error which is to be seen.
        if kind is not None:
            try:
                self.close()
            except OSError as error:
                warnings.warn(f"a snapshot was not stored: {error}", stacklevel=2)
            return
        try:
            self.finish()
        finally:
            self.close()

    # --- averages of any length

    @contextmanager
    def model(
        self,
        model: Model,
        sigma_rel: Target,
        step: int | None = None,
        calculation_dtype: Any = None,
        *,
        noise: Noise = "off",
    ) -> Iterator[Model]:
        """The model with averaged weights, in place and in eval mode, for the length of a ``with`` block.

        Afterwards, also when the block raises, every tensor of the run has its own bits back, every part of the model its
        training flag, every parameter its gradient, and all is in the place and on the device where it was. The originals
        are kept in host memory meanwhile, one copy of the tensors; only strided ones take memory on a GPU, while they are
        written. Blocks may be nested. A backward pass after the block through what was computed in it fails, as it should.

        Args:
            model: the model that is tracked, or another of its structure.
            sigma_rel: the length of the average, or any profile.
            step: the step of the average: the newest update while training, the newest snapshot of a run opened by path.
            calculation_dtype: taken for compatibility; sums are always in f64.
            noise: what to do about the rounding of stored snapshots, which short averages and those of other tools amplify:
                "off", "auto" (the regularisation of which the smallest error is predicted), or a number. Only for stored
                snapshots: of a run opened by path, or of an earlier `step`.

        Raises:
            ValueError: for a model of another structure, and a target outside the run.
            RuntimeError: where there was no update yet.
        """
        check_calculation_dtype(calculation_dtype)
        target = as_profile(sigma_rel)._json
        source, at = self._source(step, noise)
        swap: _swap.Swap = partial(source.swap_in, target, *at)
        with _swap.average_in(self._tensors_of(model), swap):
            yield model

    @contextmanager
    def state_dict(
        self,
        sigma_rel: Target,
        step: int | None = None,
        calculation_dtype: Any = None,
        *,
        noise: Noise = "off",
    ) -> Iterator[dict[str, Any]]:
        """An average as a state dict of fresh tensors in host memory, in the model's dtypes, for ``load_state_dict``.

        With `only_save_diff`, load it with ``strict=False``. The tensors may be kept after the ``with`` block.

        Args and errors as of :meth:`model`.
        """
        check_calculation_dtype(calculation_dtype)
        yield self.synthesize([sigma_rel], step, noise=noise)[0]

    def synthesize(
        self,
        targets: Iterable[Target],
        step: int | None = None,
        *,
        dtype: Any = None,
        noise: Noise = "off",
        progress: Progress = None,
    ) -> list[dict[str, Any]]:
        """Averages of several lengths in one pass over the snapshots, each a state dict of fresh tensors in host memory.

        Args:
            targets: profiles, or numbers as sigma_rel.
            step: as of :meth:`model`.
            dtype: of averaged tensors; each its own in the model where it is not given.
            noise: as of :meth:`model`.
            progress: a function of the bytes read so far and in all, or whether to draw a bar; None draws one on a
                terminal.

        Returns:
            A state dict for each target, in their order. Tied names share one tensor.
        """
        jsons = to_json(targets)
        source, at = self._source(step, noise)
        specs, tied = source.tensors(), source.tied()
        fresh = Fresh(specs, len(jsons), stored_name(dtype), self._of_torch, source.averaged())

        def total() -> int | None:
            return source.bytes_to_read(jsons, step) if isinstance(source, _native.Run) else None

        with following(progress, total, "synthesizing") as told:
            source.load_into(jsons, *at, fresh.layout, fresh.addresses(), told)
        for target in fresh.targets:
            target.update({name: target[kept] for name, kept in tied.items()})
        return [self._in_order(target) for target in fresh.targets]

    def _in_order(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The tensors as the model has them, where that is known: some zip the values with a model's."""
        names = self._tensors.names if self._tensors is not None else []
        known = {name: state_dict[name] for name in names if name in state_dict}
        return known | {name: tensor for name, tensor in state_dict.items() if name not in known}

    def write(
        self,
        targets: Iterable[Target],
        directory: str | os.PathLike[str],
        step: int | None = None,
        *,
        dtype: Any = None,
        device: str = "auto",
        noise: Noise = "off",
        progress: Progress = None,
    ) -> list[Path]:
        """Writes averages of several lengths as safetensors files, in one pass over the stored snapshots.

        Memory stays bounded, whatever the size of the model.

        Args:
            targets: profiles, or numbers as sigma_rel.
            directory: where the files go, named after target and step; made where it is not there.
            step: the step of the averages, the newest snapshot where it is not given.
            dtype: of averaged tensors; each its own in the model where it is not given.
            device: where they are blended: "auto" tries, "cpu", "cuda:N". The bits are the same.
            noise: as of :meth:`model`.
            progress: as of :meth:`synthesize`.

        Returns:
            The files, in the order of the targets.
        """
        profiles, run = [as_profile(target) for target in targets], self._run()
        jsons = to_json(profiles)
        plans = Plan.from_json(run.plans(jsons, step, "off"))
        names = [f"{str(plan.profile).replace(' ', '-')}.step-{plan.at}.safetensors" for plan in plans]
        if len(set(names)) < len(names):
            names = [f"{i}.{name}" for i, name in enumerate(names, 1)]
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in names]
        with following(progress, lambda: run.bytes_to_read(jsons, step), "synthesizing") as told:
            run.write(jsons, step, noise_text(noise), paths, stored_name(dtype), device, told)
        return paths

    def plan(self, targets: Iterable[Target], step: int | None = None, *, noise: Noise = "off") -> list[Plan]:
        """The solved weights of targets, with the error that is to be expected of each; of stored tensors a sample is read.

        Args:
            targets: profiles, or numbers as sigma_rel.
            step: as of :meth:`model`.
            noise: as of :meth:`model`.
        """
        source, at = self._source(step, noise)
        return Plan.from_json(source.plans(to_json(targets), *at))

    def sweep(
        self,
        evaluate: Callable[[Any], object],
        targets: Iterable[Target] = (),
        *,
        sigma_rels: Iterable[float] = (),
        model: Model = None,
        minimize: bool = True,
        refine: int = 6,
        step: int | None = None,
        noise: Noise = "off",
        out: str | os.PathLike[str] | None = None,
        name: str | None = None,
        batch: int = 8,
        progress: _sweeping.Progress = None,
    ) -> _sweeping.Swept:
        """Evaluates averages of many lengths, goes on around the best one, and gives that.

        All targets are evaluated first, then `refine` golden-section steps between the neighbours of the best, in its own
        family. An evaluation that raises, or returns no finite number, is recorded, and the others go on; Ctrl-C ends the
        sweep, and with `out` the same call goes on there later, and tries again what failed.

        Args:
            evaluate: returns the score of an average. It is given a state dict of fresh tensors, or where there is a
                `model`, that model with the average put in, in eval mode, as :meth:`model` does it.
            targets: profiles, or numbers as sigma_rel.
            sigma_rels: further targets.
            model: the model that is tracked, or another of its structure. After each evaluation it has its own bits back.
            minimize: small scores are the better ones; otherwise large ones.
            refine: steps around the best target.
            step: as of :meth:`model`.
            noise: as of :meth:`model`.
            out: a directory for the scores, ``sweep.json``, and the best average, ``best.safetensors``; made where it is
                missing. It must not lie in the run's.
            name: what `out` knows the evaluation by; the name of the function where none is given. One that has no name of
                its own (a lambda, a function within another, a method, a partial, an object) needs it to go on later.
            batch: how many state dicts are synthesized in one pass over the snapshots, and held in memory. With a `model`,
                each average is blended right into it instead, in a pass of its own.
            progress: a function of the evaluations done and planned, or whether to draw a bar; None draws one on a terminal.

        Raises:
            ValueError: for no target, one outside the run, and a directory of another sweep, or of an evaluation that
                cannot be told from this one.
            RuntimeError: where all evaluations failed; its cause is what the first of them raised.
            OSError: where the directory cannot be written.
        """
        if batch < 1:
            raise ValueError(f"batch = {batch}: at least 1")
        profiles = [*map(as_profile, targets), *map(Profile.sigma_rel, sigma_rels)]
        if not profiles:
            raise ValueError("there is nothing to evaluate: give targets or sigma_rels")
        at = self.plan(profiles, step, noise=noise)[0].at
        # The newest average of a tracker has no snapshot that could be named by a step.
        step = step if self._live(step) is not None else at
        directory = None if out is None else _sweeping.check_apart(out, self.checkpoint_dir)
        name, own = (name, True) if name is not None else _sweeping.name_of(evaluate)
        search = _native.Sweep(
            to_json(profiles),
            minimize,
            count("refine", refine) or 0,
            directory,
            self._identity(),
            at,
            name,
            noise_text(noise),
        )
        try:
            _sweeping.check_resumed(search, name, own, directory)
            averages = _sweeping.Averages(self, step, noise, model)
            evaluations = _sweeping.Evaluations(search, averages, evaluate)
            evaluations.run(batch, progress)
            results, number = _sweeping.trials_of(search), search.best()
            if number is None:
                reasons = "; ".join(f"{trial.profile}: {trial.error}" for trial in results)
                raise RuntimeError(f"all {len(results)} evaluations failed: {reasons}") from evaluations.first
            best = averages.best(results[number], directory)
            return _sweeping.Swept(best=best, results=results, at=at, minimize=minimize, edge=search.edge())
        finally:
            search.close()

    def _identity(self) -> str:
        """What a sweep knows the run by."""
        try:
            return self._run().identity()
        except FileNotFoundError:
            # A tracker that has stored no snapshot yet.
            return str(self.checkpoint_dir.resolve())

    def switch_(self, model: Model, sigma_rel: Target) -> Model:
        """Switch EMA (arXiv:2402.09240): the model becomes its average at the newest update, and training goes on there.

        Tensors that are not averaged stay as they are, and so do the running averages.

        Returns:
            The model.
        """
        if self._tracker is None:
            self._skip()
            raise RuntimeError("this process does not track (rank_zero_only): switch on rank 0, and broadcast")
        target, lender = as_profile(sigma_rel)._json, self._tracked(model)
        with lender.writing() as (addresses, stream):
            self._tracker.switch_to(target, lender.layout, addresses, stream)
        # A backward pass through what was computed with the old weights then fails instead of being wrong.
        _swap.increment(lender.tensors)
        return model

    def reconstruction_error(self, target_sigma_rel_range: tuple[float, float] | None = None) -> Image.Image:
        """A picture of how well each length can be synthesized: the relative error over sigma_rel.

        Of the snapshots and averages there are; before the first update, of those there will be when there are
        `max_checkpoints`.

        Args:
            target_sigma_rel_range: smallest and largest sigma_rel; 0.05 and 0.28 where it is not given.

        Returns:
            A picture of PIL.
        """
        from . import visualization

        targets = visualization.target_points(self.sigma_rels, target_sigma_rel_range)
        before = self._tracker is not None and self._tracker.last_update is None
        plans = self._forecast(targets) if before else self.plan(targets)
        return visualization.plot_reconstruction_errors(targets, [p.relative_error for p in plans], self.sigma_rels)

    def _forecast(self, targets: list[float]) -> list[Plan]:
        """What can be expected of a training that fills the checkpoints."""
        schedule = ("max_checkpoints", "update_every", "update_after_step", "checkpoint_every")
        options = {name: self._options.get(name, DEFAULTS[name]) for name in schedule}
        steps = options["update_after_step"] + options["max_checkpoints"] * options["checkpoint_every"]
        return plan(targets, steps=steps, profiles=self.profiles, **options)

    def verify(self) -> None:
        """Reads every byte of every snapshot and compares its checksum.

        Raises:
            ValueError: for the first file that does not match.
        """
        self._run().verify()

    def _live(self, step: int | None) -> _native.Tracker | None:
        """The tracker, where the newest update is asked for."""
        if self._tracker is None or self._closed_at is not None:
            if isinstance(self._skip, Counter):
                raise RuntimeError(
                    "this process does not track (rank_zero_only): synthesize on rank 0, or open the run by path"
                )
            return None
        newest = self._tracker.last_update
        if step is None or (newest is not None and newest <= step <= self._tracker.step):
            return self._tracker
        return None

    def _source(self, step: int | None, noise: Noise) -> tuple[Any, tuple[Any, ...]]:
        """What a synthesis reads, and its further arguments."""
        live = self._live(step)
        if live is None:
            return self._run(), (step, noise_text(noise))
        if noise != "off":
            raise ValueError(
                f"noise={noise!r} is for stored snapshots, and this is the newest update of a training: give the `step` of an "
                f"earlier snapshot, or open the run with `PostHocEMA.from_path`"
            )
        return live, ()

    def _run(self) -> _native.Run:
        """The snapshots so far."""
        if self._sound is not None:
            return self._sound
        self.flush()
        return _native.Run(self.checkpoint_dir)

    def __repr__(self) -> str:
        tracked = ", ".join(map(str, self.profiles))
        return f"<PostHocEMA {self.checkpoint_dir}: {tracked}>"


def _settle(tracker: _native.Tracker, process: int) -> None:
    """Waits for what is being written, so that no interpreter ends in the midst of it; an error of it is printed then.

    A forked child has neither the thread that writes nor anything to write.
    """
    if os.getpid() == process:
        tracker.flush()
