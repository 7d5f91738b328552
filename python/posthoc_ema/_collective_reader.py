"""The reading side of a run that only rank 0 tracks: averages that all ranks get together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from . import _accuracy, _native, _swap
from ._broadcast import Broadcast, Bytes, device_of, places, transfer_device
from ._dtypes import average_dtype_name
from ._first_update import FirstUpdate
from ._launch import distributed, launched
from ._lend import HOST, Lender, address, is_torch
from ._lifetime import StepCounter
from ._model import MappingTensors, Model, ModuleTensors, tensors_of
from ._outputs import OutputBuffers, join_pairs
from ._plans import Noise
from ._profiles import Profile, Target, as_profile, profile_json
from ._progress import Progress
from ._ranks import Call, Notices, RankGroup
from ._run_reader import RunReader
from ._sharded_reader import ShardedReader
from ._spectral import refresh_spectral_norms
from ._tracker import ModelTracker

P = ParamSpec("P")
R = TypeVar("R")


class CollectiveReader(RunReader):
    """Synthesizes averages on rank 0, and gives them to all ranks; each method is a call of all of them.

    Args:
        directory: Directory of the run.
        ranks: Processes of the training.
        model: Model that trains.
        tracker: Tracker of the run on rank 0, None on the others.
        only_save_diff: Option of the run.
        leave_out: Option of the run.
    """

    def __init__(
        self,
        directory: Path,
        ranks: RankGroup,
        model: Model,
        *,
        tracker: ModelTracker | None = None,
        only_save_diff: bool = False,
        leave_out: Sequence[str] | None = None,
    ):
        super().__init__(directory, tracker=tracker, is_idle=tracker is None, only_save_diff=only_save_diff)
        self._ranks = ranks
        self._leave_out = tuple(leave_out or ())
        # Names of rank 0's tensors, which a model keeps if they no longer require grad, and of those that are complex.
        self._kept: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        # A group that communicates on devices needs to know this rank's.
        self._device = _cuda_device(model.values() if isinstance(model, Mapping) else model.parameters())

    @property
    def alone(self) -> RunReader:
        """Reader of rank 0 that asks no other rank."""
        if self._tracker is None:
            self.live(None)
        return RunReader(self.directory, tracker=self._tracker)

    def tensors_of(self, model: Model) -> ModuleTensors | MappingTensors:
        """Returns the tensors of a model that belong to the run, by its options."""
        if self._tracker is not None:
            return self._tracker.tensors_of(model)
        return self._tensors_with(model, self._kept)

    def _tensors_with(
        self, model: Model, kept: tuple[frozenset[str], frozenset[str]]
    ) -> ModuleTensors | MappingTensors:
        """Returns the tensors of a model, and keeps them listed."""
        if self._tensors is None or self._tensors.model is not model or self._kept != kept:
            names, of_complex = kept
            self._tensors = tensors_of(model, self._only_save_diff, names, self._leave_out, of_complex)
            self._kept = kept
        return self._tensors

    # Averages in a model.

    @contextmanager
    def swapped(self, model: Model, target: Target, step: int | None, noise: Noise) -> Iterator[None]:
        """Swaps rank 0's average into the model of every rank for a block."""
        call = self._ranks.call("model", lambda: f"{_shown(target)}, step={step}, noise={noise!r}")
        if call is None:
            with super().swapped(model, target, step, noise):
                yield
            return
        with call:
            act, offer = call.part(partial(self._offer_swap, call, model, target, step, noise))
            tensors = self._matching(call, model, offer)
            lender = tensors.lender()
            device = device_of(offer["device"], _cuda_device(lender.tensors))
            written = frozenset(offer["written"])
            with _swap.swapped_in(tensors, partial(_share, call, lender, device, act, written), written):
                yield

    def switch(self, model: Model, target: Target) -> None:
        """Replaces the averaged tensors of every rank's model by rank 0's average."""
        call = self._ranks.call("switch_", partial(_shown, target))
        if call is None:
            self._live().switch(model, target)
            return
        with call:
            act, offer = call.part(partial(self._offer_switch, call, model, target))
            tensors = self._matching(call, model, offer)
            lender = tensors.lender()
            _swap.check_own_weights(lender.tensors)
            originals = _native.SavedWeights()
            written = frozenset(offer["written"])
            device = device_of(offer["device"], _cuda_device(lender.tensors))
            with lender.writing() as (lent, streams):
                try:
                    _share(call, lender, device, act, written, originals, lender.layout, lent, streams)
                except BaseException:
                    if originals.filled:
                        originals.restore(lender.layout, lent, streams)
                    raise
            # A backward pass through results of the old weights must fail instead of being wrong.
            _swap.mark_changed(lender.tensors)
            if isinstance(tensors, ModuleTensors):
                refresh_spectral_norms(model)

    def _live(self) -> ModelTracker:
        self.live(None)
        assert self._tracker is not None
        return self._tracker

    def _save_and_switch(
        self,
        target: Target,
        originals: _native.SavedWeights,
        layout: _native.Layout,
        lent: list[int],
        streams: dict[int, int],
    ) -> None:
        originals.save(layout, lent, streams)
        self._live().native.switch_to(profile_json(target), layout, lent, streams)
        _accuracy.warn()

    def _offer_swap(
        self, call: Call, model: Model, target: Target, step: int | None, noise: Noise
    ) -> tuple[_swap.Swap, dict[str, Any] | None]:
        """Returns this rank's share of a swap, and rank 0's tensors."""
        if call.rank != 0:
            return _native.SavedWeights.save, None
        swap, names = self.swap(target, step, noise)
        return swap, self._offer(model, names)

    def _offer_switch(self, call: Call, model: Model, target: Target) -> tuple[_swap.Swap, dict[str, Any] | None]:
        """Returns this rank's share of a switch, and rank 0's tensors."""
        if call.rank != 0:
            return _native.SavedWeights.save, None
        native = self._live().native
        averaged = set(native.averaged())
        averaged.update(name for name, kept in native.tied().items() if kept in averaged)
        return partial(self._save_and_switch, target), self._offer(model, averaged)

    def _offer(self, model: Model, written: Iterable[str]) -> dict[str, Any]:
        """Describes the tensors that rank 0 has and sends."""
        tensors = self._live().tensors_of(model)
        lender = tensors.lender()
        return {
            "tensors": _described(lender),
            "complex": sorted(tensors.stored_complex),
            "written": sorted(written),
            "device": transfer_device(any(device != HOST for device in lender.devices())),
        }

    def _matching(self, call: Call, model: Model, offer: dict[str, Any]) -> ModuleTensors | MappingTensors:
        """Returns the tensors of this rank's model, which are those of rank 0.

        Raises:
            ValueError: If they differ. The message names the first difference.
        """
        if call.rank == 0:
            return self.tensors_of(model)
        tensors = self._tensors_with(model, (frozenset(n for n, *_ in offer["tensors"]), frozenset(offer["complex"])))
        _check_equal(_described(tensors.lender()), offer["tensors"])
        return tensors

    # New tensors.

    def synthesize(
        self,
        targets: Iterable[Target],
        step: int | None,
        dtype: Any,
        noise: Noise,
        progress: Progress,
        model: Model = None,
    ) -> list[dict[str, Any]]:
        """Returns a state dict for each target on every rank; see `PostHocEMA.synthesize`."""
        given = list(targets)

        def arguments() -> str:
            shown = ", ".join(map(_shown, given))
            return f"[{shown}], step={step}, dtype={average_dtype_name(dtype)}, noise={noise!r}"

        call = self._ranks.call("synthesize", arguments)
        if call is None:
            return super().synthesize(given, step, dtype, noise, progress, model)
        compute = partial(super().synthesize, given, step, dtype, noise, progress, model)
        with call:
            call.part(lambda: (None, None))
            made, answer = call.part(lambda: self._made(compute()) if call.rank == 0 else ([], None))
            broadcast, _ = call.part(partial(self._prepare, call, made, len(given), answer))
            broadcast.run(call)
        return made

    def _made(self, made: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Describes the tensors of rank 0's state dicts, which are alike for all targets."""
        lender = Lender(list(made[0].items()) if made else [])
        return made, {
            "tensors": _described(lender),
            "pairs": lender.pairs,
            "of_torch": self._of_torch,
            "device": transfer_device(False),
        }

    def _prepare(
        self, call: Call, made: list[dict[str, Any]], count: int, answer: dict[str, Any]
    ) -> tuple[Broadcast, None]:
        """Prepares to send the state dicts of rank 0, or allocates equal ones to fill."""
        if call.rank != 0:
            made += _allocated(answer, count)
        content = Bytes([(address(t), int(t.nbytes), HOST) for target in made for t in target.values()])
        return Broadcast(content, device_of(answer["device"], self._device)), None


def _share(
    call: Call,
    lender: Lender,
    device: Any,
    act: _swap.Swap,
    names: frozenset[str] | None,
    originals: _native.SavedWeights,
    layout: _native.Layout,
    lent: list[int],
    streams: dict[int, int],
) -> None:
    """Writes rank 0's average to the lent tensors of every rank, whose elements are saved before.

    Args:
        call: Call of all ranks.
        lender: Lender of the tensors.
        device: Device on which this rank communicates.
        act: Writes the average on rank 0; on the others it saves the elements only.
        names: Tensors to send; None for all.
        originals: Receives the elements that the tensors had.
        layout: Layout of the tensors.
        lent: Addresses of the tensors.
        streams: Stream on which the tensors of each device are used.
    """

    def prepare() -> tuple[Broadcast, None]:
        act(originals, layout, lent, streams)
        return Broadcast(Bytes(places(lender, lent, names)), device), None

    broadcast, _ = call.part(prepare)
    broadcast.run(call)


def _shown(target: Target) -> str:
    """Returns a target as equal ones are written on all ranks."""
    return str(as_profile(target))


def _cuda_device(tensors: Iterable[Any]) -> Any:
    """Returns the device of the first tensor that is on a CUDA device, or None."""
    return next((tensor.device for tensor in tensors if is_torch(tensor) and tensor.is_cuda), None)


def _described(lender: Lender) -> list[list[Any]]:
    """Returns name, dtype and shape of each tensor, and the name of the first that shares its elements."""
    first: dict[tuple[int, int], str] = {}
    result = []
    for (name, dtype, shape, _), tensor in zip(lender.described, lender.tensors):
        size = int(tensor.nbytes)
        kept = first.setdefault((address(tensor), size), name) if size > 0 else name
        result.append([name, dtype, [int(n) for n in shape], kept])
    return result


def _check_equal(own: list[list[Any]], of_zero: list[list[Any]]) -> None:
    """Compares descriptions of tensors with those of rank 0.

    Raises:
        ValueError: For the first tensor that differs.
    """
    remedy = "all ranks must pass the same model"
    here, there = ({name: facts for name, *facts in each} for each in (own, of_zero))
    for name in [*there, *here]:
        if name not in here or name not in there:
            where = (
                "rank 0 has it, and this rank's model has not" if name in there else "rank 0's model does not have it"
            )
            raise ValueError(f"tensor `{name}`: {where}: {remedy}")
        for fact, mine, zero in zip(("dtype", "shape", "tied to"), here[name], there[name]):
            if mine != zero:
                raise ValueError(f"tensor `{name}`: {fact} {mine}, and {zero} on rank 0: {remedy}")
    if [name for name, *_ in own] != [name for name, *_ in of_zero]:
        raise ValueError(f"the tensors of the model are in another order than on rank 0: {remedy}")


def _allocated(answer: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Allocates state dicts like rank 0's; tied names share a tensor."""
    tensors = answer["tensors"]
    specs = [(name, dtype, shape) for name, dtype, shape, kept in tensors if kept == name]
    made = OutputBuffers(specs, count, None, answer["of_torch"], []).targets
    for target in made:
        join_pairs(target, answer["pairs"])
    return [{name: target[kept] for name, _, _, kept in tensors} for target in made]


def reader_of(
    directory: Path,
    model: Model,
    rank_zero_only: bool,
    only_save_diff: bool,
    leave_out: Sequence[str] | None,
    tracker: ModelTracker | None,
) -> RunReader:
    """Returns the reader of a run that trains: of this process, or of all for a sharded model or `rank_zero_only`."""
    if tracker is not None and tracker.tensors.lender().parts:
        return ShardedReader(directory, RankGroup(), tracker)
    if not rank_zero_only:
        return RunReader(directory, tracker=tracker)
    return CollectiveReader(
        directory, RankGroup(), model, tracker=tracker, only_save_diff=only_save_diff, leave_out=leave_out
    )


def _state(ema: Any) -> dict[str, Any]:
    """Describes the run that rank 0 tracks."""
    native = ema._tracker.native
    return {
        "steps": native.step,
        "last_update": native.last_update,
        "schedule": json.loads(native.schedule()),
        "profiles": native.profiles(),
    }


@contextmanager
def _rank_remedy() -> Iterator[None]:
    """Names the remedy if this process takes itself for rank 0, and the run has a writer."""
    try:
        yield
    except RuntimeError as error:
        if "another tracker is writing" not in str(error) or launched().source:
            raise
        raise RuntimeError(
            f"{error}. If that is rank 0 of this training: neither a process group nor a variable gives the rank of "
            f"this process, so call torch.distributed.init_process_group before from_model"
        ) from error


def opened_together(open_run: Callable[P, R]) -> Callable[P, R]:
    """Makes all ranks count from the step of rank 0, or raise its error, when a run is opened under `rank_zero_only`.

    Rank 0 waits for no other: programs exist that open a run on their main process only.
    """

    @wraps(open_run)
    def opened(*args: P.args, **kwargs: P.kwargs) -> R:
        group = distributed() if kwargs.get("rank_zero_only") else None
        notices = Notices(group) if group is not None and group.get_world_size() > 1 else None
        if notices is None:
            with _rank_remedy() if kwargs.get("rank_zero_only") else nullcontext():
                return open_run(*args, **kwargs)
        if notices.is_zero:
            try:
                ema: Any = open_run(*args, **kwargs)
                state = _state(ema)
                notices.leave(state)
            except BaseException as error:
                notices.leave(error)
                raise
            if state["last_update"] is None:
                ema._first_update = FirstUpdate(notices, StepCounter(state["steps"], None, state["schedule"]))
            return ema
        ema = open_run(*args, **kwargs)
        state = notices.read("from_model")
        ema._skip = StepCounter(state["steps"], state["last_update"], state["schedule"])
        if state["last_update"] is None:
            ema._skip.is_begun = FirstUpdate(notices, ema._skip).is_done
        ema.profiles = [Profile(text) for text in state["profiles"]]
        return ema

    return opened
