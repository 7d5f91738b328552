"""New tensors that receive the averages of a synthesis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from . import _native
from ._dtypes import DTYPES
from ._lend import HOST, address, is_torch

_NAMES = {stored: name for name, stored in DTYPES.items()}

TensorSpecs = list[tuple[str, str, list[int]]]
"""Name, dtype and shape of each tensor, as the native part describes them."""


def complex_names(specs: TensorSpecs) -> frozenset[str]:
    """Returns the names of the tensors that a run stores as complex numbers, not as pairs of reals."""
    return frozenset(name for name, dtype, _ in specs if dtype == DTYPES["complex64"])


def join_pairs(state_dict: dict[str, Any], names: Iterable[str]) -> None:
    """Turns pairs of reals along the last dimension into the complex numbers that the model has."""
    for name in state_dict.keys() & set(names):
        pairs = state_dict[name]
        if is_torch(pairs):
            import torch

            # PyTorch lacks complex numbers of bfloat16.
            pairs = pairs.float() if pairs.dtype == torch.bfloat16 else pairs
            state_dict[name] = torch.view_as_complex(pairs)
        else:
            state_dict[name] = pairs.view(np.result_type(pairs.dtype, np.complex64))[..., 0]


class OutputBuffers:
    """Uninitialised tensors in host memory for several targets.

    Args:
        specs: Tensors of each target.
        count: Number of targets.
        dtype: Safetensors name of the dtype of averaged tensors; None for that of each spec.
        of_torch: Allocate tensors of PyTorch if true, arrays of NumPy if not.
        averaged: Names of the averaged tensors.
    """

    def __init__(self, specs: TensorSpecs, count: int, dtype: str | None, of_torch: bool, averaged: Sequence[str]):
        converted = set(averaged) if dtype else set()
        self._specs = [(name, dtype if dtype and name in converted else own, shape) for name, own, shape in specs]
        allocate = _torch_tensor if of_torch else _numpy_array
        self.targets = [{spec[0]: allocate(*spec) for spec in self._specs} for _ in range(count)]
        """A state dict for each target."""
        self.layout = _native.Layout([(name, own, shape, HOST) for name, own, shape in self._specs])

    def addresses(self) -> list[list[int]]:
        """Returns the addresses of each target's tensors."""
        return [[address(tensor) for tensor in target.values()] for target in self.targets]


def _torch_tensor(name: str, dtype: str, shape: list[int]) -> Any:
    import torch

    own = getattr(torch, _NAMES.get(dtype, ""), None)
    if own is None:
        raise ValueError(f"tensor `{name}`: PyTorch has no dtype {dtype}: convert it with the option `dtype`")
    # The native part writes to these addresses, so the default device of the program does not count.
    return torch.empty(shape, dtype=own, device="cpu")


def _numpy_array(name: str, dtype: str, shape: list[int]) -> Any:
    try:
        return np.empty(shape, dtype=np.dtype(_NAMES.get(dtype, dtype)))
    except TypeError:
        raise ValueError(
            f"tensor `{name}`: NumPy has no dtype {dtype}: convert it with the option `dtype`, or import ml_dtypes"
        ) from None
