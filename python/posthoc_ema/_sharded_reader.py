"""The reading side of a run that all ranks track together: averages of the parts that each rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import _native, _swap
from ._dtypes import average_dtype_name
from ._launch import launched
from ._lend import Lender
from ._model import Model
from ._parts import ZERO3, is_dtensor
from ._plans import Noise
from ._profiles import Target, as_profile
from ._progress import Progress
from ._ranks import RankGroup
from ._run_reader import RunReader
from ._tracker import ModelTracker


class ShardedReader(RunReader):
    """Puts averages into each rank's own parts; each method is a call of all ranks, and none gathers a tensor.

    The ranks only agree, through the store of the process group, on what they call and if it failed on one.

    Args:
        directory: Directory of the run.
        ranks: Processes of the training.
        tracker: Tracker of this rank's parts.
    """

    def __init__(self, directory: Path, ranks: RankGroup, tracker: ModelTracker):
        super().__init__(directory, tracker=tracker)
        self._ranks = ranks

    def together(self, name: str, act: Callable[[], None]) -> None:
        """Calls a function on all ranks; an error of one is raised on all."""
        call = self._ranks.call(name)
        if call is None:
            act()
            return
        with call:
            call.do(act, is_last=True)

    def check_whole(self, name: str) -> None:
        """Refuses a method for which this rank needs the whole model, if there are others."""
        if launched().size > 1:
            raise ValueError(
                f"{name}: the model is sharded, and no rank has the whole average: call it in one process on the "
                f"stored run, `PostHocEMA.from_path({str(self.directory)!r})`; its `write(..., like=FOLDER)` writes a "
                f"folder of the model's library"
            )

    @contextmanager
    def swapped(self, model: Model, target: Target, step: int | None, noise: Noise) -> Iterator[None]:
        """Swaps an average into each rank's parts of the model for a block."""
        call = self._ranks.call("model", lambda: f"{as_profile(target)}, step={step}, noise={noise!r}")
        if call is None:
            with super().swapped(model, target, step, noise):
                yield
            return
        with call:
            # All snapshots so far are complete once each rank has written its parts.
            call.do(lambda: self._flush(step))
            (swap, names), _ = call.part(lambda: (self.swap(target, step, noise), None))

            def share(
                originals: _native.SavedWeights, layout: _native.Layout, lent: list[int], streams: dict[int, int]
            ) -> None:
                call.do(lambda: swap(originals, layout, lent, streams), is_last=True)

            with _swap.swapped_in(self.tensors_of(model), share, names):
                yield

    def switch(self, model: Model, target: Target) -> None:
        """Replaces the averaged tensors of every rank's parts by the average."""
        assert self._tracker is not None
        tracker = self._tracker
        self.together("flush", lambda: self._flush(None))
        self.together("switch_", lambda: tracker.switch(model, target))

    def synthesize(
        self,
        targets: Iterable[Target],
        step: int | None,
        dtype: Any,
        noise: Noise,
        progress: Progress,
        model: Model = None,
    ) -> list[dict[str, Any]]:
        """Returns a state dict of the model's DTensors for each target; see `PostHocEMA.synthesize`."""
        given = [as_profile(target) for target in targets]
        shown = ", ".join(map(str, given))
        name = average_dtype_name(dtype)
        call = self._ranks.call("synthesize", lambda: f"[{shown}], step={step}, dtype={name}, noise={noise!r}")
        if call is None:
            return self._as_dtensors(super().synthesize(given, step, dtype, noise, progress, model))
        compute = super().synthesize
        with call:
            call.do(lambda: self._flush(step))
            made, _ = call.part(lambda: (compute(given, step, dtype, noise, progress, model), None), is_last=True)
        return self._as_dtensors(made)

    def _flush(self, step: int | None) -> None:
        """Writes this rank's parts of all snapshots so far.

        Raises:
            ValueError: If `step` is not that of the newest update.
        """
        assert self._tracker is not None
        if self.live(step) is None:
            when = "after `close`" if self._tracker.lifetime.closed_at is not None else f"step = {step}"
            raise ValueError(
                f"{when}: the ranks of a sharded model have the average at the newest update only: write this one from "
                f"the stored run, by `PostHocEMA.from_path({str(self.directory)!r})` in one process or by "
                f"`posthoc-ema synthesize`"
            )
        lender = self._tracker.tensors.lender()
        if of_zero3 := next((name for name, part in lender.parts.items() if part.kind == ZERO3), None):
            raise ValueError(
                f"tensor `{of_zero3}`: it is a {ZERO3}, whose engine keeps other copies of the weights: write the "
                f"average from the stored run, by `PostHocEMA.from_path({str(self.directory)!r})` in one process"
            )
        self._tracker.lifetime.flush()

    def _as_dtensors(self, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Makes DTensors of this rank's parts, with the mesh and the placements of the model.

        Raises:
            ValueError: If the model has other parts than DTensors.
        """
        assert self._tracker is not None
        tensors = self._tracker.tensors
        lender: Lender = tensors.lender()
        keys = tensors.keys()
        for name, part in lender.parts.items():
            owner = lender.owners[lender.names.index(name)]
            is_whole = tuple(part.local.shape) == part.shape
            if not is_dtensor(owner) and is_whole:
                continue
            if not is_dtensor(owner):
                raise ValueError(
                    f"tensor `{name}`: it is a {part.kind}, for which no state dict exists: use a block of `model`, or "
                    f"open the stored run by `PostHocEMA.from_path({str(self.directory)!r})`"
                )
            for target in made:
                key = keys.get(name, name)
                if key in target:
                    target[key] = _as_dtensor(owner, target[key])
        return made


def _as_dtensor(owner: Any, local: Any) -> Any:
    """Returns a DTensor of local elements, laid out as another."""
    place = {"run_check": False, "shape": owner.shape, "stride": owner.stride()}
    return type(owner.data).from_local(local, owner.device_mesh, owner.placements, **place)
