"""State that a model has besides the elements of a run's tensors, taken before a block and given back after it."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ._lend import is_torch, torch_module
from ._model import is_wrapper_subclass
from ._parts import is_dtensor

# Bytes of a tensor that are compared before and after a block.
_SAMPLED = 4096

Problems = list[str]
"""Descriptions of what could not be restored."""


class ModuleState:
    """State of a module: parts, classes, flags, places of tensors, gradients, and tensors that the run lacks.

    Args:
        module: Module to restore later.
        written: Tensors whose elements are restored by others.
    """

    def __init__(self, module: Any, written: Iterable[Any]):
        in_run = frozenset(map(id, written))
        parts = list(module.modules())
        self._flags = [(part, part.training, type(part)) for part in parts]
        self._properties = [(type(part), _parametrized(part)) for part in parts if "parametrizations" in part._modules]
        self._derived = [(part, _derived_tensors(part)) for part in parts]
        self._hooks = [(part, dict(part._forward_pre_hooks), _structure(part)) for part in parts]
        self._flat_weights = [(part, list(part._flat_weights)) for part in parts if "_flat_weights" in part.__dict__]
        dictionaries = [d for part in parts for d in (part._parameters, part._buffers, part._modules)]
        self._contents = [(dictionary, dict(dictionary)) for dictionary in dictionaries]
        own = {id(t): t for d, _ in self._contents for t in d.values() if is_torch(t)}
        named = {id(t): n for n, t in [*module.named_buffers(), *module.named_parameters()]}
        buffers = frozenset(id(t) for part in parts for t in part._buffers.values())
        self._tensors = TensorStates(own.values())
        self._others = [
            _OtherTensor(named.get(i, "?"), tensor, i in buffers) for i, tensor in own.items() if i not in in_run
        ]
        self._cached = _ParametrizationCache(parts)

    def begin(self) -> None:
        """Takes the gradients away, so that a backward pass in the block does not add to them."""
        self._tensors.begin()
        self._cached.forget()

    def restore(self, problems: Problems) -> None:
        """Undoes `to`, `half`, `eval`, `train`, replaced parts and similar changes."""
        for other in self._others:
            attempt(problems, f"tensor `{other.name}`", other.look)
        for kind, properties in self._properties:
            for name, value in properties.items():
                setattr(kind, name, value)
        for part, training, kind in self._flags:
            if type(part) is not kind:
                attempt(problems, f"the class of {kind.__name__}", setattr, part, "__class__", kind)
            if part.training != training:
                part.training = training
        for part, hooks, structure in self._hooks:
            # Pruning and old reparametrizations replace tensors, and compute them in a hook.
            if _structure(part) != structure:
                restore_contents([(part._forward_pre_hooks, hooks)])
        restore_contents(self._contents)
        for part, tensors in self._derived:
            # A plain attribute of the name of a tensor would hide it.
            hidden = [n for n, v in part.__dict__.items() if is_torch(v) and _is_registered(part, n)]
            for name in hidden:
                del part.__dict__[name]
            part.__dict__.update(tensors)
        for part, weights in self._flat_weights:
            part._flat_weights = weights
        self._tensors.restore(problems)
        for other in self._others:
            attempt(problems, f"tensor `{other.name}`", other.restore)
        self._cached.restore()


def restore_contents(dictionaries: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Gives dictionaries the contents and the order that they had."""
    for dictionary, contents in dictionaries:
        same = list(dictionary.keys()) == list(contents)
        if not (same and all(map(operator.is_, dictionary.values(), contents.values()))):
            dictionary.clear()
            dictionary.update(contents)


def attempt(problems: Problems, what: str, act: Callable[..., object], *arguments: Any) -> None:
    """Calls a function; an error becomes a problem, so that everything else is restored all the same."""
    try:
        act(*arguments)
    except Exception as error:
        problems.append(f"{what}: {error}")


def _is_registered(part: Any, name: str) -> bool:
    return name in part._parameters or name in part._buffers


def _parametrized(part: Any) -> dict[str, Any]:
    """Returns the properties of a part's own class that compute its parametrized tensors."""
    return {name: value for name, value in vars(type(part)).items() if name in part._modules["parametrizations"]}


def _structure(part: Any) -> list[list[str]]:
    """Returns the names of a part's own tensors."""
    return [list(part._parameters.keys()), list(part._buffers.keys())]


def _derived_tensors(part: Any) -> dict[str, Any]:
    """Returns the plain attributes that a hook computes from parameters, such as those of an old weight norm."""
    if not part._forward_pre_hooks:
        return {}
    return {name: value for name, value in part.__dict__.items() if is_torch(value)}


class TensorStates:
    """Places, flags and gradients of tensors, without their elements."""

    def __init__(self, tensors: Iterable[Any]):
        torch = torch_module()
        assert torch is not None
        # `data` is a second handle that keeps the elements in place if the block moves the model.
        placed = [tensor for tensor in tensors if tensor.layout is torch.strided]
        # A sharded tensor has no place of its own, but the tensor that it is made of has.
        self._locals = [(tensor, tensor._local_tensor) for tensor in placed if is_dtensor(tensor)]
        leaves = [tensor for tensor in placed if tensor.is_leaf]
        gradients = [tensor.grad for tensor in leaves]
        self._leaves = [(tensor, tensor.requires_grad, grad) for tensor, grad in zip(leaves, gradients)]
        with_place = [*placed, *(grad for grad in gradients if grad is not None), *(held for _, held in self._locals)]
        self._places = [(t, t.data) for t in with_place if not is_dtensor(t)]
        self._sizes = [_storage_size(data) for _, data in self._places]

    def begin(self) -> None:
        """Takes the gradients away."""
        for tensor, _, grad in self._leaves:
            if grad is not None:
                tensor.grad = None

    def restore(self, problems: Problems) -> None:
        """Gives places, flags and gradients back."""
        if any(tensor._local_tensor is not held for tensor, held in self._locals):
            problems.append(
                "the block moved or converted sharded parameters, which cannot be undone: load them again, or convert "
                "no sharded model in a block"
            )
        for (tensor, data), size in zip(self._places, self._sizes):
            attempt(problems, "a tensor's place", _restore_place, tensor, data, size)
        for tensor, requires_grad, grad in self._leaves:
            if tensor.requires_grad != requires_grad:
                attempt(problems, "a tensor's `requires_grad`", tensor.requires_grad_, requires_grad)
            # A gradient computed in the block does not belong to the training.
            if tensor.grad is not grad:
                attempt(problems, "a tensor's gradient", setattr, tensor, "grad", grad)


def _storage_size(data: Any) -> int | None:
    """Returns the size of a tensor's storage in bytes; None for a tensor without one."""
    torch = torch_module()
    assert torch is not None
    if is_wrapper_subclass(data) or data.layout is not torch.strided:
        return None
    return int(data.untyped_storage().nbytes())


def _restore_place(tensor: Any, data: Any, size: int | None) -> None:
    """Points a tensor to its old elements again, unless it still does, and makes room for them."""
    if size is None:
        # A tensor made of others, which has neither a storage nor an address.
        tensor.data = data
        return
    if data.untyped_storage().nbytes() < size:
        data.untyped_storage().resize_(size)
    same = tensor.device == data.device and tensor.dtype == data.dtype and tensor.stride() == data.stride()
    if not same or tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
        tensor.data = data


class _OtherTensor:
    """Tensor that the run lacks: a buffer is copied, and of a parameter a change is found."""

    def __init__(self, name: str, tensor: Any, is_buffer: bool):
        self.name = name
        self._tensor = tensor
        self._data = tensor.data
        self._version = None if tensor.is_inference() else tensor._version
        has_elements = not tensor.is_meta and tensor.numel() > 0 and _storage_size(tensor) not in (0, None)
        self._saved = tensor.detach().to("cpu", copy=True) if is_buffer and has_elements else None
        self._sample = _sample(self._data) if has_elements and not is_buffer else None
        self._is_changed: bool | None = None

    def look(self) -> None:
        """Finds out if the elements have changed, before the tensor gets its place back."""
        if self._is_changed is None:
            tensor, data = self._tensor, self._data
            steps = 0 if self._version is None or tensor.is_inference() else tensor._version - self._version
            moved = tensor.dtype != data.dtype or tensor.device != data.device or _address(tensor) != _address(data)
            # A tensor that is moved away counts one change and leaves its elements as they are.
            certain = steps > 0 and not moved
            self._is_changed = certain or (self._sample is not None and not self._sample.equal(_sample(data)))

    def restore(self) -> None:
        """Gives a buffer its elements back.

        Raises:
            RuntimeError: If it is a parameter that the block has changed.
        """
        torch = torch_module()
        assert torch is not None
        if self._saved is not None:
            with torch.inference_mode(self._tensor.is_inference()):
                self._tensor.data.copy_(self._saved)
        elif self._is_changed:
            raise RuntimeError(
                "the block changed its elements, of which no copy was made since it is not of the run: load them "
                "again, or change no such parameter in a block"
            )


def _address(tensor: Any) -> int:
    return 0 if tensor.is_meta or _storage_size(tensor) is None else int(tensor.data_ptr())


def _sample(data: Any) -> Any:
    """Returns some bytes of a strided tensor's elements, in host memory."""
    torch = torch_module()
    assert torch is not None
    reach = 1 + sum((size - 1) * step for size, step in zip(data.shape, data.stride()))
    start, end = (data.element_size() * at for at in (data.storage_offset(), data.storage_offset() + reach))
    stored = torch.empty(0, dtype=torch.uint8, device=data.device).set_(data.untyped_storage())[start:end]
    # An odd step meets every byte of the elements.
    return stored[:: len(stored) // _SAMPLED | 1].cpu().clone()


class _ParametrizationCache:
    """Entries of `torch.nn.utils.parametrize.cached` for a module, which are of its own weights."""

    def __init__(self, parts: Iterable[Any]):
        self._parametrize = sys.modules.get("torch.nn.utils.parametrize")
        self._parts = frozenset(map(id, parts))
        self._entries = {key: value for key, value in self._cache().items() if key[0] in self._parts}

    def _cache(self) -> dict[Any, Any]:
        return getattr(self._parametrize, "_cache", {})

    def forget(self) -> None:
        """Removes the entries, so that they are computed again."""
        cache = self._cache()
        for key in [key for key in cache if key[0] in self._parts]:
            del cache[key]

    def restore(self) -> None:
        """Gives the entries back if the caching goes on."""
        self.forget()
        if getattr(self._parametrize, "_cache_enabled", 0):
            self._cache().update(self._entries)
