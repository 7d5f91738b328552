"""Tensors of PyTorch, NumPy and others, lent to the native part by address.

A contiguous tensor in memory that the native part can reach is lent in place: in host memory, and on CUDA devices if
the build has CUDA. Any other is lent as a contiguous copy, for which memory is kept: `channels_last` weights, for
example.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from . import _native
from ._accuracy import external_stacklevel
from ._dtypes import PAIRS, dtype_text, lent_dtype_name

HOST = -1
"""Stands for host memory in the place of a CUDA device's number."""


def torch_module() -> Any | None:
    """Returns PyTorch if the program has imported it."""
    return sys.modules.get("torch")


@cache
def cuda_usable() -> bool:
    """Returns True if the native part can work on CUDA devices."""
    return _native.CUDA and _native.cuda_devices()[0] > 0


@cache
def warn_of_copies() -> None:
    """Warns once in a process that tensors on a device are copied one by one, with the reason and the remedy."""
    reason = _native.cuda_devices()[1] or ""
    if not _native.CUDA:
        reason += ": install posthoc_ema again with nvcc on the PATH and POSTHOC_EMA_CUDA=1"
    warnings.warn(
        f"posthoc_ema cannot use its CUDA kernels, so each update copies the tensors to the host one by one while the "
        f"training waits: {reason}",
        RuntimeWarning,
        stacklevel=external_stacklevel(),
    )


def is_torch(tensor: Any) -> bool:
    """Returns True if an object is a tensor of PyTorch."""
    torch = torch_module()
    return torch is not None and isinstance(tensor, torch.Tensor)


def address(tensor: Any) -> int:
    """Returns the address of a tensor's or an array's first element."""
    return tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()


class TensorFacts(NamedTuple):
    """Properties of a tensor that decide how its memory is read."""

    dtype: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: Any


def as_array(name: str, tensor: Any) -> Any:
    """Returns a tensor of PyTorch or an array of NumPy that shares a tensor's elements.

    Raises:
        TypeError: If the object is not a tensor.
        ValueError: If its elements cannot be shared.
    """
    if is_torch(tensor) or isinstance(tensor, np.ndarray):
        return tensor
    if hasattr(tensor, "__dlpack__"):
        torch = torch_module()
        try:
            return torch.from_dlpack(tensor) if torch is not None else np.from_dlpack(tensor)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"tensor `{name}`: its elements cannot be shared by DLPack: {error}") from error
    raise TypeError(
        f"tensor `{name}`: {type(tensor).__name__} is not a tensor: pass one of PyTorch, an array of NumPy, or an "
        f"object with DLPack"
    )


class Part(NamedTuple):
    """Rectangle of a tensor that this process holds, or range of its flattened elements."""

    local: Any
    """Tensor of the elements."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    """First index along each dimension. One number for a tensor of several dimensions is that of a range."""
    is_replica: bool
    """True if another process stores the same elements."""
    kind: str
    """Layout in words, for messages."""

    @property
    def is_range(self) -> bool:
        """True for a range of the flattened elements."""
        return len(self.offset) != len(self.shape)


class Lender:
    """Named tensors that are lent again and again.

    Args:
        named: Pairs of a unique name and a tensor of PyTorch, of NumPy, or with DLPack.
        buffers: Names of those that are not trained.
        stored_complex: Names of those that the run stores as complex numbers. Other complex tensors are lent as pairs
            of reals along a last dimension of size 2, except for complex64 buffers, which are copied only.
        parts: Parts of those of which other processes hold the rest, by name.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Any]],
        buffers: frozenset[str] = frozenset(),
        stored_complex: frozenset[str] = frozenset(),
        parts: Mapping[str, Part] = MappingProxyType({}),
    ):
        self.names = [name for name, _ in named]
        self.originals = [tensor for _, tensor in named]
        self.parts = parts
        """Parts of the tensors of which other processes hold the rest, by name."""
        self.tensors = [parts[name].local if name in parts else as_array(name, tensor) for name, tensor in named]
        self.owners = [own if name in parts else lent for (name, own), lent in zip(named, self.tensors)]
        """Tensors that an optimizer may hold; those of parts are made of `tensors`."""
        self._torch = [is_torch(tensor) for tensor in self.tensors]
        if (
            any(of_torch and tensor.is_cuda for of_torch, tensor in zip(self._torch, self.tensors))
            and not cuda_usable()
        ):
            warn_of_copies()
        self._facts = [self._facts_of(i) for i in range(len(self.tensors))]
        native = buffers | stored_complex
        dtypes = [lent_dtype_name(name, facts.dtype, name in native) for name, facts in zip(self.names, self._facts)]
        self._pairs = {i for i, dtype in enumerate(dtypes) if PAIRS.get(dtype_text(self._facts[i].dtype)) == dtype}
        # Memory of the copies. On a GPU, the table of tensors is not uploaded again if they stay in place.
        self._buffers: dict[int, Any] = {}
        self._indirect = [i for i in range(len(self.tensors)) if not self._is_direct(i)]
        devices = [self._device_number(i) for i in range(len(self.tensors))]
        self._devices = sorted(set(devices) - {HOST})
        """Numbers of the CUDA devices of the tensors."""
        self.described = [
            (name, dtype, [*facts.shape, 2] if i in self._pairs else list(facts.shape), device)
            for i, (name, dtype, facts, device) in enumerate(zip(self.names, dtypes, self._facts, devices))
        ]
        """Name, dtype, shape and device of each tensor, as it is lent."""
        self.layout = _native.Layout(self.described, buffers, self._places())
        self.buffers = {i for i, name in enumerate(self.names) if name in buffers}
        """Indices of the tensors that are not trained."""
        indirect = set(self._indirect)
        self.lent_on_devices = [
            i
            for i, device in enumerate(devices)
            if device != HOST and i not in indirect and not self.tensors[i].is_inference()
        ]
        """Indices of the tensors on CUDA devices that are lent in place."""
        # Lists for the fast path of `is_current`.
        self._all_torch = all(self._torch)
        if self._all_torch:
            self._kind = torch_module().Tensor  # type: ignore[union-attr]
            self._dtypes = [facts.dtype for facts in self._facts]
            self._numels = [tensor.numel() for tensor in self.tensors]
            self._direct = [tensor for i, tensor in enumerate(self.tensors) if i not in indirect]
            self._addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.check_storages()

    def all_tensors(self, names: Container[str] | None = None) -> list[Any]:
        """Returns the tensors and those that are made of them, by default of all names."""
        chosen = [i for i, name in enumerate(self.names) if names is None or name in names]
        owners = [self.owners[i] for i in chosen if self.owners[i] is not self.tensors[i]]
        return [*(self.tensors[i] for i in chosen), *{id(owner): owner for owner in owners}.values()]

    def _places(self) -> dict[str, tuple[list[int], list[int], bool]]:
        """Returns global shape and offset of each part as it is lent, and if another process stores it."""
        last = {self.names[i]: ([2], [0]) for i in self._pairs}
        if of_pairs := [name for name in last if name in self.parts and self.parts[name].is_range]:
            raise ValueError(
                f"tensor `{of_pairs[0]}`: it is complex, in a {self.parts[of_pairs[0]].kind}: leave it out"
            )
        return {
            name: ([*part.shape, *shape], [*part.offset, *offset], part.is_replica)
            for name, part in self.parts.items()
            for shape, offset in [last.get(name, ([], []))]
        }

    def check_storages(self) -> None:
        """Refuses tensors that reach beyond their storage, which was resized."""
        for name, tensor, of_torch in zip(self.names, self.tensors, self._torch):
            if not of_torch or tensor.numel() == 0:
                continue
            last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
            if (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError(
                    f"tensor `{name}`: it reaches beyond its storage, which has been made smaller: "
                    f"call this while its elements are there"
                )

    def _facts_of(self, i: int) -> TensorFacts:
        tensor = self.tensors[i]
        if self._torch[i]:
            return TensorFacts(tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        return TensorFacts(tensor.dtype, tensor.shape, tensor.strides, None)

    def _device_number(self, i: int) -> int:
        tensor = self.tensors[i]
        return tensor.device.index if self._torch[i] and tensor.is_cuda and cuda_usable() else HOST

    def devices(self) -> list[int]:
        """Returns the CUDA device on which each tensor is lent, or `HOST`."""
        return [self._device_number(i) for i in range(len(self.tensors))]

    def _is_direct(self, i: int) -> bool:
        """Returns True if a tensor can be lent in place, without a look at its elements."""
        tensor = self.tensors[i]
        if i in self._pairs:
            return False
        if not self._torch[i]:
            return bool(tensor.flags.c_contiguous) and tensor.dtype.isnative
        return self._is_plain(tensor)

    @staticmethod
    def _is_plain(tensor: Any) -> bool:
        """Returns True if the elements of a tensor of PyTorch are in order in memory that the native part reaches."""
        reachable = tensor.device.type == "cpu" or (tensor.is_cuda and cuda_usable())
        return bool(reachable and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg())

    def is_current(self) -> bool:
        """Returns True if the tensors can still be lent as they were described.

        Costs some tenths of a microsecond a tensor: of one that has not moved, only the properties that decide which
        bytes are read, and in which order, are compared. Another shape of the same elements is found by a later check.
        """
        if not self._all_torch:
            return all(self._facts_of(i) == facts for i, facts in enumerate(self._facts))
        tensors = self.tensors
        kind = self._kind
        addresses = list(map(kind.data_ptr, tensors))
        if addresses != self._addresses:
            if any(self._facts_of(i) != facts for i, facts in enumerate(self._facts)):
                return False
            self.check_storages()
            self._addresses = addresses
        return (
            all(map(operator.is_, [tensor.dtype for tensor in tensors], self._dtypes))
            and list(map(kind.numel, tensors)) == self._numels
            and all(map(kind.is_contiguous, self._direct))
            and all(self._facts_of(i) == self._facts[i] for i in self._indirect)
        )

    @property
    def streams(self) -> dict[int, int]:
        """`CUstream` on which PyTorch works at the moment with the tensors of each device, by its number."""
        torch = torch_module()
        if not self._devices or torch is None:
            return {}
        return {device: int(torch.cuda.current_stream(device).cuda_stream) for device in self._devices}

    def _contiguous_copy(self, i: int) -> Any:
        """Returns a tensor's elements in contiguous memory that the native part can reach: a copy, or its own."""
        tensor = self.tensors[i]
        if not self._torch[i]:
            copy = np.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("="))
            return copy.view(copy.real.dtype) if i in self._pairs else copy
        torch = torch_module()
        assert torch is not None
        copy = tensor.detach()
        if not self._is_plain(tensor):
            buffer = self._buffers.get(i)
            if buffer is None:
                buffer = self._buffers[i] = self._new_buffer(tensor)
            copy = buffer.copy_(copy)
        return torch.view_as_real(copy) if i in self._pairs else copy

    @staticmethod
    def _new_buffer(tensor: Any) -> Any:
        """Returns memory for the elements of a tensor, where the native part reaches it."""
        torch = torch_module()
        assert torch is not None
        device = tensor.device if tensor.is_cuda and cuda_usable() else "cpu"
        with torch.inference_mode(False):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    def _copy_back(self, i: int, copy: Any) -> None:
        """Writes the elements of a contiguous copy to its tensor."""
        tensor = self.tensors[i]
        if not self._torch[i]:
            np.copyto(tensor, copy.view(tensor.dtype.newbyteorder("=")).reshape(tensor.shape))
            return
        torch = torch_module()
        assert torch is not None
        # Through `data`: autograd must not record the copy as an operation of the model.
        tensor.data.copy_(torch.view_as_complex(copy) if i in self._pairs else copy)

    @property
    def pairs(self) -> list[str]:
        """Names of the complex tensors that are lent as pairs of reals."""
        return [self.names[i] for i in sorted(self._pairs)]

    @contextmanager
    def reading(self) -> Iterator[tuple[list[int], dict[int, int]]]:
        """Lends the tensors to be read: yields their addresses and the streams."""
        if not self._indirect and self._all_torch:
            yield list(map(self._kind.data_ptr, self.tensors)), self.streams
            return
        # The variable keeps the copies alive until the block ends.
        copies = self._copies()
        yield self._addresses_with(copies), self.streams
        del copies

    @contextmanager
    def writing(self) -> Iterator[tuple[list[int], dict[int, int]]]:
        """Lends the tensors to be read and written: yields their addresses and the streams."""
        self._check_writable()
        copies = self._copies()
        yield self._addresses_with(copies), self.streams
        for i, copy in copies.items():
            self._copy_back(i, copy)

    def _copies(self) -> dict[int, Any]:
        """Copies the tensors that cannot be lent in place; names that share their elements share the copy."""
        made: dict[Any, Any] = {}
        copies = {}
        for i in self._indirect:
            place = (self._torch[i], address(self.tensors[i]), self._facts[i])
            if place not in made:
                made[place] = self._contiguous_copy(i)
            copies[i] = made[place]
        return copies

    def _addresses_with(self, copies: dict[int, Any]) -> list[int]:
        """Returns the addresses of all tensors, or of their copies."""
        return [address(copies.get(i, tensor)) for i, tensor in enumerate(self.tensors)]

    def _check_writable(self) -> None:
        """Refuses tensors that cannot be written, before anything is written."""
        for name, own, tensor, of_torch in zip(self.names, self.originals, self.tensors, self._torch):
            if own is not tensor and name not in self.parts:
                # DLPack does not say if the owner allows it.
                reason = "it came by DLPack, which is only read: pass a tensor of PyTorch or an array of NumPy"
            elif not of_torch and not tensor.flags.writeable:
                reason = "the array is read-only: pass a copy"
            elif of_torch and any(step == 0 and n > 1 for n, step in zip(tensor.shape, tensor.stride())):
                reason = "its elements share memory (it was expanded): name it in `leave_out`, or clone it"
            else:
                continue
            raise ValueError(f"tensor `{name}`: {reason}")
