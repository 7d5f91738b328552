"""The tensors of a module of PyTorch, or of a mapping of names to tensors: which there are, and whether they still are."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ._dtypes import dtype_name
from ._lend import Lender, torch_module

# Saved whatever requires grad: without them an averaged network with batch normalisation cannot be evaluated.
BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# Wrappers that hold the module proper as `module`.
_WRAPPERS = {"DistributedDataParallel", "DataParallel", "DeepSpeedEngine", "FullyShardedDataParallel"}

# What wrappers put into the names of parameters, wherever they stand.
_IN_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(module: Any) -> Any:
    """The module inside `torch.compile`, DistributedDataParallel and their like."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and {base.__name__ for base in type(module).__mro__} & _WRAPPERS:
            inner = getattr(module, "module", None)
        if inner is None:
            return module
        module = inner


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers have put into it."""
    return ".".join(part for part in name.split(".") if part not in _IN_NAMES)


def check_tensor(name: str, tensor: Any) -> None:
    """Refuses tensors whose elements are not there.

    Raises:
        ValueError: for meta, lazy, sharded, sparse and quantized tensors, naming the remedy.
    """
    torch = torch_module()
    assert torch is not None
    if torch.nn.parameter.is_lazy(tensor):
        reason = "it has no shape yet: run a batch through the model first"
    elif tensor.is_meta:
        reason = "it is on the meta device and has no elements: materialise the model first (`to_empty`, then load it)"
    elif hasattr(tensor, "ds_id") and tensor.numel() == 0 and getattr(tensor, "ds_numel", 0) > 0:
        reason = (
            "ZeRO-3 has put its elements elsewhere: call this within `deepspeed.zero.GatheredParameters(params)`, "
            "for the methods that write with `modifier_rank=0`"
        )
    elif type(tensor).__name__ == "FlatParameter" or hasattr(tensor, "_fsdp_flattened"):
        reason = (
            "FSDP has cut it into shards: call this within `FullyShardedDataParallel.summon_full_params(model)`, or pass "
            "a mapping of names to gathered tensors"
        )
    elif hasattr(tensor, "to_local") and hasattr(tensor, "device_mesh"):
        reason = (
            "it is a DTensor, of which this process has a part: pass a mapping of names to gathered tensors "
            "(`full_tensor()`) instead of the module"
        )
    elif tensor.layout is not torch.strided:
        reason = f"its layout is {tensor.layout}: leave it out, or pass it dense"
    elif tensor.is_quantized:
        reason = "it is quantized: leave it out, or pass it dequantized"
    elif tensor.numel() > 0 and tensor.untyped_storage().size() == 0:
        reason = "its storage has been freed (FSDP does so between passes): call this while parameters are gathered"
    else:
        return
    raise ValueError(f"tensor `{name}`: {reason}")


class MappingTensors:
    """The tensors of a mapping, or of a list of pairs, of names to tensors: looked up anew at every call."""

    def __init__(self, model: Mapping[str, Any]):
        self.model = model
        self._lender = Lender(list(model.items()))

    def patterns_in_use(self, patterns: Sequence[str]) -> list[str]:
        """All of them: whatever a mapping holds must be fit to be lent."""
        return list(patterns)

    @property
    def names(self) -> list[str]:
        """The names as they were last listed, in the model's order."""
        return self._lender.names

    def lender(self) -> Lender:
        """The tensors as they are now."""
        same = self._lender.names == list(self.model) and all(
            map(operator.is_, self._lender.originals, self.model.values())
        )
        if not (same and self._lender.is_current()):
            self._lender = Lender(list(self.model.items()))
        return self._lender


class ModuleTensors:
    """The parameters and persistent buffers of a module, under the names of its state dict.

    Listing a large module takes longer than an update, so the list is kept for as long as nothing has changed: that takes
    a look at every module's dictionaries and at every tensor, some tenths of a microsecond each.

    Args:
        module: what is to be tracked; wrappers are looked through.
        only_save_diff: leave out parameters that do not require grad, and buffers but for those of batch normalisation.
        keep: names that stay, whether or not they require grad by now.
        leave_out: names and globs; what they stand for may be of any kind.
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
        """Those that stand for a tensor that is lent, and those that stand for none at all, for the error."""
        lent, unfit = self.names, self._unfit
        return [
            p for p in patterns if any(_stands_for(p, n) for n in lent) or not any(_stands_for(p, n) for n in unfit)
        ]

    def _list(self) -> None:
        """Looks through the module."""
        # Dictionaries of every module, in which anything that is added or removed shows.
        self._dictionaries: list[dict[str, Any]] = []
        self._children: list[tuple[dict[str, Any], str]] = []
        self._parameters: list[tuple[dict[str, Any], str]] = []
        self._absent: list[tuple[dict[str, Any], str]] = []
        # What cannot be lent, and is left out.
        self._unfit: list[str] = []
        chosen: dict[str, tuple[dict[str, Any], str]] = {}
        for prefix, module in unwrap(self.model).named_modules(remove_duplicate=False):
            parameters, buffers, children = module._parameters, module._buffers, module._modules
            self._dictionaries += [parameters, buffers, children]
            self._children += [(children, key) for key in children]
            self._parameters += [(parameters, key) for key, value in parameters.items() if value is not None]
            self._absent += [(place, key) for place in (parameters, buffers) for key in place if place[key] is None]
            for dictionary, key in self._of_module(module):
                name = plain_name(f"{prefix}.{key}" if prefix else key)
                if name in chosen:
                    raise ValueError(f"tensor `{name}`: two tensors have this name once wrappers' parts are taken out")
                if self._is_wanted(name, key, dictionary[key]) and self._is_fit(name, dictionary[key]):
                    chosen[name] = (dictionary, key)
        self._sizes = list(map(len, self._dictionaries))
        self._child_modules = [children[key] for children, key in self._children]
        self._requires_grad = [parameters[key].requires_grad for parameters, key in self._parameters]
        self._slots = list(chosen.values())
        self._lender = Lender([(name, dictionary[key]) for name, (dictionary, key) in chosen.items()])

    @staticmethod
    def _of_module(module: Any) -> list[tuple[dict[str, Any], str]]:
        """Where a module's own tensors are: parameters, and the buffers that its state dict holds."""
        buffers = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
        places = [(module._parameters, key) for key in module._parameters] + [(module._buffers, key) for key in buffers]
        return [(dictionary, key) for dictionary, key in places if dictionary[key] is not None]

    def _is_fit(self, name: str, tensor: Any) -> bool:
        try:
            check_tensor(name, tensor)
            dtype_name(name, tensor.dtype)
        except ValueError:
            if not any(_stands_for(pattern, name) for pattern in self._leave_out):
                raise
            self._unfit.append(name)
            return False
        return True

    def _is_wanted(self, name: str, key: str, tensor: Any) -> bool:
        return not self._only_save_diff or tensor.requires_grad or key in BATCH_STATISTICS or name in self.keep

    @property
    def names(self) -> list[str]:
        """The names as they were last listed, in the order of the state dict."""
        return self._lender.names

    def lender(self) -> Lender:
        """The tensors as they are now."""
        if not self._is_current():
            self._list()
        return self._lender

    def _is_current(self) -> bool:
        try:
            return (
                list(map(len, self._dictionaries)) == self._sizes
                and all(map(operator.is_, [children[key] for children, key in self._children], self._child_modules))
                and all(map(operator.is_, [place[key] for place, key in self._slots], self._lender.tensors))
                and all(place[key] is None for place, key in self._absent)
                and (not self._only_save_diff or self._required() == self._requires_grad)
                and self._lender.is_current()
            )
        except (KeyError, AttributeError):
            # Something was replaced, by None perhaps.
            return False

    def _required(self) -> list[bool]:
        return [parameters[key].requires_grad for parameters, key in self._parameters]


def _stands_for(pattern: str, name: str) -> bool:
    """Whether a name, or a glob, stands for a tensor."""
    return pattern == name or fnmatchcase(name, pattern)


def tensors_of(
    model: Any, only_save_diff: bool = False, keep: Container[str] = (), leave_out: Sequence[str] = ()
) -> ModuleTensors | MappingTensors:
    """What can be lent of a model.

    Raises:
        TypeError: for what is neither a module nor a mapping.
    """
    if isinstance(model, Mapping):
        return MappingTensors(model)
    torch = torch_module()
    if torch is not None and isinstance(unwrap(model), torch.nn.Module):
        return ModuleTensors(model, only_save_diff, keep, leave_out)
    raise TypeError(
        f"{type(model).__name__} is no model: pass a module of PyTorch, or a mapping of names to tensors or arrays"
    )
