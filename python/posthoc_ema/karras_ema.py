"""A single running average in memory, without a run on disk."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Collection, Mapping
from typing import Any

from . import _native
from ._lend import torch_module
from ._model import ModuleTensors
from ._profiles import Profile
from ._spectral import refresh_spectral_norms
from ._swap import check_own_weights
from ._tracked_average import copy_on_cpu, lent_tensors, named_tensors

__all__ = ["KarrasEMA"]

# Interval after which a snapshot is never due.
_NEVER = 2**62


class KarrasEMA:
    """Running average of a module in memory, with a power-function profile (Karras et al. 2023, eq. 121).

    Args:
        model: Module to average; every call of `update` reads it.
        sigma_rel: Standard deviation of the profile relative to the length of the training so far, in (0, 0.288675].
        gamma: Exponent of the profile, instead.
        update_every: Calls of `update` between updates. The first call updates; the decay follows from the interval.
        frozen: Make no updates after the first.
        param_or_buffer_names_no_ema: Names that keep their first values.
        ignore_names: Names that keep their first values.
        ignore_startswith_names: Prefixes of names that keep their first values.
        only_save_diff: Average only parameters that require grad, and the statistics of batch normalisation.
        device: Device of the average: "cpu", "cuda" or "auto".
        copy: Names to copy at each update instead of averaging them.
        ema_model: Module of the model's structure for the property of that name; default a copy of the model.

    Raises:
        ValueError: If not exactly one of `sigma_rel` and `gamma` is given, or an option or a tensor is not valid.
    """

    def __init__(
        self,
        model: Any,
        sigma_rel: float | None = None,
        gamma: float | None = None,
        update_every: int = 10,
        frozen: bool = False,
        param_or_buffer_names_no_ema: Collection[str] = (),
        ignore_names: Collection[str] = (),
        ignore_startswith_names: Collection[str] = (),
        only_save_diff: bool = False,
        device: str = "cpu",
        copy: Collection[str] = (),
        ema_model: Any = None,
    ):
        if update_every < 1:
            raise ValueError(f"update_every = {update_every}: must be at least 1 call")
        if sigma_rel is not None and gamma is None:
            self.profile = Profile.sigma_rel(sigma_rel)
        elif gamma is not None and sigma_rel is None:
            self.profile = Profile.gamma(gamma)
        else:
            raise ValueError(f"sigma_rel = {sigma_rel}, gamma = {gamma}: give either sigma_rel or gamma")
        self.gamma: float = self.profile.to_dict()["gamma"]
        self.update_every = update_every
        self.frozen = frozen
        self.only_save_diff = only_save_diff
        self._device = device
        self._left_alone = {*param_or_buffer_names_no_ema, *ignore_names}
        self._copied = set(copy)
        self._prefixes = tuple(ignore_startswith_names)
        self._tensors = ModuleTensors(model, only_save_diff)
        self._calls = 0
        self._tracker: _native.Tracker | None = None
        self._module = copy_on_cpu(model) if ema_model is None else ema_model
        self._shown: int | None = None

    @property
    def model(self) -> Any:
        """Module that is averaged."""
        return self._tensors.model

    @property
    def step(self) -> int:
        """Number of calls of `update` so far."""
        return self._calls

    def update(self) -> None:
        """Updates the average when that is due; to be called once after each training step.

        Raises:
            ValueError: If the model's tensors are not those of the first update. The message names the first
                difference.
        """
        due = self._calls % self.update_every == 0 and not (self.frozen and self._tracker is not None)
        if due:
            self._fold(self._tensors, self._calls + 1)
        self._calls += 1

    def _fold(self, tensors: ModuleTensors, time: int) -> None:
        """Updates the average with tensors at a time."""
        lender = tensors.lender()
        check_own_weights(lender.tensors)
        with lender.reading() as (addresses, streams):
            if self._tracker is None:
                self._tracker = self._start(lender.names, (lender.layout, addresses, streams))
            self._tracker.update_at(time, lender.layout, addresses, streams)

    def _start(self, names: list[str], lent: tuple[_native.Layout, list[int], dict[int, int]]) -> _native.Tracker:
        """Opens a tracker that never stores anything; its lock still needs a directory."""
        left_out = [name for name in names if name in self._left_alone or name.startswith(self._prefixes or "\0")]
        options = {
            "profiles": [self.profile.to_dict()],
            "update_every": 1,
            "checkpoint_every": _NEVER,
            "snapshot_growth": 0,
            "leave_out": left_out,
            "copy": [name for name in names if name in self._copied and name not in left_out],
            "device": self._device,
        }
        directory = tempfile.mkdtemp(prefix="posthoc-ema-")
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        return _native.Tracker.open(directory, "create", json.dumps(options), *lent)

    @property
    def ema_model(self) -> Any:
        """Module in host memory with the average's weights; before the first update, with the model's first weights.

        Every access returns the same object and updates its weights, also after it was moved to another device.
        """
        tracker = self._tracker
        if tracker is not None and tracker.last_update != self._shown:
            with lent_tensors(self._module, tracker.tensors()) as lent:
                tracker.load_tracked_into(0, *lent)
            refresh_spectral_norms(self._module)
            self._shown = tracker.last_update
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the averaged module."""
        return self.ema_model(*args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            "a KarrasEMA can be neither copied nor pickled: store its `state_dict()`, and load it into another one"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the average's tensors under the model's names, with `initted` and `step`, for `load_state_dict`."""
        torch = torch_module()
        assert torch is not None
        names = self._tensors.lender().names
        held = named_tensors(self.ema_model)
        state = {name: held[name].detach().clone() for name in names}
        return {**state, "initted": torch.tensor(self._tracker is not None), "step": torch.tensor(self._calls)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from the result of `state_dict`.

        The average has the precision of the state dict, which is that of the model's dtypes.

        Args:
            state_dict: Result of `state_dict`.

        Raises:
            KeyError: If a tensor is missing.
        """
        calls = int(state_dict["step"])
        begun = bool(state_dict["initted"])
        names = self._tensors.lender().names
        own = named_tensors(self._module)
        for name in names:
            own[name].data.copy_(state_dict[name])
        self._tracker = self._shown = None
        self._calls = calls
        if begun:
            # The first update copies the tensors; the decay of the next one follows from their times.
            last = calls - (calls - 1) % self.update_every
            self._fold(ModuleTensors(self._module, self.only_save_diff, names), last)
