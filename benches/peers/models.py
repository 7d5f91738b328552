"""Names and shapes of the models: a transformer, and many small tensors."""

from __future__ import annotations

import math

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def transformer(width: int, vocabulary: int, layers: int = 12) -> Shapes:
    """Returns the parameters of a transformer; 150 tensors for 12 layers."""
    shapes: Shapes = {"embedding": (vocabulary, width), "positions": (256, width)}
    for layer in range(layers):
        name = f"layer{layer:02}"
        for part, rows, columns in (
            ("attention_in", 3 * width, width),
            ("attention_out", width, width),
            ("mlp_in", 4 * width, width),
            ("mlp_out", width, 4 * width),
        ):
            shapes[f"{name}_{part}_weight"] = (rows, columns)
            shapes[f"{name}_{part}_bias"] = (rows,)
        for part in ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias"):
            shapes[f"{name}_{part}"] = (width,)
    shapes |= {"norm_weight": (width,), "norm_bias": (width,)}
    shapes |= {"head_weight": (vocabulary, width), "head_bias": (vocabulary,)}
    return shapes


def llama(width: int, hidden: int, vocabulary: int, layers: int = 12) -> Shapes:
    """Returns the parameters of transformers' Llama; 111 tensors for 12 layers."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (width, hidden)
        shapes |= {f"{name}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def small_tensors(count: int, elements: int) -> Shapes:
    """Returns `count` tensors of one size."""
    return {f"t{i:05}": (elements,) for i in range(count)}


def parameters(shapes: Shapes) -> int:
    """Counts the elements of all tensors."""
    return sum(map(math.prod, shapes.values()))


# Each model in full, with 50 million parameters, and in a size that takes no time.
MODELS = {
    "150 tensors": {"full": transformer(560, 4352), "quick": transformer(16, 64, layers=1)},
    "2,000 tensors": {"full": small_tensors(2000, 25_000), "quick": small_tensors(20, 500)},
    "Llama": {"full": llama(544, 1456, 7168), "quick": llama(16, 24, 64, layers=1)},
    # Twice as many parameters, for checkpoints of f32.
    "150 tensors, twice": {"full": transformer(800, 6000), "quick": transformer(16, 64, layers=1)},
    # Half as many parameters, for snapshots of 4 bytes an element.
    "150 tensors, half": {"full": transformer(392, 3072), "quick": transformer(16, 64, layers=1)},
}


def gamma_of(sigma_rel: float) -> float:
    """Returns the exponent of the power function with this `sigma_rel` (Karras et al. 2023, algorithm 2)."""
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())
