"""Broadcast of tensors from rank 0 in pieces of bounded size."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ._launch import distributed
from ._lend import HOST, Lender, torch_module
from ._ranks import Call

PIECE = 64 << 20
"""Bytes that are sent at once, and the size of the buffer for them."""


Place = tuple[int, int, int]
"""Address, number of bytes, and CUDA device or -1 of a contiguous tensor."""


class Bytes:
    """Bytes of tensors, one after another; those at one place once."""

    def __init__(self, of: list[Place]):
        distinct = dict.fromkeys(place for place in of if place[1] > 0)
        self._views = [_view(*place) for place in distinct]
        self.total = sum(view.numel() for view in self._views)

    def pieces(self) -> Iterator[list[Any]]:
        """Yields the views that make up each piece, in order."""
        piece: list[Any] = []
        room = PIECE
        for view in self._views:
            start = 0
            while start < view.numel():
                part = view[start : start + room]
                piece.append(part)
                start += part.numel()
                room -= part.numel()
                if room == 0:
                    yield piece
                    piece, room = [], PIECE
        if piece:
            yield piece


def places(lender: Lender, addresses: list[int], names: frozenset[str] | None = None) -> list[Place]:
    """Returns the places of lent tensors, or of those with one of the names."""
    lent = zip(lender.names, addresses, lender.tensors, lender.devices())
    return [(at, int(tensor.nbytes), device) for name, at, tensor, device in lent if names is None or name in names]


def _view(place: int, size: int, device: int) -> Any:
    """Returns a tensor of the bytes at an address."""
    torch = torch_module()
    assert torch is not None
    if device == HOST:
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(place), dtype=torch.uint8)
    return torch.as_tensor(_CudaBytes(place, size), device=f"cuda:{device}")


class _CudaBytes:
    """Memory of a CUDA device, as libraries of arrays describe it to each other."""

    def __init__(self, place: int, size: int):
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (place, False), "version": 3}


class Broadcast:
    """Sends bytes of rank 0 to all ranks, through a buffer that is allocated before anything is sent.

    Args:
        content: Bytes to send on rank 0, and to fill on the others; the same number on all.
        device: Device on which the process group communicates.
    """

    def __init__(self, content: Bytes, device: Any):
        torch = torch_module()
        assert torch is not None
        self._content = content
        self._buffer = torch.empty(min(PIECE, content.total), dtype=torch.uint8, device=device)

    def run(self, call: Call) -> None:
        """Sends all pieces; a rank that fails goes on taking part, so that none waits for it, and raises at the end.

        Raises:
            RuntimeError: If a process has ended, or the process group failed in another way.
        """
        group = distributed()
        assert group is not None
        failure: BaseException | None = None
        with _interrupts_held() as interrupted:
            for piece in self._content.pieces():
                part = self._buffer[: sum(view.numel() for view in piece)]
                if call.rank == 0:
                    failure = failure or self._copied(part, piece, is_sender=True)
                try:
                    group.broadcast(part, src=0)
                except BaseException as error:
                    call.abandon(error)
                    raise
                if call.rank != 0:
                    failure = failure or self._copied(part, piece, is_sender=False)
        if interrupted:
            failure = KeyboardInterrupt()
        call.part(lambda: _unless(failure), is_last=True)

    @staticmethod
    def _copied(buffer: Any, views: list[Any], *, is_sender: bool) -> BaseException | None:
        """Copies views into the buffer or out of it, and returns the error if that fails."""
        start = 0
        try:
            for view in views:
                part = buffer[start : start + view.numel()]
                start += view.numel()
                if is_sender:
                    part.copy_(view)
                else:
                    view.copy_(part)
        except BaseException as error:
            return error
        return None


def transfer_device(is_on_cuda: bool) -> str:
    """Returns the kind of device on which the default process group sends tensors best.

    Args:
        is_on_cuda: The tensors are on a CUDA device.
    """
    group = distributed()
    assert group is not None
    kinds = dict(pair.split(":", 1) for pair in group.get_backend_config().split(",") if ":" in pair)
    if "cpu" in kinds and not (is_on_cuda and kinds.get("cuda") == "nccl"):
        return "cpu"
    return "cuda" if "cuda" in kinds or not kinds else next(iter(kinds))


def device_of(kind: str, own: Any) -> Any:
    """Returns this rank's device of a kind.

    Args:
        kind: Kind of device that rank 0 has chosen.
        own: CUDA device of this rank's tensors, or None.
    """
    torch = torch_module()
    assert torch is not None
    if kind != "cuda":
        return torch.device(kind)
    return torch.device("cuda", torch.cuda.current_device()) if own is None else own


def _unless(failure: BaseException | None) -> tuple[None, None]:
    if failure is not None:
        raise failure
    return None, None


@contextmanager
def _interrupts_held() -> Iterator[list[int]]:
    """Notes Ctrl-C instead of raising KeyboardInterrupt; yields the list of notes. A second Ctrl-C is raised."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield pressed
        return

    def note(number: int, _: Any) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
