"""Tensors of a model: a module of PyTorch, or a mapping of names to tensors."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ._dtypes import dtype_name
from ._lend import Lender, torch_module

Model = Any
"""A module of PyTorch, or a mapping of names to tensors of PyTorch, arrays of NumPy, or objects with DLPack."""

# Tracked even with `only_save_diff`: an averaged network with batch normalisation cannot be evaluated without them.
BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# Wrappers that hold the actual module as `module`.
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine", "FullyShardedDataParallel"}

# Parts that wrappers insert anywhere into the names of parameters.
_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_Slot = tuple[dict[str, Any], str]
"""Dictionary of a module and the key under which it holds a tensor or another module."""


def unwrap(module: Any) -> Any:
    """Returns the module inside `torch.compile`, DistributedDataParallel and other wrappers."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and {base.__name__ for base in type(module).__mro__} & _WRAPPERS:
            inner = getattr(module, "module", None)
        if inner is None:
            return module
        module = inner


def plain_name(name: str) -> str:
    """Removes the parts that wrappers have inserted from a parameter's name."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def check_tensor(name: str, tensor: Any) -> None:
    """Refuses tensors whose elements are not in memory, or not in the usual layout.

    Raises:
        ValueError: If the tensor is meta, lazy, sharded, sparse or quantized; the message names the remedy.
    """
    torch = torch_module()
    assert torch is not None
    if torch.nn.parameter.is_lazy(tensor):
        reason = "it has no shape yet: run a batch through the model first"
    elif tensor.is_meta:
        reason = "it is on the meta device and has no elements: materialise the model first (`to_empty`, then load it)"
    elif hasattr(tensor, "ds_id") and tensor.numel() == 0 and getattr(tensor, "ds_numel", 0) > 0:
        reason = (
            "ZeRO-3 has moved its elements to other processes: call this within "
            "`deepspeed.zero.GatheredParameters(params)`, with `modifier_rank=0` for the methods that write"
        )
    elif type(tensor).__name__ == "FlatParameter" or hasattr(tensor, "_fsdp_flattened"):
        reason = (
            "FSDP has cut it into shards: call this within `FullyShardedDataParallel.summon_full_params(model)`, or "
            "pass a mapping of names to gathered tensors"
        )
    elif hasattr(tensor, "to_local") and hasattr(tensor, "device_mesh"):
        reason = (
            "it is a DTensor, of which this process has a part: pass a mapping of names to gathered tensors "
            "(`full_tensor()`) instead of the module"
        )
    elif tensor.layout is not torch.strided:
        reason = f"its layout is {tensor.layout}: name it in `leave_out`, or convert it to a dense tensor"
    elif tensor.is_quantized:
        reason = "it is quantized: name it in `leave_out`, or dequantize it"
    elif tensor.numel() > 0 and tensor.untyped_storage().size() == 0:
        reason = "its storage has been freed (FSDP does so between passes): call this while parameters are gathered"
    else:
        return
    raise ValueError(f"tensor `{name}`: {reason}")


class MappingTensors:
    """Tensors of a mapping of names to tensors, looked up at every call."""

    def __init__(self, model: Mapping[str, Any]):
        self.model = model
        self._lender = Lender(list(model.items()))

    def patterns_in_use(self, patterns: Sequence[str]) -> list[str]:
        """Returns all patterns: every tensor of a mapping can be lent."""
        return list(patterns)

    @property
    def names(self) -> list[str]:
        """Names at the last lookup, in the order of the mapping."""
        return self._lender.names

    def lender(self) -> Lender:
        """Returns a lender of the tensors that the mapping holds now."""
        same = self._lender.names == list(self.model) and all(
            map(operator.is_, self._lender.originals, self.model.values())
        )
        if not (same and self._lender.is_current()):
            self._lender = Lender(list(self.model.items()))
        return self._lender


class ModuleTensors:
    """Parameters and persistent buffers of a module, under the names of its state dict.

    Listing a large module takes longer than an update. The list is therefore kept until a look at the dictionaries of
    all submodules and at all tensors, some tenths of a microsecond each, finds a change.

    Args:
        module: Module to track; wrappers are looked through.
        only_save_diff: Leave out parameters that do not require grad, and buffers except for batch statistics.
        keep: Names that stay even if they no longer require grad.
        leave_out: Names and globs of tensors of any kind to leave out.
    """

    def __init__(
        self, module: Any, only_save_diff: bool = False, keep: Container[str] = (), leave_out: Sequence[str] = ()
    ):
        self.model = module
        self._only_save_diff = only_save_diff
        self.keep = keep
        self._leave_out = leave_out
        self._list()

    def patterns_in_use(self, patterns: Sequence[str]) -> list[str]:
        """Drops the patterns that only match tensors which are not lent anyway.

        A pattern that matches nothing stays, so that the native part refuses it.
        """
        lent = self.names
        left_out = self._left_out
        return [p for p in patterns if any(_matches(p, n) for n in lent) or not any(_matches(p, n) for n in left_out)]

    def _list(self) -> None:
        """Lists the tensors, and the dictionaries in which a change of the module shows."""
        self._dictionaries: list[dict[str, Any]] = []
        self._children: list[_Slot] = []
        self._parameters: list[_Slot] = []
        self._absent: list[_Slot] = []
        # Tensors that match `leave_out` because they cannot be lent.
        self._left_out: list[str] = []
        chosen: dict[str, _Slot] = {}
        for prefix, module in unwrap(self.model).named_modules(remove_duplicate=False):
            parameters = module._parameters
            buffers = module._buffers
            children = module._modules
            self._dictionaries += [parameters, buffers, children]
            self._children += [(children, key) for key in children]
            self._parameters += [(parameters, key) for key, value in parameters.items() if value is not None]
            self._absent += [(place, key) for place in (parameters, buffers) for key in place if place[key] is None]
            for dictionary, key in self._tensor_slots(module):
                name = plain_name(f"{prefix}.{key}" if prefix else key)
                if name in chosen:
                    raise ValueError(
                        f"tensor `{name}`: two tensors of the model have this name without the parts that wrappers "
                        f"insert: rename one, or pass a mapping of names to tensors"
                    )
                if self._is_wanted(name, key, dictionary[key]) and self._can_be_lent(name, dictionary[key]):
                    chosen[name] = (dictionary, key)
        self._sizes = list(map(len, self._dictionaries))
        self._child_modules = [children[key] for children, key in self._children]
        self._requires_grad = self._requires_grad_now()
        self._slots = list(chosen.values())
        self._lender = Lender([(name, dictionary[key]) for name, (dictionary, key) in chosen.items()])

    @staticmethod
    def _tensor_slots(module: Any) -> list[_Slot]:
        """Returns the slots of a module's own tensors: parameters, and the buffers that its state dict holds."""
        buffers = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
        slots = [(module._parameters, key) for key in module._parameters] + [(module._buffers, key) for key in buffers]
        return [(dictionary, key) for dictionary, key in slots if dictionary[key] is not None]

    def _can_be_lent(self, name: str, tensor: Any) -> bool:
        """Returns False for a tensor that cannot be lent and is left out; raises if it is not left out."""
        try:
            check_tensor(name, tensor)
            dtype_name(name, tensor.dtype)
        except ValueError:
            if not any(_matches(pattern, name) for pattern in self._leave_out):
                raise
            self._left_out.append(name)
            return False
        return True

    def _is_wanted(self, name: str, key: str, tensor: Any) -> bool:
        return not self._only_save_diff or tensor.requires_grad or key in BATCH_STATISTICS or name in self.keep

    @property
    def names(self) -> list[str]:
        """Names at the last listing, in the order of the state dict."""
        return self._lender.names

    def lender(self) -> Lender:
        """Returns a lender of the tensors that the module holds now."""
        if not self._is_current():
            self._list()
        return self._lender

    def _is_current(self) -> bool:
        """Returns True if the module still holds the listed tensors."""
        try:
            return (
                list(map(len, self._dictionaries)) == self._sizes
                and all(map(operator.is_, [children[key] for children, key in self._children], self._child_modules))
                and all(map(operator.is_, [place[key] for place, key in self._slots], self._lender.tensors))
                and all(place[key] is None for place, key in self._absent)
                and (not self._only_save_diff or self._requires_grad_now() == self._requires_grad)
                and self._lender.is_current()
            )
        except (KeyError, AttributeError):
            # An entry was removed, or replaced by None.
            return False

    def _requires_grad_now(self) -> list[bool]:
        return [parameters[key].requires_grad for parameters, key in self._parameters]


def _matches(pattern: str, name: str) -> bool:
    """Returns True if a tensor's name equals a pattern or matches it as a glob."""
    return pattern == name or fnmatchcase(name, pattern)


def tensors_of(
    model: Model, only_save_diff: bool = False, keep: Container[str] = (), leave_out: Sequence[str] = ()
) -> ModuleTensors | MappingTensors:
    """Lists the tensors of a model; the options are those of `ModuleTensors`.

    Raises:
        TypeError: If the object is neither a module nor a mapping.
    """
    if isinstance(model, Mapping):
        return MappingTensors(model)
    torch = torch_module()
    if torch is not None and isinstance(unwrap(model), torch.nn.Module):
        return ModuleTensors(model, only_save_diff, keep, leave_out)
    raise TypeError(
        f"{type(model).__name__} is not a model: pass a module of PyTorch, or a mapping of names to tensors or arrays"
    )
