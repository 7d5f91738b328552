"""A sample of an answer's elements, and how far two answers are apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Elements that are compared of each tensor: from its beginning, its middle and its end.
STRETCH = 40
Sample = dict[str, np.ndarray]


def looked_at(targets: Sequence[Any]) -> int:
    """Which of several targets is compared: one in the middle, as the first and the last are what was tracked."""
    return len(targets) // 2


def places(n: int) -> np.ndarray:
    """Which elements of a tensor of `n` are compared."""
    begins = (0, max(0, n // 2 - STRETCH // 2), max(0, n - STRETCH))
    return np.unique(np.concatenate([np.arange(at, min(n, at + STRETCH)) for at in begins]))


def sample(tensors: dict[str, Any]) -> Sample:
    """Elements of every tensor of a state dict, in f64."""
    flat = {name: tensor.detach().flatten() for name, tensor in tensors.items()}
    return {name: tensor[places(tensor.numel())].double().numpy() for name, tensor in flat.items()}


def save(path: str | Path, taken: Sample) -> None:
    Path(path).write_text(json.dumps({name: values.tolist() for name, values in taken.items()}))


def load(path: str | Path) -> Sample:
    return {name: np.array(values) for name, values in json.loads(Path(path).read_text()).items()}


def sample_file(path: Path) -> Sample:
    """Of a safetensors file."""
    # Here, because the process that only reads samples need not wait for PyTorch.
    from safetensors.torch import load_file

    return sample(load_file(path))


def apart(one: Sample, other: Sample) -> float:
    """The largest difference, relative to the RMS of the other; infinite where tensors are missing or are no numbers."""
    if one.keys() != other.keys():
        return float("inf")
    differences = np.concatenate([np.abs(one[name] - other[name]) for name in other])
    rms = float(np.sqrt(np.mean(np.square(np.concatenate(list(other.values()))))))
    largest = float(differences.max()) / rms
    return largest if largest == largest else float("inf")


def reference(run: Path, weights: list[tuple[int, int, float]]) -> Sample:
    """Snapshots weighted and added up in f64, one after the other."""
    total: Sample = {}
    for index, step, weight in weights:
        for name, values in sample_file(run / f"{index}.{step}.safetensors").items():
            total[name] = total.get(name, 0.0) + weight * values
    return total
