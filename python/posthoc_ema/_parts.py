"""Parts of tensors that this process holds: of DTensors, of FSDP's flat parameters, and of ZeRO-3.

Nothing here communicates. FSDP puts parameters together for its passes; the parts are those between the steps, which
the optimizer changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._lend import Part, torch_module

FLAT_PARAMETER = "_flat_param"
"""Name under which an FSDP1 module registers its flat parameter."""

ZERO3 = "parameter of DeepSpeed's ZeRO-3"
"""Layout of its parts, in words."""

_Slot = tuple[dict[str, Any], str]
"""Dictionary of a module and the key under which it holds a tensor."""


class Source:
    """Tensor of a module, of which this process may hold a part.

    Args:
        owner: Tensor that the module holds between the steps.
    """

    def __init__(self, owner: Any):
        self.owner = owner

    def part(self, name: str) -> Part | None:
        """Returns the part, or None for a plain tensor.

        Args:
            name: Name of the tensor, for messages.

        Raises:
            ValueError: If the elements are not one rectangle of a tensor.
        """
        if is_dtensor(self.owner):
            return _part_of_dtensor(name, self.owner)
        return _part_of_zero3(self.owner) if _is_of_zero3(self.owner) else None

    def mark(self) -> int:
        """Returns a number that changes when the elements are those of another tensor."""
        if is_dtensor(self.owner):
            return id(self.owner._local_tensor)
        return id(self.owner.ds_tensor) if _is_of_zero3(self.owner) else 0


class FlatSource(Source):
    """Tensor that FSDP1 keeps in a flat parameter.

    Args:
        owner: Flat parameter, or with `use_orig_params` the parameter of the module.
        wrapper: FSDP module of the flat parameter.
        index: Number of the tensor in it.
    """

    def __init__(self, owner: Any, wrapper: Any, index: int):
        super().__init__(owner)
        self._wrapper = wrapper
        self._handle = wrapper._handle
        self._index = index

    def part(self, name: str) -> Part:
        """Returns the range that this process holds."""
        flat, handle = self._handle.flat_param, self._handle
        shape = tuple(flat._shapes[self._index])
        if not handle.uses_sharded_strategy:
            sizes = [0 if is_padding else size for size, is_padding in _with_padding(flat)]
            place = [i for i, (_, is_padding) in enumerate(_with_padding(flat)) if not is_padding][self._index]
            start = sum(size for size, _ in _with_padding(flat)[:place])
            local = flat.data.view(-1)[start : start + sizes[place]].view(shape)
            return Part(local, shape, (0,) * len(shape), handle.rank > 0, "parameter of FSDP without shards")
        info = flat._shard_param_infos[self._index]
        first, size, offset = 0, 0, 0
        if info.in_shard:
            first, size, offset = info.offset_in_shard, info.numel_in_shard, info.intra_param_start_idx
        # With hybrid sharding each node has all shards.
        is_replica = _rank_in(getattr(self._wrapper, "_inter_node_pg", None)) > 0
        local = self._shard()[first : first + size]
        return Part(local, shape, (offset,), is_replica, "range of FSDP's flat parameter")

    def _shard(self) -> Any:
        """Returns the shard of this process in full precision, also while FSDP has put the parameters together."""
        flat = self._handle.flat_param
        return getattr(flat, "_local_shard", flat).data

    def mark(self) -> int:
        """Returns the address of the elements of the flat parameter."""
        return int((self._shard() if self._handle.uses_sharded_strategy else self._handle.flat_param).data_ptr())


def _with_padding(flat: Any) -> list[tuple[int, bool]]:
    """Returns the sizes of what a flat parameter consists of, and if it is padding."""
    sizes = getattr(flat, "_numels_with_padding", flat._numels)
    return list(zip(map(int, sizes), getattr(flat, "_is_padding_mask", [False] * len(sizes))))


def is_dtensor(tensor: Any) -> bool:
    """Returns True for a DTensor of PyTorch."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "_local_tensor")


def _is_of_zero3(tensor: Any) -> bool:
    """Returns True for a parameter of which ZeRO-3 keeps a range on each process."""
    return hasattr(tensor, "ds_id") and getattr(tensor, "ds_tensor", None) is not None


def is_sharded(model: Any) -> bool:
    """Returns True if a module or mapping has a tensor of which this process holds a part. Never raises."""
    torch = torch_module()
    if isinstance(model, Mapping):
        return any(map(_is_part, model.values()))
    if torch is None or not isinstance(model, torch.nn.Module):
        return False
    modules = list(model.modules())
    places = [place for module in modules for place in (module._parameters, module._buffers)]
    tensors = [tensor for place in places for tensor in place.values() if tensor is not None]
    return any(map(_is_part, tensors)) or any(_is_fsdp(module) for module in modules)


def _is_part(tensor: Any) -> bool:
    return is_dtensor(tensor) or _is_of_zero3(tensor)


def _is_fsdp(module: Any) -> bool:
    return _flat_parameter(module) is not None or next(_fsdp2_parameters(module), None) is not None


class ModuleSources:
    """Sources of the tensors of a module.

    Args:
        model: Module, with its wrappers.
        in_parts: Look for what FSDP has changed; otherwise each tensor is its own source.
    """

    def __init__(self, model: Any, in_parts: bool):
        # Parameters that FSDP2 has registered for a pass, and those that it registers between the steps.
        self._resting: dict[int, Any] = {}
        # Wrapper and number of each tensor in a flat parameter, by its module and key.
        self._flat: dict[tuple[int, str], tuple[Any, int]] = {}
        for module in model.modules() if in_parts else ():
            for parameter in _fsdp2_parameters(module):
                for name in ("_unsharded_param", "_sharded_post_forward_param"):
                    self._resting[id(getattr(parameter, name, None))] = parameter.sharded_param
            if _flat_parameter(module) is not None:
                self._add_flat(module)

    def _add_flat(self, wrapper: Any) -> None:
        flat: Any = _flat_parameter(wrapper)
        numbers = {(id(info.module), info.param_name): i for i, info in enumerate(flat._param_infos)}
        for shared in flat._shared_param_infos:
            numbers[id(shared.module), shared.param_name] = numbers[id(shared.prim_module), shared.prim_param_name]
        self._flat.update((slot, (wrapper, index)) for slot, index in numbers.items())

    def of(self, module: Any, key: str, tensor: Any) -> Source:
        """Returns the source of a tensor in a slot of a part of the module."""
        if (id(module), key) in self._flat:
            return FlatSource(tensor, *self._flat[id(module), key])
        return Source(self._resting.get(id(tensor), tensor))

    def hidden_slots(self, module: Any) -> Iterator[tuple[str, _Slot]]:
        """Yields the tensors that a module lost to a flat parameter: the key, and the slot of the flat parameter."""
        for (owner, key), (wrapper, _) in self._flat.items():
            registered = wrapper._handle._fully_sharded_module._parameters
            if owner == id(module) and key not in module._parameters and FLAT_PARAMETER in registered:
                yield key, (registered, FLAT_PARAMETER)


def reshard(model: Any) -> None:
    """Frees the parameters that FSDP has put together, so that its next pass reads the shards. Communicates nothing."""
    for module in () if isinstance(model, Mapping) else model.modules():
        if next(_fsdp2_parameters(module), None) is not None:
            module.reshard()
        handle: Any = getattr(module, "__dict__", {}).get("_handle")
        # FSDP1 keeps those of the root after a pass, and reads them in the next.
        if hasattr(getattr(handle, "flat_param", None), "_full_param_padded") and not handle.needs_unshard():
            handle.reshard(free_unsharded_flat_param=True)
            handle.post_reshard()


def _fsdp2_parameters(module: Any) -> Iterator[Any]:
    """Yields the parameters that FSDP2 shards with a module."""
    if "torch.distributed.fsdp" not in sys.modules or not hasattr(type(module), "_get_fsdp_state"):
        return
    state = module._get_fsdp_state()
    groups: Sequence[Any] | None = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        # PyTorch 2.5 to 2.9 have one group, or None.
        group = getattr(state, "_fsdp_param_group", None)
        groups = [] if group is None else [group]
    for group in groups:
        yield from group.fsdp_params


def _flat_parameter(module: Any) -> Any | None:
    """Returns the flat parameter of a module, if FSDP1 has made one."""
    return getattr(getattr(module, "__dict__", {}).get("_handle"), "flat_param", None)


def _rank_in(group: Any) -> int:
    """Returns the rank of this process in a group; 0 without one."""
    torch = torch_module()
    assert torch is not None
    return 0 if group is None else int(torch.distributed.get_rank(group))


def _part_of_dtensor(name: str, tensor: Any) -> Part:
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, local = tuple(map(int, tensor.shape)), tensor._local_tensor
    kind = f"DTensor of shape {list(shape)} with placements {tuple(placements)} on a mesh of {list(mesh.shape)}"
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"tensor `{name}`: it is a {kind}, whose elements are sums over processes: redistribute it to `Shard` or "
            f"`Replicate`, or name it in `leave_out`"
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"tensor `{name}`: it is a {kind}, of which this process is not: name it in `leave_out`")
    rectangle = _rectangle(shape, list(mesh.shape), placements, coordinate)
    if rectangle is None or rectangle[1] != tuple(local.shape):
        raise ValueError(
            f"tensor `{name}`: it is a {kind}, of which this process holds {list(local.shape)}: these elements are not "
            f"one rectangle by the rules of `distribute_tensor`: redistribute it, or name it in `leave_out`"
        )
    # The first process along each dimension that replicates has the elements to store.
    is_replica = any(at > 0 and placement.is_replicate() for at, placement in zip(coordinate, placements))
    return Part(local, shape, rectangle[0], is_replica, kind)


def _rectangle(
    shape: tuple[int, ...], mesh: list[int], placements: Sequence[Any], coordinate: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns offset and shape of the rectangle at a coordinate of a mesh.

    A tensor is cut along the dimensions of the mesh in their order. Strided shards are cut last, from right to left:
    FSDP2 makes them of what tensor parallelism has cut before.

    Returns:
        None if the elements are not one rectangle, because a strided shard interleaves others.
    """
    offset, size = [0] * len(shape), list(shape)
    cuts = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    strided = [i for i in cuts if hasattr(placements[i], "split_factor")]
    done: list[int] = []
    for i in [*(i for i in cuts if i not in strided), *reversed(strided)]:
        dim = placements[i].dim
        before = 1
        for other in done:
            before *= mesh[other] if other > i and placements[other].dim == dim else 1
        if int(getattr(placements[i], "split_factor", before)) != before:
            return None
        chunk = -(-size[dim] // mesh[i])
        start = min(chunk * coordinate[i], size[dim])
        offset[dim], size[dim] = offset[dim] + start, min(chunk, size[dim] - start)
        done.append(i)
    return tuple(offset), tuple(size)


def _part_of_zero3(tensor: Any) -> Part:
    """Returns the range of a parameter of DeepSpeed's ZeRO-3, by the fields that `deepspeed.zero.Init` documents.

    Process i holds the flattened elements from `i * ds_tensor.ds_numel` on in `ds_tensor`, the last ones with padding.
    """
    local = tensor.ds_tensor
    shape = tuple(map(int, tensor.ds_shape))
    size, total = int(local.numel()), int(tensor.ds_numel)
    torch = torch_module()
    assert torch is not None
    group = getattr(tensor, "ds_process_group", None)
    start = min(torch.distributed.get_rank(group) * size, total)
    if torch.distributed.get_world_size(group) == 1:
        return Part(local.view(-1)[:total].view(shape), shape, (0,) * len(shape), False, ZERO3)
    return Part(local.view(-1)[: min(size, total - start)], shape, (start,), False, ZERO3)
