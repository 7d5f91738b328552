"""Runs in our format: their metadata, and runs of any size with repeated values."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import models

SIGMA_RELS = (0.05, 0.28)
# Steps of training between two snapshots; every step was an update.
SPACING = 1000
# Elements that are repeated in the files of `write_sized`.
PATTERN = 1 << 20


def mean_time(sigma_rel: float) -> float:
    """Returns the mean of a power function over [0, 1]."""
    gamma = models.gamma_of(sigma_rel)
    return (gamma + 1) / (gamma + 2)


def metadata(sigma_rel: float, step: int, stored_in_less: Sequence[str]) -> dict[str, str]:
    """Returns the metadata of a power function's average at a step, if every step was an update.

    `stored_in_less` are the f32 tensors of the model that are stored in 16 bits.
    """
    return {
        "format": "pt",
        "posthoc_ema": "1",
        "profile": json.dumps({"kind": "power", "gamma": models.gamma_of(sigma_rel)}),
        "step": str(step),
        "history": json.dumps([[1, step, 1]]),
        "dtypes": json.dumps(dict.fromkeys(stored_in_less, "F32")),
    }


def write_sized(folder: Path, shapes: models.Shapes, steps: int) -> int:
    """Writes f16 snapshots of two profiles at `steps` steps, in pieces; returns their bytes."""
    folder.mkdir(parents=True)
    n = models.parameters(shapes)
    random = np.random.default_rng(0)
    base, drift = (scale * random.standard_normal(PATTERN).astype(np.float32) for scale in (0.02, 0.01))
    for k in range(1, steps + 1):
        for index, sigma_rel in enumerate(SIGMA_RELS):
            step = k * SPACING
            piece = (base + k / steps * mean_time(sigma_rel) * drift).astype(np.float16).tobytes()
            with (folder / f"{index}.{step}.safetensors").open("wb") as file:
                file.write(header(shapes, metadata(sigma_rel, step, [])))
                for left in range(2 * n, 0, -len(piece)):
                    file.write(piece[:left])
    return steps * len(SIGMA_RELS) * 2 * n


def header(shapes: models.Shapes, strings: dict[str, str]) -> bytes:
    """Returns the header of a safetensors file of contiguous f16 tensors."""
    described: dict[str, object] = {"__metadata__": strings}
    at = 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        described[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
