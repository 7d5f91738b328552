"""Running averages of a model while it trains, and averages of any length afterwards (Karras et al. 2023)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _fence, _lifetime, _native, _options, _swap, visualization
from ._collective_reader import CollectiveReader, opened_together, reader_of
from ._compiled import keep_out_of_graphs
from ._first_update import FirstUpdate
from ._launch import launched
from ._lifetime import Resume, StepCounter
from ._model import MappingTensors, Model, ModuleTensors
from ._plans import Plan, Retention, plan
from ._profiles import Profile, Target
from ._run_averages import RunAverages
from ._run_reader import RunReader
from ._sharded_reader import ShardedReader
from ._sharded_start import sharded_start
from ._tracked_average import TrackedAverage
from ._tracker import ModelTracker
from ._training_loop import TrainingLoop, reopened

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PostHocEMA"]


class PostHocEMA(RunAverages, TrainingLoop):
    """Tracks running averages of a model, stores snapshots of them, and synthesizes averages of any length.

    `from_model` makes one to train with, `from_path` one to synthesize from a run on disk.

    A floating-point parameter (float32, float16, bfloat16, float64) is averaged in float32 with a compensation term,
    exactly for any interval of updates, and so are the batch-norm statistics, `running_mean` and `running_var`. All
    other buffers, integers and booleans are copied from the newest update. Complex parameters are averaged and stored
    as pairs of reals along a last dimension of size 2. A synthesis sums in float64. A number as a target is a
    `sigma_rel`: the standard deviation of the average relative to the length of the training so far, in (0, 0.288675].
    `posthoc_ema.Profile` has other targets.
    """

    def __init__(self) -> None:
        raise TypeError("PostHocEMA() is not possible: use PostHocEMA.from_model or PostHocEMA.from_path")

    ema_models: list[TrackedAverage] | None = None
    """Running averages as modules, one for each profile; None if no module of PyTorch was passed."""

    # None if the run is only read, and on a process that leaves the tracking to another rank.
    _tracker: ModelTracker | None = None
    # Schedule of the run, for forecasts.
    _schedule: dict[str, Any]
    # Counts a step and returns True if nothing is due at it. A method of this class would be a cycle of references,
    # which would hold the run's lock until the garbage collector finds it.
    _skip: Callable[[], bool]
    _first_update: FirstUpdate | None = None

    @classmethod
    @reopened
    @opened_together
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
        snapshot_growth: float | None = _options.SNAPSHOT_GROWTH,
        gammas: Iterable[float] = (),
        betas: Iterable[float] = (),
        profiles: Iterable[Profile] = (),
        device: str = "cpu",
        device_copy: bool | None = None,
        resume: Resume = False,
        extend: bool = False,
        average: Sequence[str] | None = None,
        copy: Sequence[str] | None = None,
        leave_out: Sequence[str] | None = None,
        compensated: bool | None = None,
        retention: Retention | None = None,
        checkpoint_in_background: bool = True,
        on_error: str = "raise",
        on_nonfinite: str | None = None,
        rank_zero_only: bool = False,
    ) -> PostHocEMA:
        """Starts to track a model, or resumes a run.

        The defaults are those of a new run. A resumed run keeps its own values of options that are not given.

        Args:
            model: Module of PyTorch (wrappers such as DistributedDataParallel and `torch.compile` are looked through),
                or mapping of names to tensors or arrays.
            checkpoint_dir: Directory of the run; created if it is missing.
            max_checkpoints: Number of steps whose snapshots are kept; default 20.
            sigma_rels: Power-function profiles to track; default 0.05 and 0.28 if no profile is given at all.
            update_every: Steps between updates; default 10.
            checkpoint_every: Steps between snapshots, each with an update; default 1000.
            checkpoint_dtype: Dtype of averages in snapshots, such as `torch.float16`; default each tensor's own.
            calculation_dtype: Accepted for compatibility, without effect: sums are always in float64.
            only_save_diff: Track parameters that require grad and the statistics of batch normalisation, nothing else.
            update_after_step: First step at which an update may happen; default 100.
            snapshot_growth: Factor between the times of further snapshots early in the training, None for none. They
                begin at the tenth update or `update_after_step`, and end where the next is `checkpoint_every` away.
            gammas: Power-function profiles to track, by exponent.
            betas: Classical EMAs to track, by decay per training step (not per update).
            profiles: Further profiles to track.
            device: Device of the averages, without effect on any bit: "cpu", "cuda" (beside the parameters; an update
                is one kernel launch), "cuda:N" (the same, if they are there), or "auto" (on the model's device if they
                take at most a quarter of the memory that the training leaves free; a gradient and two moments for each
                parameter count as taken).
            device_copy: Copy the parameters within their GPU at each update, on the way to averages on the host. The
                training waits for that alone, and not for the bus. By default it is done if they take at most a quarter
                of the memory that the training leaves free; True makes it an error if there is too little. `placement`
                says what is done.
            resume: Continue the run in `checkpoint_dir` if there is one; `step` is then the step to continue from. A
                path is that of a state that `save(path)` wrote, its file or folder: the run continues from there, and
                the snapshots of the course that it leaves are set aside.
            extend: Resume with a model that has other tensors than the run: unfrozen or new ones are averaged from now
                on, those that are gone stay in the snapshots that have them. `Plan.later` says since when.
            average: Names or globs of tensors to average. If one names a parameter, all tensors that none names are
                copied. If all name buffers, these are averaged besides the default.
            copy: Names or globs of tensors to copy from the newest update instead of averaging them.
            leave_out: Names or globs of tensors to leave out altogether.
            compensated: Keep a low-order term of each average, without which late updates are lost. It takes 6 bytes a
                parameter and profile instead of 4. Default True.
            retention: Rule for the snapshots to keep: a range of sigma_rel to serve best, default `(0.05, 0.28)`;
                "latest"; or a list of steps, of which each keeps the first snapshot at or after it.
            checkpoint_in_background: Write snapshots while the training continues, which only waits for a copy of the
                averages. The memory of the copy, as much as the averages take, is reserved here. Without this option or
                this memory, the training waits for the disk.
            on_error: Reaction of an update to a snapshot that could not be stored: "raise" an OSError, or "warn". The
                averages lose nothing either way, and the snapshot is tried again. A lost lock is raised either way.
            on_nonfinite: Reaction of an update to parameters with NaN or infinity: "raise" a RuntimeError that names
                tensor and element, "skip" the update with a warning on standard error, or "ignore" them, which fails at
                the next snapshot. With the first two the averages and the history are as if this update was not due.
                For a model on a GPU a later call raises or warns: the next update, or one that needs the averages.
                Default "raise".
            rank_zero_only: Track on rank 0 only; all other ranks count steps, from the run's step on. Under data
                parallelism all ranks hold the same parameters, and a run has one writer. Call
                `torch.distributed.init_process_group` before, so that the ranks are known; the others then wait for
                rank 0 here, and raise its error. `model`, `state_dict`, `synthesize` and `switch_` are calls of all
                ranks, which get the same bits, or the error of any. `local` computes on rank 0 alone. A sharded model
                (FSDP, DTensor, ZeRO-3) is tracked by all ranks without this option, each its own shards.

        Raises:
            ValueError: If the directory "already contains checkpoints" and `resume` is not set, if it holds another run
                than the state at `resume`, or if an option or a tensor is not valid. The message names it.
            FileNotFoundError: If nothing is at the path `resume`.
            OSError: If the directory cannot be created or written.
        """
        schedule = (update_every, update_after_step, checkpoint_every, max_checkpoints)
        with sharded_start(model, rank_zero_only) as start:
            directory = Path(checkpoint_dir)
            _options.check_given(calculation_dtype, on_error, on_nonfinite)
            _lifetime.check_old_checkpoints(directory, "already contains checkpoints")
            options = _options.tracker_options(
                is_new=_lifetime.begins(directory, resume),
                profiles=_options.tracked_profiles(sigma_rels, gammas, betas, profiles),
                device=device,
                device_copy=device_copy,
                schedule=dict(zip(_options.DEFAULTS, schedule)),
                snapshot_growth=snapshot_growth,
                checkpoint_dtype=checkpoint_dtype,
                retention=retention,
                compensated=compensated,
                checkpoint_in_background=checkpoint_in_background,
                average=average,
                copy=copy,
                extend=extend or None,
                on_nonfinite=on_nonfinite,
            )
            read = partial(reader_of, directory, model, rank_zero_only, only_save_diff, leave_out)
            if rank_zero_only and launched().rank != 0:
                return cls._new(directory, read(None), _lifetime.step_counter(directory, resume, options))
            _options.check_device(device)
            how: dict[str, Any] = {"resume": resume, "on_error": on_error, "in_parts": not rank_zero_only}
            tracker = ModelTracker(model, directory, options, only_save_diff, leave_out, start=start, **how)
            return cls._new(directory, read(tracker), tracker.native.skip)._track(tracker, options)

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
        """Opens a run to synthesize from; `from_model` with `resume=True` continues the training.

        The snapshots record their profiles and updates, so most options have no effect here.

        Args:
            checkpoint_dir: Directory of the run.
            model: Model of the run's structure, for `ema_models`; it is not changed.
            max_checkpoints: Accepted for compatibility, without effect.
            sigma_rels: Lengths that the run must have tracked; not checked by default.
            update_every: Accepted for compatibility, without effect.
            checkpoint_every: Accepted for compatibility, without effect.
            checkpoint_dtype: Accepted for compatibility, without effect.
            only_save_diff: Value with which the run was tracked, to list the tensors of `model`.
            calculation_dtype: Accepted for compatibility, without effect.
            skip_damaged: Read every byte of the run first, warn of each snapshot that is damaged or does not belong to
                the run, and leave them out. Snapshots that are stored later are not seen then.

        Raises:
            FileNotFoundError: If the directory holds no run.
            ValueError: If the run tracked other `sigma_rels`, a snapshot is damaged, or the directory holds checkpoints
                of another tool. The message names the command that imports them.
        """
        _options.check_calculation_dtype(calculation_dtype)
        directory = Path(checkpoint_dir)
        _lifetime.check_old_checkpoints(directory, "holds checkpoints of another tool")
        run, left_out = _native.Run.open_sound(directory) if skip_damaged else (_native.Run(directory), [])
        for reason in left_out:
            warnings.warn(f"left out: {reason}", RuntimeWarning, stacklevel=2)
        reader = RunReader(directory, sound=run if skip_damaged else None, only_save_diff=only_save_diff)
        self = cls._new(directory, reader, partial(_lifetime.refuse_update, directory))
        self.profiles = [Profile(text) for _, text in sorted(run.profiles().items())]
        if sigma_rels is not None and [Profile.sigma_rel(s) for s in sigma_rels] != self.profiles:
            tracked = ", ".join(map(str, self.profiles))
            raise ValueError(f"{directory} tracked {tracked}, not sigma_rels {list(sigma_rels)}: leave the option out")
        if model is not None:
            self._list_averages(reader.use_model(model, run), directory)
        return self

    @classmethod
    def _new(cls, directory: Path, reader: RunReader, skip: Callable[[], bool]) -> PostHocEMA:
        names = ("update_", "_update", "update_at_", "capture_update_", "replay_", "switch_")
        keep_out_of_graphs(PostHocEMA, (*names, "model", "state_dict", "synthesize"))
        self = object.__new__(cls)
        self.checkpoint_dir = directory
        self._reader = reader
        self._skip = skip
        self.profiles = []
        return self

    def _track(self, tracker: ModelTracker, options: dict[str, Any]) -> PostHocEMA:
        """Sets the tracker of this process, and returns this object."""
        self._tracker = tracker
        self._schedule = _options.schedule(options)
        self.profiles = [Profile(text) for text in tracker.native.profiles()]
        self._list_averages(tracker.tensors, tracker.native)
        return self

    def _list_averages(self, tensors: ModuleTensors | MappingTensors, source: _native.Tracker | Path) -> None:
        if isinstance(tensors, ModuleTensors) and not tensors.lender().parts:
            self.ema_models = [
                TrackedAverage(index, profile, tensors.model, source) for index, profile in enumerate(self.profiles)
            ]

    # Training.

    def update_(self, model: Model, *, wait: bool = True) -> None:
        """Updates the averages and stores snapshots when they are due; to be called once after each training step.

        A step at which nothing is due costs some tenths of a microsecond.

        Args:
            model: Model that trains.
            wait: Let a GPU that trains wait until the weights have been copied to averages on the host. Without it,
                call `wait_for_copy` before the weights change; an optimizer of PyTorch waits by itself. Buffers of a
                module are always waited for. `attach` does the same for the weights of its optimizer.

        Raises:
            ValueError: If the model's tensors are not those the run began with. The message names the first difference.
            RuntimeError: If a parameter is NaN or infinite (`on_nonfinite`; the averages do not change then, and on a
                GPU the update before is meant), if an average to be stored is (nothing is written then), if the model
                holds an average, if the run's lock was removed or its directory replaced, or if a device fails.
            OSError: If a snapshot could not be written in the background, unless `on_error` is "warn". The update
                itself is complete, and the snapshot is tried again before the next one. With
                `checkpoint_in_background=False` it is the snapshot of this call, tried again before the next update.
        """
        self._update(model, frozenset if wait else _fence.all_parameters)

    def _update(self, model: Model, parameters: _fence.Fenced) -> None:
        """Updates the averages if that is due; see `ModelTracker.update`."""
        if _swap.holding:
            _swap.check_own_weights(self._reader.tensors_of(model).lender().tensors)
        if self._skip():
            return
        assert self._tracker is not None
        try:
            self._tracker.update(model, parameters)
        finally:
            self._note_first_update(self._tracker)

    def update_at_(self, time: int, model: Model) -> None:
        """Updates the averages on a clock of the caller's own, such as images or tokens seen.

        All intervals are in the unit of that clock.

        Args:
            time: Time after the training step; it must grow.
            model: Model that trains.

        Raises:
            ValueError: As for `update_`.
            RuntimeError: As for `update_`.
            OSError: As for `update_`.
        """
        if self._tracker is not None:
            try:
                self._tracker.update_at(time, model)
            finally:
                self._note_first_update(self._tracker)
            return
        if isinstance(self._skip, StepCounter):
            self._skip.count_to(time)
        else:
            self._skip()

    def _note_first_update(self, tracker: ModelTracker) -> None:
        """Informs the other ranks of the first update, if they may ask."""
        if self._first_update is not None and tracker.lifetime.closed_at is None:
            if self._first_update.note(tracker.native.step, tracker.native.last_update):
                self._first_update = None

    @property
    def step(self) -> int:
        """Steps counted so far; for a run opened by path, the step of the newest snapshot.

        A resumed training continues from it.
        """
        if self._tracker is not None:
            return self._tracker.step
        if isinstance(self._skip, StepCounter):
            return self._skip.steps
        return max(step for _, step in self._reader.run().snapshots())

    def switch_(self, model: Model, sigma_rel: Target) -> Model:
        """Replaces the model's weights by its average at the newest update (Switch EMA, arXiv:2402.09240).

        Tensors that are not averaged stay as they are, and so do the running averages. Only the singular vectors
        of PyTorch's spectral norms are computed again for the averaged weights. Under `rank_zero_only` all ranks call
        it, and get the same average.

        Args:
            model: Model that trains.
            sigma_rel: Length of the average, or any profile.

        Returns:
            The model.

        Raises:
            ValueError: If the model has another structure, or the target is not valid.
            RuntimeError: If there was no update yet, or the run was opened by path.
        """
        if isinstance(self._reader, (CollectiveReader, ShardedReader)):
            self._reader.switch(model, sigma_rel)
        elif self._tracker is not None:
            self._tracker.switch(model, sigma_rel)
        else:
            self._skip()
        return model

    # Storing and closing.

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Stores the live state, from which a resume continues with the same bits; no snapshot is written.

        To be called whenever the training stores its own checkpoint, best with that checkpoint's path: a training that
        goes back to it then continues with `resume=path`.

        Args:
            path: File to write, or an existing folder to write `posthoc-ema.safetensors` into; of a sharded model a
                folder, into which each rank writes a file. It appears whole or not at all. By default the state of the
                run itself, from which `resume=True` continues.

        Raises:
            OSError: If the state cannot be written.
            ValueError: If `path` is in the run's own directory, or cannot be a file.
        """
        if self._tracker is not None:
            self._reader.together("save", partial(self._tracker.native.save, path))

    def flush(self) -> None:
        """Waits until every snapshot so far is on disk, for readers of the run's directory during the training.

        Raises:
            OSError: If one could not be written and no call has raised it yet.
        """
        if self._tracker is not None:
            self._reader.together("flush", self._tracker.lifetime.flush)

    def finish(self) -> None:
        """Stores a snapshot of the newest update, unless there is one, and the live state.

        Raises:
            OSError: If a file cannot be written.
        """
        if self._tracker is not None:
            self._reader.together("finish", self._tracker.native.finish)

    def close(self) -> None:
        """Stores the live state if it is not on disk, and releases the run for another tracker.

        `resume=True` continues from that state; a snapshot of the newest update is stored by `finish` only. Stored
        snapshots can still be synthesized from. Without a call it happens when nothing refers to this object any more,
        or when the interpreter ends: also after an exception, `sys.exit` or Ctrl-C, but not after a signal such as
        SIGTERM or SIGKILL, or `os._exit`. A state that cannot be stored is a RuntimeWarning then.

        Raises:
            OSError: If a snapshot could not be written and no call has raised it yet. The run is released all the same.
        """
        if self._tracker is not None:
            self._tracker.lifetime.close()

    def __enter__(self) -> PostHocEMA:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._tracker is not None:
            self._tracker.lifetime.leave(failed=kind is not None)

    def reconstruction_error(self, target_sigma_rel_range: tuple[float, float] | None = None) -> Image.Image:
        """Draws the relative error over sigma_rel with which each length can be synthesized.

        The errors are those of the present snapshots and averages. Before the first update, they are predicted for a
        training that stores `max_checkpoints` snapshots.

        Args:
            target_sigma_rel_range: Smallest and largest sigma_rel; default (0.05, 0.28).

        Returns:
            An RGB image of PIL.
        """
        targets = visualization.target_points(self.sigma_rels, target_sigma_rel_range)
        is_new = self._tracker is not None and self._tracker.native.last_update is None
        plans = self._forecast(targets) if is_new else self.plan(targets)
        return visualization.plot_reconstruction_errors(targets, [p.relative_error for p in plans], self.sigma_rels)

    def _forecast(self, targets: list[float]) -> list[Plan]:
        """Predicts plans at the end of a training that fills its checkpoints."""
        schedule = self._schedule
        steps = schedule["update_after_step"] + schedule["max_checkpoints"] * schedule["checkpoint_every"]
        return plan(targets, steps=steps, profiles=self.profiles, **schedule)

    def __repr__(self) -> str:
        tracked = ", ".join(map(str, self.profiles))
        return f"<PostHocEMA {self.checkpoint_dir}: {tracked}>"
