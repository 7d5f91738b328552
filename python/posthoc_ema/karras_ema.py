"""A single running average in memory, without a run's directory."""

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
from ._swap import check_own_weights
from ._tracked_average import addresses_in, copy_on_cpu, named_tensors

__all__ = ["KarrasEMA"]

# No snapshot is ever due.
_NEVER = 2**62


class KarrasEMA:
    """One running average of a module, of a power-function profile (Karras et al. 2023, eq. 121), kept in memory.

    Args:
        model: the module; it is looked at by every :meth:`update`.
        sigma_rel: standard deviation of the profile relative to the training so far, in (0, 0.288675].
        gamma: the exponent instead.
        update_every: calls of :meth:`update` between updates; the first call updates. The decay follows from the
            interval.
        frozen: make no updates after the first.
        param_or_buffer_names_no_ema: names that stay as they are.
        ignore_names: names that stay as they are.
        ignore_startswith_names: beginnings of names that stay as they are.
        only_save_diff: average parameters that require grad, and the statistics of batch normalisation.
        device: where the average is kept: "cpu", "cuda" or "auto".

    Raises:
        ValueError: unless one of `sigma_rel` and `gamma` is given, and as of :meth:`PostHocEMA.from_model`.
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
    ):
        if update_every < 1:
            raise ValueError(f"update_every = {update_every}: an interval is at least 1 call")
        if sigma_rel is not None and gamma is None:
            self.profile = Profile.sigma_rel(sigma_rel)
        elif gamma is not None and sigma_rel is None:
            self.profile = Profile.gamma(gamma)
        else:
            raise ValueError("give either sigma_rel or gamma")
        self.gamma: float = self.profile.to_dict()["gamma"]
        self.update_every, self.frozen, self.only_save_diff = update_every, frozen, only_save_diff
        self._device = device
        self._left_alone = {*param_or_buffer_names_no_ema, *ignore_names}
        self._prefixes = tuple(ignore_startswith_names)
        self._tensors = ModuleTensors(model, only_save_diff)
        self._calls = 0
        self._tracker: _native.Tracker | None = None
        self._module = copy_on_cpu(model)
        self._shown: int | None = None

    @property
    def model(self) -> Any:
        """The module that is averaged."""
        return self._tensors.model

    @property
    def step(self) -> int:
        """The calls of :meth:`update` so far."""
        return self._calls

    def update(self) -> None:
        """To be called once after each training step: updates the average when that is due.

        Raises:
            ValueError: for a model whose tensors are not those at the first update, naming the first difference.
        """
        due = self._calls % self.update_every == 0 and not (self.frozen and self._tracker is not None)
        if due:
            self._fold(self._tensors, self._calls + 1)
        self._calls += 1

    def _fold(self, tensors: ModuleTensors, time: int) -> None:
        lender = tensors.lender()
        check_own_weights(lender.tensors)
        with lender.reading() as (addresses, stream):
            if self._tracker is None:
                self._tracker = self._start(lender.names, (lender.layout, addresses, stream))
            self._tracker.update_at(time, lender.layout, addresses, stream)

    def _start(self, names: list[str], lent: tuple[_native.Layout, list[int], int]) -> _native.Tracker:
        """A tracker that never stores anything; it wants a directory all the same, for its lock."""
        left = [name for name in names if name in self._left_alone or name.startswith(self._prefixes or "\0")]
        options = {
            "profiles": [self.profile.to_dict()],
            "update_every": 1,
            "checkpoint_every": _NEVER,
            "leave_out": left,
            "device": self._device,
        }
        directory = tempfile.mkdtemp(prefix="posthoc-ema-")
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        return _native.Tracker.open(directory, "create", json.dumps(options), *lent)

    @property
    def ema_model(self) -> Any:
        """A module in host memory with the average's weights; before the first update, with the model's at the beginning.

        It is the same object at every call, and its weights are brought up to date by the call.
        """
        tracker = self._tracker
        if tracker is not None and tracker.last_update != self._shown:
            tracker.load_tracked_into(0, *addresses_in(self._module, tracker.tensors()))
            self._shown = tracker.last_update
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The averaged module's output."""
        return self.ema_model(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The average's tensors, under the model's names, with ``initted`` and ``step``: for :meth:`load_state_dict`."""
        torch = torch_module()
        assert torch is not None
        names = self._tensors.lender().names
        held = named_tensors(self.ema_model)
        state = {name: held[name].detach().clone() for name in names}
        return {**state, "initted": torch.tensor(self._tracker is not None), "step": torch.tensor(self._calls)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave.

        The average is taken as it is in the state dict, in the model's dtypes.

        Raises:
            KeyError: for a tensor that is missing.
        """
        calls, begun = int(state_dict["step"]), bool(state_dict["initted"])
        names = self._tensors.lender().names
        own = named_tensors(self._module)
        for name in names:
            own[name].data.copy_(state_dict[name])
        self._tracker = self._shown = None
        self._calls = calls
        if begun:
            # The first update copies what it is given, and the next one's decay follows from its time.
            last = calls - (calls - 1) % self.update_every
            self._fold(ModuleTensors(self._module, self.only_save_diff, names), last)
