"""Worker of `adapters`: makes low-rank adapters, and averages their products by numpy.

make FOLDER SIZE STEP...    files FOLDER/lora-STEP.safetensors with all pairs of factors
KIND OUT FILE...            the average, again for each request, as KIND in KINDS does it
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import serve

# Pairs of factors, rows and columns of their products, and rank.
SIZES = {"full": (16, 2048, 16), "quick": (2, 24, 3)}
Factors = tuple[np.ndarray, np.ndarray]
# Takes the factors B and A of all files, and returns those of the average.
Average = Callable[[list[np.ndarray], list[np.ndarray]], Factors]


def names(i: int) -> tuple[str, str]:
    return f"layer{i:02}.lora_B.weight", f"layer{i:02}.lora_A.weight"


def make(folder: Path, size: str, steps: list[int]) -> None:
    folder.mkdir(parents=True)
    pairs, extent, rank = SIZES[size]
    for step in steps:
        random = np.random.default_rng(step)
        tensors = {}
        for i in range(pairs):
            for name, shape in zip(names(i), ((extent, rank), (rank, extent))):
                tensors[name] = random.standard_normal(shape, dtype=np.float32)
        save_file(tensors, folder / f"lora-{step}.safetensors")


def by_core(ups: list[np.ndarray], downs: list[np.ndarray]) -> Factors:
    """QR decompositions of the stacked factors, and the singular values of the small core."""
    rank = ups[0].shape[1]
    q, r = np.linalg.qr(np.hstack(ups) / len(ups))
    w, s = np.linalg.qr(np.vstack(downs).T)
    u, values, v = np.linalg.svd(r @ s.T)
    root = np.sqrt(values[:rank])
    return q @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ w.T


def by_whole(ups: list[np.ndarray], downs: list[np.ndarray]) -> Factors:
    """Singular values of the whole average."""
    rank = ups[0].shape[1]
    u, values, v = np.linalg.svd(sum(b @ a for b, a in zip(ups, downs)) / len(ups), full_matrices=False)
    root = np.sqrt(values[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


KINDS: dict[str, tuple[Average, int | None]] = {"core": (by_core, None), "whole": (by_whole, 1)}


def averages(average: Average, files: list[Path], most: int | None = None) -> dict[str, np.ndarray]:
    """Averages the products of all pairs, or of the first ones."""
    loaded = [load_file(path) for path in files]
    result = {}
    for i in range(len(loaded[0]) // 2)[:most]:
        up, down = names(i)
        factors = [[each[name].astype(np.float64) for each in loaded] for name in (up, down)]
        for name, factor in zip((up, down), average(*factors)):
            result[name] = factor.astype(np.float32)
    return result


def main() -> None:
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), sys.argv[3], [int(step) for step in sys.argv[4:]])
        return
    kind, out, *files = sys.argv[1:]
    average, most = KINDS[kind]

    def once() -> None:
        save_file(averages(average, [Path(path) for path in files], most), out)

    serve.serve({"go": lambda: {"seconds": serve.seconds_of(once)[0]}})


if __name__ == "__main__":
    main()
