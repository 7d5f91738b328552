"""The reading side of a run: averages of any length from its snapshots, or from the newest update of a training."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from . import _accuracy, _native, _swap
from ._dtypes import average_dtype_name
from ._form import part_text
from ._lend import is_torch, torch_module
from ._model import MappingTensors, Model, ModuleTensors, tensors_of
from ._outputs import OutputBuffers, complex_names, join_pairs
from ._plans import Noise, Plan, noise_text
from ._profiles import Profile, Target, as_profile, profile_json, to_json
from ._progress import Progress, byte_progress
from ._tracker import ModelTracker


class RunReader:
    """Synthesizes averages of a run.

    Args:
        directory: Directory of the run.
        tracker: Tracker of the run in this process, if there is one.
        is_idle: Refuse to synthesize: another rank tracks the run.
        sound: Run without its damaged snapshots; by default every read opens the directory again.
        only_save_diff: Option for listing the tensors of a model without a tracker.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tracker: ModelTracker | None = None,
        is_idle: bool = False,
        sound: _native.Run | None = None,
        only_save_diff: bool = False,
    ):
        self.directory = directory
        self._tracker = tracker
        self._is_idle = is_idle
        self._sound = sound
        self._only_save_diff = only_save_diff
        self._tensors: ModuleTensors | MappingTensors | None = None
        if tracker is not None:
            self._of_torch = any(map(is_torch, tracker.tensors.lender().tensors))
        else:
            self._of_torch = torch_module() is not None or importlib.util.find_spec("torch") is not None

    def use_model(self, model: Model, run: _native.Run) -> ModuleTensors | MappingTensors:
        """Sets the model that decides type and order of an average's tensors, and returns its tensors."""
        self._tensors = self._list(model, run)
        self._of_torch = any(map(is_torch, self._tensors.lender().tensors))
        return self._tensors

    def tensors_of(self, model: Model) -> ModuleTensors | MappingTensors:
        """Returns the tensors of a model that belong to the run."""
        if self._tracker is not None:
            return self._tracker.tensors_of(model)
        if self._tensors is not None and self._tensors.model is model:
            return self._tensors
        return self._list(model, self.run())

    def _list(self, model: Model, run: _native.Run) -> ModuleTensors | MappingTensors:
        return tensors_of(model, self._only_save_diff, names_in(run), stored_complex=complex_names(run.tensors()))

    def run(self) -> _native.Run:
        """Returns the snapshots stored so far."""
        if self._sound is not None:
            return self._sound
        if self._tracker is not None:
            self._tracker.lifetime.flush()
        return _native.Run(self.directory)

    @contextmanager
    def opened(self, step: int | None) -> Iterator[None]:
        """Keeps the stored snapshots open for a block, which are otherwise opened and sampled by each call.

        Does nothing if `step` asks for the newest update of a training.
        """
        if self._sound is not None or self.live(step) is not None:
            yield
            return
        self._sound = self.run()
        try:
            yield
        finally:
            self._sound = None

    def live(self, step: int | None) -> _native.Tracker | None:
        """Returns the tracker if `step` asks for its newest update, else None."""
        if self._is_idle:
            raise RuntimeError(
                "this process does not track (rank_zero_only): call this on rank 0, or open the run by path"
            )
        if self._tracker is None or self._tracker.lifetime.closed_at is not None:
            return None
        newest = self._tracker.native.last_update
        if step is None or (newest is not None and newest <= step <= self._tracker.native.step):
            return self._tracker.native
        return None

    def _source(self, step: int | None, noise: Noise) -> tuple[Any, tuple[Any, ...]]:
        """Returns the tracker or the run to synthesize from, and the further arguments of its methods."""
        live = self.live(step)
        if live is None:
            return self.run(), (step, noise_text(noise))
        if noise != "off":
            raise ValueError(
                f"noise = {noise!r} is for stored snapshots, and this is the newest update of a training: give the "
                f"`step` of an earlier snapshot, or open the run with `PostHocEMA.from_path`"
            )
        return live, ()

    def swap(self, target: Target, step: int | None, noise: Noise) -> tuple[_swap.Swap, frozenset[str]]:
        """Returns the function that writes an average into a model's tensors, and the names of those that it writes."""
        profile = as_profile(target)
        source, at = self._source(step, noise)
        swap_in = partial(source.swap_in, profile_json(profile), *at)

        def swap(
            originals: _native.SavedWeights, layout: _native.Layout, addresses: list[int], streams: dict[int, int]
        ) -> None:
            swap_in(originals, layout, addresses, streams)
            # A warning that is an exception restores the model.
            _accuracy.warn()

        return swap, names_in(source)

    def warn_of(self, targets: Iterable[Target], step: int | None, noise: Noise) -> None:
        """Warns of targets as a synthesis of all of them does."""
        source, at = self._source(step, noise)
        source.log_warnings(to_json(targets), *at)
        _accuracy.warn()

    def together(self, name: str, act: Callable[[], None]) -> None:
        """Calls a function on each rank that tracks; `name` is that of the method, for messages."""
        act()

    def check_whole(self, name: str) -> None:
        """Refuses a method for which this process needs the whole model.

        Raises:
            ValueError: If the model is sharded.
        """

    @property
    def alone(self) -> RunReader:
        """Reader that asks no other process."""
        return self

    @contextmanager
    def swapped(self, model: Model, target: Target, step: int | None, noise: Noise) -> Iterator[None]:
        """Swaps an average into a model for a block; see `PostHocEMA.model`."""
        swap, names = self.swap(target, step, noise)
        with _swap.swapped_in(self.tensors_of(model), swap, names):
            yield

    def plan(self, targets: Iterable[Target], step: int | None, noise: Noise) -> list[Plan]:
        """Returns the plan of each target; see `PostHocEMA.plan`."""
        source, at = self._source(step, noise)
        return Plan.from_json(source.plans(to_json(targets), *at))

    def synthesize(
        self,
        targets: Iterable[Target],
        step: int | None,
        dtype: Any,
        noise: Noise,
        progress: Progress,
        model: Model = None,
    ) -> list[dict[str, Any]]:
        """Returns a state dict for each target, for a model if one is given; see `PostHocEMA.synthesize`."""
        jsons = to_json(targets)
        source, at = self._source(step, noise)
        steps = at[:1]
        specs = source.tensors(*steps)
        tied = source.tied(*steps)
        averaged = source.averaged(*steps)
        buffers = OutputBuffers(specs, len(jsons), average_dtype_name(dtype), self._of_torch, averaged)

        def total() -> int | None:
            return source.bytes_to_read(jsons, step) if isinstance(source, _native.Run) else None

        with byte_progress(progress, total, "synthesizing") as report:
            source.load_into(jsons, *at, buffers.layout, buffers.addresses(), report)
        _accuracy.warn()
        tensors = self._tensors if self._tracker is None else self._tracker.tensors
        tensors = tensors if model is None else self.tensors_of(model)
        for target in buffers.targets:
            join_pairs(target, tensors.pairs if tensors is not None else ())
            target.update({name: target[kept] for name, kept in tied.items()})
        keys = tensors.keys() if tensors is not None else {}
        return [_as_in_model(target, keys) for target in buffers.targets]

    def write(
        self,
        targets: Iterable[Target],
        directory: str | os.PathLike[str],
        step: int | None,
        dtype: Any,
        device: str,
        noise: Noise,
        form: _native.OutputForm,
        part: tuple[int, int] | None,
        progress: Progress,
    ) -> list[Path]:
        """Writes a file or folder for each target; see `PostHocEMA.write`."""
        share = part_text(part)
        profiles = [as_profile(target) for target in targets]
        run = self.run()
        jsons = to_json(profiles)
        plans = Plan.from_json(run.plans(jsons, step, "off"))
        for note in _native.check_form(run, jsons, step, form):
            warnings.warn(note, stacklevel=3)
        extension = "" if form.is_folder() else ".safetensors"
        names = [f"{str(plan.profile).replace(' ', '-')}.step-{plan.at}{extension}" for plan in plans]
        if len(set(names)) < len(names):
            names = [f"{i}.{name}" for i, name in enumerate(names, 1)]
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in names]
        with byte_progress(progress, lambda: run.bytes_to_read(jsons, step), "synthesizing") as report:
            run.write(jsons, step, noise_text(noise), paths, average_dtype_name(dtype), device, form, share, report)
        _accuracy.warn()
        return paths

    def write_paths(
        self, targets: list[Profile], paths: list[Path], step: int | None, noise: Noise, form: _native.OutputForm
    ) -> None:
        """Writes averages to paths in one pass, on the CPU and in the dtypes of the tensors or the form."""
        self.run().write(to_json(targets), step, noise_text(noise), paths, None, "cpu", form, None, None)

    def check_form(self, targets: list[Profile], step: int | None, form: _native.OutputForm) -> list[str]:
        """Checks that averages fit a form, and returns notes on it."""
        return _native.check_form(self.run(), to_json(targets), step, form)

    def identity(self) -> str:
        """Returns the name under which a sweep records the run."""
        try:
            return self.run().identity()
        except FileNotFoundError:
            # A tracker that has stored no snapshot yet.
            return str(self.directory.resolve())


def _as_in_model(state_dict: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """Gives tensors the order and the keys that they have in the model; some users zip the values with a model's."""
    known = {key: state_dict[name] for name, key in keys.items() if name in state_dict}
    return known | {name: tensor for name, tensor in state_dict.items() if name not in keys}


def names_in(run: _native.Run | _native.Tracker) -> frozenset[str]:
    """Returns the names that a run's tensors have in the model."""
    return frozenset([name for name, _, _ in run.tensors()]) | frozenset(run.tied())
