"""Tensors of a model: a module of PyTorch, or a mapping of names to tensors."""

from __future__ import annotations

import operator
import sys
from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ._dtypes import lent_dtype_name
from ._lend import Lender, Part, torch_module
from ._parts import FLAT_PARAMETER, ModuleSources, Source, is_dtensor

Model = Any
"""A module of PyTorch, or a mapping of names to tensors of PyTorch, arrays of NumPy, or objects with DLPack."""

# Tracked even with `only_save_diff`: an averaged network with batch normalisation cannot be evaluated without them.
BATCH_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# Wrappers, each with the attribute that holds the actual module.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "_FabricModule": "_original_module",
}

# Parts that wrappers insert anywhere into the names of parameters.
_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_Slot = tuple[dict[str, Any], str]
"""Dictionary of a module and the key under which it holds a tensor or another module."""


def unwrap(module: Any) -> Any:
    """Returns the module inside `torch.compile`, DistributedDataParallel and other wrappers."""
    while True:
        attributes = [_WRAPPERS[base.__name__] for base in type(module).__mro__ if base.__name__ in _WRAPPERS]
        found = (own_attribute(module, name) for name in [*attributes, "_orig_mod"])
        inner = next((inner for inner in found if inner is not None), None)
        if inner is None:
            return module
        module = inner


def own_attribute(module: Any, name: str) -> Any | None:
    """Returns a part or an attribute of a module's own, or None.

    Modules that delegate `__getattr__` have all attributes of the inner one, which are not meant.
    """
    fields = getattr(module, "__dict__", {})
    parts = fields.get("_modules", ())
    return parts[name] if name in parts else fields.get(name)


def plain_name(name: str) -> str:
    """Removes the parts that wrappers have inserted from a parameter's name."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def gathered_by_fsdp(module: Any) -> frozenset[int]:
    """Returns the identities of the parameters that FSDP holds whole at the moment (`use_orig_params=True`)."""
    handle = own_attribute(module, "_handle")
    flat = getattr(handle, "flat_param", None)
    if handle is None or flat is None or not getattr(handle, "_use_orig_params", False) or handle.is_sharded(flat):
        return frozenset()
    return frozenset(map(id, flat._params or ()))


def check_tensor(name: str, tensor: Any, is_gathered: bool = False) -> None:
    """Refuses tensors whose elements are not in memory, or not in the usual layout.

    Args:
        name: The tensor's name.
        tensor: Tensor of PyTorch.
        is_gathered: FSDP has put the tensor together.

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
            "ZeRO-3 has moved its elements to other processes: leave `rank_zero_only` out, so that each rank tracks "
            "its part with `PostHocEMA.from_model`, or call this within `deepspeed.zero.GatheredParameters(params)`, "
            "with `modifier_rank=0` for the methods that write"
        )
    elif type(tensor).__name__ == "FlatParameter" or (hasattr(tensor, "_fsdp_flattened") and not is_gathered):
        reason = (
            "FSDP has cut it into shards: leave `rank_zero_only` out, so that each rank tracks its shards with "
            "`PostHocEMA.from_model`, or call this within `FullyShardedDataParallel.summon_full_params(model)`"
        )
    elif hasattr(tensor, "to_local") and hasattr(tensor, "device_mesh"):
        reason = (
            "it is a DTensor, of which this process has a part: leave `rank_zero_only` out, so that each rank tracks "
            "its part with `PostHocEMA.from_model`, or pass a mapping of names to gathered tensors (`full_tensor()`)"
        )
    elif tensor.layout is not torch.strided:
        reason = f"its layout is {tensor.layout}: name it in `leave_out`, or convert it to a dense tensor"
    elif tensor.is_quantized:
        reason = "it is quantized: name it in `leave_out`, or dequantize it"
    elif is_wrapper_subclass(tensor):
        reason = f"{type(tensor).__name__} computes its elements from other tensors: name it in `leave_out`"
    elif tensor.numel() > 0 and tensor.untyped_storage().size() == 0:
        reason = "its storage has been freed (FSDP does so between passes): call this while parameters are gathered"
    else:
        return
    raise ValueError(f"tensor `{name}`: {reason}")


def is_wrapper_subclass(tensor: Any) -> bool:
    """Returns True for a tensor without elements of its own, such as those of torchao."""
    return hasattr(type(tensor), "__tensor_flatten__")


def state_dict_keys(model: Any, names: Sequence[str], tensors: Sequence[Any]) -> dict[str, str]:
    """Returns the key of each tensor in the state dict of a module, which its wrappers decide.

    FSDP and DeepSpeed would gather tensors for a state dict; their modules keep the plain names.
    """
    own = {name: name for name in names}
    parts = list(model.modules())
    inserted = any(key in part._modules for part in parts for key in _WRAPPER_PARTS)
    is_plain = unwrap(model) is model and not inserted
    gathers = {"DeepSpeedEngine", "FullyShardedDataParallel"}
    if is_plain or any(base.__name__ in gathers for part in parts for base in type(part).__mro__):
        return own
    owners: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        owners.setdefault(id(tensor), []).append(key)
    for name, tensor in zip(names, tensors):
        keys = [key for key in owners.get(id(tensor), ()) if f".{plain_name(key)}".endswith(f".{name}")]
        if keys:
            # The longer ones are of tied tensors in other parts.
            own[name] = min(keys, key=len)
    return own


class MappingTensors:
    """Tensors of a mapping of names to tensors, looked up at every call."""

    def __init__(self, model: Mapping[str, Any], stored_complex: frozenset[str] = frozenset(), in_parts: bool = False):
        self.model = model
        self.stored_complex = stored_complex
        self.in_parts = in_parts
        self._list()

    def _list(self) -> None:
        self._sources = {name: Source(tensor) for name, tensor in self.model.items()} if self.in_parts else {}
        found = {name: source.part(name) for name, source in self._sources.items()}
        parts = {name: part for name, part in found.items() if part is not None}
        self._marks = [source.mark() for source in self._sources.values()]
        self._lender = Lender(list(self.model.items()), stored_complex=self.stored_complex, parts=parts)

    def patterns_in_use(self, patterns: Sequence[str]) -> list[str]:
        """Returns all patterns: every tensor of a mapping can be lent."""
        return list(patterns)

    @property
    def names(self) -> list[str]:
        """Names at the last lookup, in the order of the mapping."""
        return self._lender.names

    @property
    def pairs(self) -> list[str]:
        """Names of the complex tensors that are lent as pairs of reals."""
        return self._lender.pairs

    def keys(self) -> dict[str, str]:
        """Returns the key of each tensor in the mapping, which is its name."""
        return {name: name for name in self.names}

    def lender(self) -> Lender:
        """Returns a lender of the tensors that the mapping holds now."""
        same = self._lender.names == list(self.model) and all(
            map(operator.is_, self._lender.originals, self.model.values())
        )
        same = same and [source.mark() for source in self._sources.values()] == self._marks
        if not (same and self._lender.is_current()):
            self._list()
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
        stored_complex: Names of the tensors that the run stores as complex numbers, not as pairs of reals.
        in_parts: Lend what this process holds of sharded tensors, instead of refusing them.
    """

    def __init__(
        self,
        module: Any,
        only_save_diff: bool = False,
        keep: Container[str] = (),
        leave_out: Sequence[str] = (),
        stored_complex: frozenset[str] = frozenset(),
        in_parts: bool = False,
    ):
        self.model = module
        self.in_parts = in_parts
        self._only_save_diff = only_save_diff
        self.keep = keep
        self._leave_out = leave_out
        self.stored_complex = stored_complex
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
        sources = ModuleSources(self.model, self.in_parts)
        self._sources: dict[str, Source] = {}
        parts: dict[str, Part] = {}
        buffer_names: set[str] = set()
        self._gathered: frozenset[int] = frozenset()
        if "torch.distributed.fsdp" in sys.modules:
            self._gathered = frozenset().union(*map(gathered_by_fsdp, self.model.modules()))
        for prefix, module in unwrap(self.model).named_modules(remove_duplicate=False):
            parameters = module._parameters
            buffers = module._buffers
            children = module._modules
            self._dictionaries += [parameters, buffers, children]
            self._children += [(children, key) for key in children.keys()]  # noqa: SIM118
            self._parameters += [(parameters, key) for key, value in parameters.items() if value is not None]
            self._absent += [
                (place, key) for place in (parameters, buffers) for key, value in place.items() if value is None
            ]
            for key, (dictionary, at) in [*self._tensor_slots(module), *sources.hidden_slots(module)]:
                name = plain_name(f"{prefix}.{key}" if prefix else key)
                if name in chosen:
                    raise ValueError(
                        f"tensor `{name}`: two tensors of the model have this name without the parts that wrappers "
                        f"insert: rename one, or pass a mapping of names to tensors"
                    )
                source = sources.of(module, key, dictionary[at])
                if self._is_wanted(name, key, source.owner) and self._can_be_lent(name, source, parts):
                    chosen[name] = (dictionary, at)
                    self._sources[name] = source
                    if dictionary is buffers:
                        buffer_names.add(name)
        self._sizes = list(map(len, self._dictionaries))
        self._child_modules = [children[key] for children, key in self._children]
        self._requires_grad = self._requires_grad_now()
        self._slots = list(chosen.values())
        self._in_slots = [dictionary[key] for dictionary, key in self._slots]
        named = [(name, source.owner) for name, source in self._sources.items()]
        self._marks = [source.mark() for source in self._sources.values()] if parts else []
        self._lender = Lender(named, frozenset(buffer_names), self.stored_complex, parts)

    def _tensor_slots(self, module: Any) -> list[tuple[str, _Slot]]:
        """Returns the slots of a module's own tensors: parameters, and the buffers that its state dict holds."""
        skipped = module._non_persistent_buffers_set
        slots = [(module._parameters, key, value) for key, value in module._parameters.items()]
        slots += [(module._buffers, key, value) for key, value in module._buffers.items() if key not in skipped]
        own = [(dictionary, key) for dictionary, key, value in slots if value is not None]
        return [(key, (dictionary, key)) for dictionary, key in own if not self.in_parts or key != FLAT_PARAMETER]

    def _can_be_lent(self, name: str, source: Source, parts: dict[str, Part]) -> bool:
        """Returns False for a tensor that cannot be lent and is left out; raises if it is not left out.

        Adds the part of a sharded tensor to `parts`.
        """
        tensor = source.owner
        is_left_out = any(_matches(pattern, name) for pattern in self._leave_out)
        # Some tensors answer no question at all, so one that is left out is asked none.
        if is_left_out and is_wrapper_subclass(tensor) and not (self.in_parts and is_dtensor(tensor)):
            self._left_out.append(name)
            return False
        try:
            part = source.part(name) if self.in_parts else None
            check_tensor(name, tensor if part is None else part.local, id(tensor) in self._gathered)
            lent_dtype_name(name, tensor.dtype)
        except ValueError:
            if not is_left_out:
                raise
            self._left_out.append(name)
            return False
        if part is not None:
            parts[name] = part
        return True

    def _is_wanted(self, name: str, key: str, tensor: Any) -> bool:
        return not self._only_save_diff or tensor.requires_grad or key in BATCH_STATISTICS or name in self.keep

    @property
    def names(self) -> list[str]:
        """Names at the last listing, in the order of the state dict."""
        return self._lender.names

    @property
    def pairs(self) -> list[str]:
        """Names of the complex tensors that are lent as pairs of reals."""
        return self._lender.pairs

    def keys(self) -> dict[str, str]:
        """Returns the key that each tensor has in the model's own state dict, which may be that of a wrapper."""
        return state_dict_keys(self.model, self.names, self._lender.originals)

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
                and all(map(operator.is_, [place[key] for place, key in self._slots], self._in_slots))
                and (not self._marks or [source.mark() for source in self._sources.values()] == self._marks)
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
    model: Model,
    only_save_diff: bool = False,
    keep: Container[str] = (),
    leave_out: Sequence[str] = (),
    stored_complex: frozenset[str] = frozenset(),
    in_parts: bool = False,
) -> ModuleTensors | MappingTensors:
    """Lists the tensors of a model; the options are those of `ModuleTensors`.

    Raises:
        TypeError: If the object is neither a module nor a mapping.
    """
    if isinstance(model, Mapping):
        return MappingTensors(model, stored_complex, in_parts)
    torch = torch_module()
    if torch is not None and isinstance(unwrap(model), torch.nn.Module):
        return ModuleTensors(model, only_save_diff, keep, leave_out, stored_complex, in_parts)
    raise TypeError(
        f"{type(model).__name__} is not a model: pass a module of PyTorch, or a mapping of names to tensors or arrays"
    )
