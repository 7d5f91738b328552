"""Samples of a result's elements, and the difference between two samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Elements taken from the beginning, the middle and the end of each tensor.
STRETCH = 40
Sample = dict[str, np.ndarray]


def compared_index(targets: Sequence[Any]) -> int:
    """Returns the index of the target to compare: one in the middle, since the first and the last were tracked."""
    return len(targets) // 2


def sample_indices(n: int) -> np.ndarray:
    """Returns the indices to compare in a tensor of `n` elements."""
    begins = (0, max(0, n // 2 - STRETCH // 2), max(0, n - STRETCH))
    return np.unique(np.concatenate([np.arange(at, min(n, at + STRETCH)) for at in begins]))


def sample(tensors: dict[str, Any]) -> Sample:
    """Samples every tensor of a state dict, in f64."""
    flat = {name: tensor.detach().flatten() for name, tensor in tensors.items()}
    return {name: tensor[sample_indices(tensor.numel())].double().numpy() for name, tensor in flat.items()}


def save(path: str | Path, taken: Sample) -> None:
    Path(path).write_text(json.dumps({name: values.tolist() for name, values in taken.items()}))


def load(path: str | Path) -> Sample:
    return {name: np.array(values) for name, values in json.loads(Path(path).read_text()).items()}


def sample_file(path: Path) -> Sample:
    """Samples a safetensors file."""
    # Imported here: a process that only reads samples need not wait for PyTorch.
    from safetensors.torch import load_file

    return sample(load_file(path))


def difference(one: Sample, other: Sample) -> float:
    """Returns the largest difference, relative to the RMS of `other`; infinite if tensors are missing or hold NaN."""
    if one.keys() != other.keys():
        return float("inf")
    differences = np.concatenate([np.abs(one[name] - other[name]) for name in other])
    rms = float(np.sqrt(np.mean(np.square(np.concatenate(list(other.values()))))))
    largest = float(differences.max()) / rms
    return largest if largest == largest else float("inf")


def reference(run: Path, weights: list[tuple[int, int, float]]) -> Sample:
    """Returns a sample of the weighted sum of snapshots, added in f64."""
    total: Sample = {}
    for index, step, weight in weights:
        for name, values in sample_file(run / f"{index}.{step}.safetensors").items():
            total[name] = total.get(name, 0.0) + weight * values
    return total
