"""Fresh tensors for what a synthesis gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _native
from ._dtypes import DTYPES
from ._lend import HOST

_NAMES = {stored: name for name, stored in DTYPES.items()}

Specs = list[tuple[str, str, list[int]]]
"""Name, dtype and shape of each tensor, as the native part tells them."""


class Fresh:
    """Uninitialised tensors in host memory for several targets, of PyTorch or of numpy.

    Args:
        specs: the tensors of each target.
        targets: how many targets there are.
        dtype: the dtype of averaged tensors, as safetensors files name it; each tensor's own where it is None.
        of_torch: tensors of PyTorch, otherwise arrays of numpy.
    """

    def __init__(self, specs: Specs, targets: int, dtype: str | None, of_torch: bool, averaged: Sequence[str]):
        wanted = set(averaged)
        self.specs = [(name, dtype if dtype and name in wanted else own, shape) for name, own, shape in specs]
        make = _torch_tensor if of_torch else _numpy_array
        self.targets = [{name: make(name, own, shape) for name, own, shape in self.specs} for _ in range(targets)]
        self.layout = _native.Layout([(name, own, shape, HOST) for name, own, shape in self.specs])

    def addresses(self) -> list[list[int]]:
        """Where the tensors of each target lie."""
        return [[address(tensor) for tensor in target.values()] for target in self.targets]


def address(tensor: Any) -> int:
    """Where a tensor or an array lies."""
    return tensor.ctypes.data if isinstance(tensor, np.ndarray) else tensor.data_ptr()


def _torch_tensor(name: str, dtype: str, shape: list[int]) -> Any:
    import torch

    own = getattr(torch, _NAMES.get(dtype, ""), None)
    if own is None:
        raise ValueError(f"tensor `{name}`: PyTorch has no dtype {dtype}")
    # Wherever fresh tensors go by default: the native part writes these.
    return torch.empty(shape, dtype=own, device="cpu")


def _numpy_array(name: str, dtype: str, shape: list[int]) -> Any:
    try:
        return np.empty(shape, dtype=np.dtype(_NAMES.get(dtype, dtype)))
    except TypeError:
        raise ValueError(
            f"tensor `{name}`: numpy has no dtype {dtype}: ask for another with `dtype`, or install ml_dtypes and import it"
        ) from None
