"""Fresh tensors for what a synthesis gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _native
from ._lend import DTYPES, HOST

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


def stored_name(dtype: Any) -> str | None:
    """A dtype of PyTorch or numpy, or its name, as safetensors files have it.

    Raises:
        ValueError: for one that averages cannot have.
    """
    if dtype is None:
        return None
    text = str(getattr(dtype, "__name__", None) or getattr(dtype, "name", None) or dtype).rpartition(".")[2]
    short = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64"}
    stored = DTYPES.get(short.get(text.lower(), text), text)
    if stored not in ("F32", "F16", "BF16", "F64"):
        raise ValueError(f"dtype {dtype}: averages can be float32, bfloat16, float16 or float64")
    return stored
