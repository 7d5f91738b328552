"""Folders that a model's own library writes and loads, with an average in the place of the weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ._model import unwrap


def saver(model: Any) -> Callable[..., Any]:
    """Returns the function that writes a model, without its wrappers, into a folder.

    Args:
        model: Model of transformers, diffusers, PEFT or timm, or another with a method `save_pretrained`.

    Raises:
        TypeError: If no library is known to save it.
    """
    inner = unwrap(model)
    own: Callable[..., Any] | None = getattr(inner, "save_pretrained", None)
    if own is not None:
        return own
    if getattr(inner, "pretrained_cfg", None) is not None:
        from timm.models import save_for_hf

        return partial(save_for_hf, inner, safe_serialization=True)
    raise TypeError(
        f"{type(inner).__name__} has no method `save_pretrained`, and is not a model of timm: write a file by "
        f"`ema.synthesize`, or save the model in a block of `ema.model`"
    )
