"""Tensors of PyTorch, numpy and others, lent to the native part by address.

A tensor is lent where it lies when it is contiguous and the native part can reach it: in host memory, and on CUDA devices
in a build with CUDA. All others go by way of a contiguous copy, made for the call and dropped after it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import _native
from ._dtypes import dtype_name

HOST = -1
"""Instead of the number of a CUDA device."""


def torch_module() -> Any | None:
    """PyTorch, where the program has imported it."""
    return sys.modules.get("torch")


@cache
def cuda_usable() -> bool:
    """Whether the native part can work on CUDA devices."""
    return _native.CUDA and _native.cuda_devices()[0] > 0


def is_torch(tensor: Any) -> bool:
    """Whether it is a tensor of PyTorch."""
    torch = torch_module()
    return torch is not None and isinstance(tensor, torch.Tensor)


class Facts(NamedTuple):
    """What must not change between two calls without anybody noticing."""

    dtype: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: Any


def as_array(name: str, tensor: Any) -> Any:
    """A tensor of PyTorch or an array of numpy that shares its elements."""
    if is_torch(tensor) or isinstance(tensor, np.ndarray):
        return tensor
    if hasattr(tensor, "__dlpack__"):
        torch = torch_module()
        try:
            return torch.from_dlpack(tensor) if torch is not None else np.from_dlpack(tensor)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"tensor `{name}`: its elements cannot be shared by DLPack: {error}") from error
    raise TypeError(
        f"tensor `{name}`: {type(tensor).__name__} is no tensor: PyTorch's, numpy's and those with DLPack can be lent"
    )


class Lender:
    """Named tensors, ready to be lent again and again.

    Args:
        named: pairs of names and tensors: of PyTorch, of numpy, or with DLPack; names must be unique.
    """

    def __init__(self, named: Sequence[tuple[str, Any]]):
        self.names = [name for name, _ in named]
        self.originals = [tensor for _, tensor in named]
        self.tensors = [as_array(name, tensor) for name, tensor in named]
        self._torch = [is_torch(tensor) for tensor in self.tensors]
        self._facts = [self._facts_of(i) for i in range(len(self.tensors))]
        self._indirect = [i for i in range(len(self.tensors)) if not self._is_direct(i)]
        places = [self._place(i) for i in range(len(self.tensors))]
        self._device = next((place for place in places if place != HOST), None)
        described = [
            (name, dtype_name(name, facts.dtype), list(facts.shape), place)
            for name, facts, place in zip(self.names, self._facts, places)
        ]
        self.layout = _native.Layout(described)
        # The usual case, for which it all must be quick.
        self._all_torch = all(self._torch)
        if self._all_torch:
            self._kind = torch_module().Tensor  # type: ignore[union-attr]
            indirect = set(self._indirect)
            self._dtypes = [facts.dtype for facts in self._facts]
            self._numels = [tensor.numel() for tensor in self.tensors]
            self._direct = [tensor for i, tensor in enumerate(self.tensors) if i not in indirect]
            self._addresses = [tensor.data_ptr() for tensor in self.tensors]

        self._check_storages()

    def _check_storages(self) -> None:
        """Refuses tensors that reach beyond their storage, which somebody has made smaller."""
        for name, tensor, of_torch in zip(self.names, self.tensors, self._torch):
            if not of_torch or tensor.numel() == 0:
                continue
            last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
            if (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(
                    f"tensor `{name}`: it reaches beyond its storage, which has been made smaller: "
                    f"call this while its elements are there"
                )

    def _facts_of(self, i: int) -> Facts:
        tensor = self.tensors[i]
        if self._torch[i]:
            return Facts(tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        return Facts(tensor.dtype, tensor.shape, tensor.strides, None)

    def _place(self, i: int) -> int:
        tensor = self.tensors[i]
        return tensor.device.index if self._torch[i] and tensor.is_cuda and cuda_usable() else HOST

    def _is_direct(self, i: int) -> bool:
        tensor = self.tensors[i]
        if not self._torch[i]:
            return bool(tensor.flags.c_contiguous) and tensor.dtype.isnative
        reachable = tensor.device.type == "cpu" or (tensor.is_cuda and cuda_usable())
        return reachable and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()

    def is_current(self) -> bool:
        """Whether the tensors are still what they were when this was made.

        Of tensors that have not moved it looks at what decides which bytes are read, and in which order; it has some tenths
        of a microsecond for each. Another shape of the same elements is found when it is moved, or loaded.
        """
        if not self._all_torch:
            return all(self._facts_of(i) == facts for i, facts in enumerate(self._facts))
        tensors, kind = self.tensors, self._kind
        addresses = list(map(kind.data_ptr, tensors))
        if addresses != self._addresses:
            if any(self._facts_of(i) != facts for i, facts in enumerate(self._facts)):
                return False
            self._check_storages()
            self._addresses = addresses
        return (
            all(map(operator.is_, [tensor.dtype for tensor in tensors], self._dtypes))
            and list(map(kind.numel, tensors)) == self._numels
            and all(map(kind.is_contiguous, self._direct))
            and all(self._facts_of(i) == self._facts[i] for i in self._indirect)
        )

    @property
    def stream(self) -> int:
        """The `CUstream` on which PyTorch works with the tensors at the moment; 0 where they are in host memory."""
        torch = torch_module()
        if self._device is None or torch is None:
            return 0
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def _address(self, i: int) -> int:
        tensor = self.tensors[i]
        return tensor.data_ptr() if self._torch[i] else tensor.ctypes.data

    def _copy(self, i: int) -> Any:
        """A contiguous copy that the native part can reach."""
        tensor = self.tensors[i]
        if not self._torch[i]:
            return np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("="))
        torch = torch_module()
        device = tensor.device if tensor.is_cuda and cuda_usable() else "cpu"
        assert torch is not None
        return tensor.detach().to(device).resolve_conj().resolve_neg().contiguous()

    @contextmanager
    def reading(self) -> Iterator[tuple[list[int], int]]:
        """Addresses and stream, for as long as the tensors are read."""
        if not self._indirect and self._all_torch:
            yield list(map(self._kind.data_ptr, self.tensors)), self.stream
            return
        # In a variable: the copies must live until the block is left.
        copies = self._copies()
        yield self._with(copies), self.stream
        del copies

    def _copies(self) -> dict[int, Any]:
        """Contiguous copies of what cannot be lent where it lies; names that share their elements share the copy."""
        made: dict[Any, Any] = {}
        copies = {}
        for i in self._indirect:
            place = (self._torch[i], self._address(i), self._facts[i])
            if place not in made:
                made[place] = self._copy(i)
            copies[i] = made[place]
        return copies

    @contextmanager
    def writing(self) -> Iterator[tuple[list[int], int]]:
        """Addresses and stream, for as long as the tensors are written; what they held is there before."""
        self._check_writable()
        copies = self._copies()
        yield self._with(copies), self.stream
        for i, copy in copies.items():
            if self._torch[i]:
                # By way of `data`: autograd must not take it for an operation of the model's.
                self.tensors[i].data.copy_(copy)
            else:
                np.copyto(self.tensors[i], copy)

    def _with(self, copies: dict[int, Any]) -> list[int]:
        addresses = []
        for i in range(len(self.tensors)):
            if i in copies:
                copy = copies[i]
                addresses.append(copy.data_ptr() if self._torch[i] else copy.ctypes.data)
            else:
                addresses.append(self._address(i))
        return addresses

    def _check_writable(self) -> None:
        """Refuses, before anything is written, what cannot be."""
        for name, own, tensor, of_torch in zip(self.names, self.originals, self.tensors, self._torch):
            if own is not tensor:
                # DLPack does not tell whether its owner allows it.
                reason = "it came by DLPack, which is for reading here: pass a tensor of PyTorch or an array of numpy"
            elif not of_torch and not tensor.flags.writeable:
                reason = "the array is read-only: pass a copy"
            elif of_torch and any(step == 0 and n > 1 for n, step in zip(tensor.shape, tensor.stride())):
                reason = "elements share memory (it was expanded): name it in `leave_out`, or give it its own"
            else:
                continue
            raise ValueError(f"tensor `{name}`: {reason}")
