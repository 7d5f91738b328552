"""A running average as a module of its own, in host memory."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any

from . import _native
from ._lend import HOST, dtype_name, torch_module
from ._model import plain_name, unwrap
from ._results import Specs

if TYPE_CHECKING:
    from .posthoc_ema import PostHocEMA
    from .profiles import Profile


def copy_on_cpu(model: Any) -> Any:
    """A copy of a module with all its tensors in host memory: no memory of a GPU is taken on the way."""
    torch = torch_module()
    assert torch is not None
    model, memo = unwrap(model), {}
    for tensor in chain(model.parameters(), model.buffers()):
        twin = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if isinstance(tensor, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = twin
    return copy.deepcopy(model, memo)


def addresses_in(module: Any, specs: Specs) -> tuple[_native.Layout, list[int]]:
    """Where the tensors of a synthesis lie in a copy of the model, in the copy's dtypes."""
    own = {plain_name(name): tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    described = [(name, dtype_name(name, own[name].dtype), shape, HOST) for name, _, shape in specs]
    return _native.Layout(described), [own[name].data_ptr() for name, _, _ in specs]


class TrackedAverage:
    """One of the running averages of a :class:`posthoc_ema.PostHocEMA`."""

    def __init__(self, ema: PostHocEMA, index: int):
        self._ema, self._index = ema, index
        self._module: Any = None
        self._update: int | None = None

    @property
    def profile(self) -> Profile:
        """What is tracked."""
        return self._ema.profiles[self._index]

    @property
    def ema_model(self) -> Any:
        """A module in host memory with the average's weights; before the first update, with the model's.

        It is the same object at every call, and its weights are brought up to date by the call.
        """
        assert self._ema._tensors is not None
        if self._module is None:
            self._module = copy_on_cpu(self._ema._tensors.model)
        tracker = self._ema._tracker
        newest = tracker.last_update if tracker is not None else self._ema.step
        if newest is not None and newest != self._update:
            source = tracker if tracker is not None else self._ema._run()
            layout, addresses = addresses_in(self._module, source.tensors())
            if tracker is not None:
                tracker.load_tracked_into(self._index, layout, addresses)
            else:
                source.load_into([self.profile._json], newest, layout, [addresses], None)
            self._update = newest
        return self._module
