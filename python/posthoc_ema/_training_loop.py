"""Methods that fit the averages into a training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from ._attach import Attachment, check_trains
from ._attach import unwrap as unwrap_optimizer
from ._lend import torch_module
from ._lifetime import Resume, StepCounter
from ._model import Model, unwrap
from ._run_reader import RunReader
from ._tracker import ModelTracker

Arguments = ParamSpec("Arguments")
Loop = TypeVar("Loop", bound="TrainingLoop")


def reopened(
    make: Callable[Concatenate[type[Loop], Arguments], Loop],
) -> Callable[Concatenate[type[Loop], Arguments], Loop]:
    """Lets an object that a class method makes open its run again with the same arguments."""

    @wraps(make)
    def made(cls: type[Loop], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Loop:
        self = make(cls, *args, **kwargs)
        self._reopen = lambda path: make(cls, *args, **{**kwargs, "resume": path})
        return self

    return made  # type: ignore[return-value]


class TrainingLoop:
    """Questions of a training loop, and hooks that update after each step; a base of `PostHocEMA`."""

    _tracker: ModelTracker | None
    _reader: RunReader
    _skip: Callable[[], bool]
    _attachment: Attachment | None = None
    # Step after the newest update by a hook.
    _hooked_step: int = 0
    # Opens the run again, from a state in a file.
    _reopen: Callable[[Any], TrainingLoop]

    @property
    def due(self) -> bool:
        """True if the next `update_` reads the model, or on another rank than the one that tracks, would read it.

        Raises:
            RuntimeError: If the run was closed, or was opened by path.
        """
        if self._tracker is not None:
            return self._tracker.native.due
        self._check_counts()
        return isinstance(self._skip, StepCounter) and self._skip.is_due(self._skip.steps + 1)

    @property
    def has_average(self) -> bool:
        """True if a first update has happened, so that there is an average to evaluate.

        Under `rank_zero_only` it is True on all ranks at the same step. Before the first update the other ranks wait
        for rank 0 at each that is due, since it leaves out one with NaN in the parameters.
        """
        return self.last_update is not None

    @property
    def last_update(self) -> int | None:
        """Step of the newest update, or None before the first.

        For a run that was closed or opened by path, the step of its newest snapshot. The ranks that do not track follow
        the schedule of the run, as if no update after the first was left out for NaN. They know it if it is a new
        run, or if the process group was there when it was opened.
        """
        if isinstance(self._skip, StepCounter):
            return self._skip.last_update
        if self._tracker is not None and self._tracker.lifetime.closed_at is None:
            return self._tracker.native.last_update
        try:
            return max(step for _, step in self._reader.run().snapshots())
        except FileNotFoundError:
            # A run that was closed before its first snapshot.
            return None

    def check_step(self, step: int) -> None:
        """Checks that the averages and the training continue from the same step.

        To be called once after a resume, with the number of optimizer steps in the training's own checkpoint.

        Args:
            step: Step from which the training continues.

        Raises:
            ValueError: If the averages have counted another number of steps. The message names both.
        """
        counted: int = self.step  # type: ignore[attr-defined]
        if counted != step:
            raise ValueError(
                f"the averages in {self._reader.directory} are at step {counted}, and the training continues from step "
                f"{step}: resume both from one checkpoint, with `from_model(..., resume=PATH)` and the file that "
                f"`ema.save(PATH)` wrote beside it, or begin a new run in another directory"
            )

    @property
    def placement(self) -> str:
        """Place of the averages, and the way of the parameters to it, in words.

        Raises:
            RuntimeError: If the run was closed, or was opened by path.
        """
        if self._tracker is not None:
            return self._tracker.native.placement
        self._check_counts()
        return "averages on rank 0"

    def wait_for_copy(self) -> None:
        """Makes the current stream of a GPU wait until the weights of the newest update have been copied.

        To be called before the weights change: after `update_(model, wait=False)`, and with `attach` before anything
        but the optimizer changes them. The host does not wait. Without a copy it does nothing.

        Raises:
            RuntimeError: If weights have changed already. The average may then hold a part of both.
        """
        if self._tracker is not None:
            self._tracker.fence.wait()

    def attach(self, optimizer: Any, model: Model, *, wait: bool = False) -> Attachment:
        """Calls `update_` after each real step of an optimizer, in the place of a call in the loop.

        If averages on the host are those of a model on a GPU, its weights are copied while the training continues. The
        GPU waits for the copy before the next step of the optimizer, and at no other place. Buffers, and parameters
        that the optimizer does not hold, are waited for at once. If anything but the optimizer changes its weights
        (weight clipping, `load_state_dict`), call `wait_for_copy` before, or pass `wait`. Most such changes are found:
        tensors that change after the first update are waited for from then on, with a warning, and a later change is an
        error. A change through `.data` is not.

        Micro-batches of an accumulation do not count, nor do steps that a GradScaler skips. Several closures of one
        step count once. With several optimizers, attach to the one whose steps count, such as a GAN's generator's.

        A CUDA graph calls no hooks when it is replayed: use `capture_update_` and `replay_` there.

        Args:
            optimizer: Optimizer of PyTorch, as it is or in a wrapper of accelerate, Lightning or Fabric. It holds the
                averages and the model from now on.
            model: Model that it trains.
            wait: Let the GPU wait for each copy at once.

        Returns:
            Handle whose `remove` ends the updates; it is also a context manager.

        Raises:
            TypeError: If the optimizer calls no hooks after its steps.
            ValueError: If the optimizer trains none of the model's parameters.
            RuntimeError: If the averages are attached already, or the run was opened by path. Within a step of the
                optimizer: the errors of `update_`, and one if `update_` is called besides.
        """
        self._check_counts()
        if self._attachment is not None and self._attachment.is_active:
            raise RuntimeError(
                f"the averages are attached to an optimizer already ({self._attachment.optimizer_name}), and each step "
                f"would count twice: call `remove` of that handle first"
            )
        torch = torch_module()
        if torch is not None and isinstance(unwrap(model), torch.nn.Module):
            check_trains(optimizer, model)
        groups = () if wait else unwrap_optimizer(optimizer).param_groups
        self._attachment = Attachment(optimizer, _Updates(self, model, groups))
        return self._attachment

    def capture_update_(self, model: Model) -> None:
        """Adds an update to the CUDA graph that is being captured, in the place of `update_`; counts no step.

        To be called within `torch.cuda.graph`, after the optimizer's step; `replay_` then replays the graph. The
        averages must be beside the model (`device="cuda"`). As for every graph, the model's tensors stay in place.
        Ranks that do not track do nothing.

        Args:
            model: Model that trains.

        Raises:
            ValueError: If the averages are in host memory, or if the model's tensors are not those of the run.
            RuntimeError: If no graph is being captured, or if the driver is older than CUDA 12.3.
        """
        self._check_counts()
        if self._tracker is not None:
            self._tracker.capture_update(model)

    def replay_(self, graph: Any, time: int | None = None) -> None:
        """Replays a CUDA graph with a captured update, and counts a step; to be called in the place of `graph.replay`.

        The averages are those of `update_` at the same steps. If no update is due, they do not change. A replay without
        this call changes no average either, and a later call raises an error. Ranks that do not track replay the graph.

        Args:
            graph: Graph of PyTorch.
            time: Time after the step on a clock of the caller's own, as for `update_at_`.

        Raises:
            RuntimeError: As for `update_`, and if an earlier replay did no update that was due, or was not counted.
            OSError: As for `update_`.
        """
        self._check_counts()
        if self._tracker is not None:
            try:
                self._tracker.replay(graph, time)
            finally:
                self._note_first_update(self._tracker)  # type: ignore[attr-defined]
            return
        graph.replay()
        if isinstance(self._skip, StepCounter) and time is not None:
            self._skip.count_to(time)
        else:
            self._skip()

    def _check_counts(self) -> None:
        """Raises the error of an update if this object was opened to synthesize from."""
        if self._tracker is None and not isinstance(self._skip, StepCounter):
            self._skip()

    @property
    def _is_closed(self) -> bool:
        return self._tracker is not None and self._tracker.lifetime.closed_at is not None

    @property
    def _is_sharded(self) -> bool:
        """True if all ranks track, each its own parts."""
        return self._tracker is not None and bool(self._tracker.tensors.lender().parts)

    def _rewind(self, path: Resume) -> None:
        """Goes back to a live state that `save(path)` wrote, and stays attached.

        Under `rank_zero_only` it is a call of all ranks; those that do not track pass False.

        Raises:
            ValueError: If the state does not belong to the run. The run is closed then.
        """
        if self._tracker is not None:
            self._tracker.lifetime.close()
        reopened = self._reopen(path)
        kept = {"_attachment": self._attachment, "_reopen": self._reopen}
        self.__dict__.update({**reopened.__dict__, **kept})
        self._hooked_step = self.step  # type: ignore[attr-defined]


class _Updates:
    """Updates the averages from a model at each call, and finds out if anything else has updated them.

    Args:
        ema: Averages.
        model: Model that trains.
        groups: Parameter groups of the optimizer, for whose copy the training waits before the next step only.
    """

    def __init__(self, ema: Any, model: Model, groups: Sequence[dict[str, Any]]):
        self._ema = ema
        self._model = model
        self._groups = groups
        ema._hooked_step = ema.step

    def __call__(self) -> None:
        ema = self._ema
        if ema.step != ema._hooked_step:
            raise RuntimeError(
                f"the averages are attached to the optimizer, at step {ema._hooked_step}, and something else has "
                f"counted to step {ema.step}: do not call `update_` besides, or `remove` the attachment"
            )
        try:
            ema._update(self._model, self._parameters)
        finally:
            ema._hooked_step = ema.step

    def _parameters(self) -> set[int]:
        return {id(parameter) for group in self._groups for parameter in group["params"]}
