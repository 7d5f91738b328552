"""A running average as a module in host memory."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any

from . import _native
from ._dtypes import dtype_name
from ._lend import HOST, torch_module
from ._model import ModuleTensors, unwrap
from ._outputs import TensorSpecs
from ._profiles import Profile, to_json


def copy_on_cpu(model: Any) -> Any:
    """Copies a module with all its tensors to host memory, without memory of a GPU."""
    torch = torch_module()
    assert torch is not None
    model = unwrap(model)
    memo = {}
    made: dict[Any, Any] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        # Tensors that share their elements must share them in the copy.
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


def lend_tensors(module: Any, specs: TensorSpecs) -> tuple[_native.Layout, list[int]]:
    """Returns layout and addresses of a copied module's tensors, in its own dtypes and in the order of the specs."""
    own = named_tensors(module)
    described = [(name, dtype_name(name, own[name].dtype), shape, HOST) for name, _, shape in specs]
    return _native.Layout(described), [own[name].data_ptr() for name, _, _ in specs]


def named_tensors(module: Any) -> dict[str, Any]:
    """Returns a module's tensors under their names in a run."""
    tensors = ModuleTensors(module).lender()
    return dict(zip(tensors.names, tensors.tensors))


class TrackedAverage:
    """One of the running averages of a `PostHocEMA`, as a module.

    Args:
        index: Number of the average among the tracked profiles.
        profile: Profile of the average.
        model: Module that is averaged.
        source: Tracker, or directory of a run that was opened by path.
    """

    def __init__(self, index: int, profile: Profile, model: Any, source: _native.Tracker | Path):
        self.profile = profile
        self._index = index
        self._model = model
        self._source = source
        self._module: Any = None
        self._update: int | None = None

    @property
    def ema_model(self) -> Any:
        """Module in host memory with the average's weights; before the first update, with those of the model.

        Every access returns the same object and updates its weights.
        """
        if self._module is None:
            self._module = copy_on_cpu(self._model)
        if isinstance(self._source, Path):
            self._load_newest(_native.Run(self._source))
        elif self._source.last_update != self._update:
            self._source.load_tracked_into(self._index, *lend_tensors(self._module, self._source.tensors()))
            self._update = self._source.last_update
        return self._module

    def _load_newest(self, run: _native.Run) -> None:
        """Loads the newest snapshot, unless it is loaded already."""
        newest = max(step for index, step in run.snapshots() if index == self._index)
        if newest != self._update:
            layout, addresses = lend_tensors(self._module, run.tensors())
            run.load_into(to_json([self.profile]), newest, "off", layout, [addresses], None)
            self._update = newest
