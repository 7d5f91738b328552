"""A running average as a module in host memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from . import _native
from ._lend import Lender, torch_module
from ._model import is_wrapper_subclass, plain_name, unwrap
from ._outputs import TensorSpecs, complex_names
from ._profiles import Profile, to_json
from ._spectral import refresh_spectral_norms


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
        if elements is None or tensor.numel() == 0 or is_wrapper_subclass(tensor):
            elements = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            made[place] = elements
        if isinstance(tensor, torch.nn.Parameter):
            memo[id(tensor)] = torch.nn.Parameter(elements, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = elements.detach()
    for part in model.modules():
        # Results of hooks, such as those of old weight norms, belong to a graph and cannot be copied.
        results = [v for v in part.__dict__.values() if isinstance(v, torch.Tensor) and not v.is_leaf]
        memo.update({id(result): result.detach().to("cpu", copy=True) for result in results})
    return copy.deepcopy(model, memo)


@contextmanager
def lent_tensors(module: Any, specs: TensorSpecs) -> Iterator[tuple[_native.Layout, list[int]]]:
    """Lends a module's tensors to be written, in its own dtypes and in the order of the specs.

    The native part writes contiguous host memory. Others, because the module was moved to a device or to another memory
    format, are copied from there after the block.
    """
    torch = torch_module()
    assert torch is not None
    own = named_tensors(module)
    targets = {name: own[name].data for name, _, _ in specs}
    held = {
        name: each if _is_host(each) else torch.empty(each.shape, dtype=each.dtype, device="cpu")
        for name, each in targets.items()
    }
    buffers = frozenset(plain_name(name) for name, _ in module.named_buffers(remove_duplicate=False))
    yield Lender(list(held.items()), buffers, complex_names(specs)).layout, [each.data_ptr() for each in held.values()]
    for name, tensor in targets.items():
        if held[name] is not tensor:
            tensor.copy_(held[name])


def _is_host(tensor: Any) -> bool:
    """Returns True if a tensor's elements are in host memory as they are, in the order of its shape."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def named_tensors(module: Any) -> dict[str, Any]:
    """Returns a module's tensors under the names that they have in a run."""
    kinds = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {plain_name(name): tensor for named in kinds for name, tensor in named}


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

        Every access returns the same object and updates its weights, also after it was moved to another device.
        """
        if self._module is None:
            self._module = copy_on_cpu(self._model)
        if isinstance(self._source, Path):
            self._load_newest(_native.Run(self._source))
        elif self._source.last_update != self._update:
            with lent_tensors(self._module, self._source.tensors()) as lent:
                self._source.load_tracked_into(self._index, *lent)
            refresh_spectral_norms(self._module)
            self._update = self._source.last_update
        return self._module

    def show_in(self, module: Any) -> None:
        """Updates the weights of another module of the model's structure, which `ema_model` returns from now on."""
        if module is not self._module:
            self._module = module
            self._update = None
        _ = self.ema_model

    def _load_newest(self, run: _native.Run) -> None:
        """Loads the newest snapshot, unless it is loaded already."""
        newest = max(step for index, step in run.snapshots() if index == self._index)
        if newest != self._update:
            with lent_tensors(self._module, run.tensors()) as (layout, addresses):
                run.load_into(to_json([self.profile]), newest, "off", layout, [addresses], None)
            refresh_spectral_norms(self._module)
            self._update = newest
