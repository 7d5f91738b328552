"""A running average as a module of its own, in host memory."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

from . import _native
from ._dtypes import dtype_name
from ._lend import HOST, torch_module
from ._model import ModuleTensors, unwrap
from ._outputs import Specs
from ._profiles import Profile, to_json


def copy_on_cpu(model: Any) -> Any:
    """A copy of a module with all its tensors in host memory: no memory of a GPU is taken on the way."""
    torch = torch_module()
    assert torch is not None
    model, memo = unwrap(model), {}
    made: dict[Any, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        # Several tensors that share their elements go on sharing them.
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        elements = made.get(place)
        if elements is None or tensor.numel() == 0:
            elements = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            made[place] = elements
        if isinstance(tensor, torch.nn.Parameter):
            memo[id(tensor)] = torch.nn.Parameter(elements, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = elements.detach()
    return copy.deepcopy(model, memo)


def addresses_in(module: Any, specs: Specs) -> tuple[_native.Layout, list[int]]:
    """Where the tensors of a synthesis lie in a copy of the model, in the copy's dtypes."""
    own = named_tensors(module)
    described = [(name, dtype_name(name, own[name].dtype), shape, HOST) for name, _, shape in specs]
    return _native.Layout(described), [own[name].data_ptr() for name, _, _ in specs]


def named_tensors(module: Any) -> dict[str, Any]:
    """A module's tensors by the names of the run, whatever its state dict calls them."""
    tensors = ModuleTensors(module).lender()
    return dict(zip(tensors.names, tensors.tensors))


class TrackedAverage:
    """One of the running averages of a :class:`posthoc_ema.PostHocEMA`.

    Args:
        index: its number among the profiles.
        profile: what is tracked.
        model: the module that it is an average of.
        source: the tracker, or the directory of a run that is only read.
    """

    def __init__(self, index: int, profile: Profile, model: Any, source: _native.Tracker | Path):
        self.profile, self._index = profile, index
        self._model, self._source = model, source
        self._module: Any = None
        self._update: int | None = None

    @property
    def ema_model(self) -> Any:
        """A module in host memory with the average's weights; before the first update, with the model's.

        It is the same object at every call, and its weights are brought up to date by the call.
        """
        if self._module is None:
            self._module = copy_on_cpu(self._model)
        if isinstance(self._source, Path):
            self._read(_native.Run(self._source))
        elif self._source.last_update != self._update:
            self._source.load_tracked_into(self._index, *addresses_in(self._module, self._source.tensors()))
            self._update = self._source.last_update
        return self._module

    def _read(self, run: _native.Run) -> None:
        """Takes the newest snapshot."""
        newest = max(step for index, step in run.snapshots() if index == self._index)
        if newest != self._update:
            layout, addresses = addresses_in(self._module, run.tensors())
            run.load_into(to_json([self.profile]), newest, "off", layout, [addresses], None)
            self._update = newest
