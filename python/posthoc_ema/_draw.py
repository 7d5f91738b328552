"""Pictures of errors and scores, drawn by the native part as the program draws them.

No other module imports PIL. This one is imported by the functions that draw, so that the package itself does not.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image

from . import _native

_DOTS_PER_INCH = 150


def draw_errors(
    lengths: Sequence[float],
    errors: Sequence[float],
    tracked: Sequence[float],
    title: str,
    figsize: tuple[float, float],
) -> Image.Image:
    """Draws relative errors over sigma_rel, on a logarithmic scale.

    Args:
        lengths: Lengths of the averages, rising.
        errors: Relative error of each, at least 0.
        tracked: Tracked lengths, each marked by a line with its name.
        title: Title of the picture.
        figsize: Width and height in inches.

    Returns:
        An RGB image.
    """
    names = [(length, f"{length:g}") for length in tracked]
    return _image(_native.draw_errors(list(zip(lengths, errors)), names, title, _size(figsize)))


Points = Sequence[tuple[float, float | None, bool, bool]]
"""Length and score of each trial, None for a failure; True for a refinement; True if as good as the best."""


def draw_scores(
    curves: Sequence[tuple[Points, int | None, str, str, float | None]],
    title: str,
    figsize: tuple[float, float],
) -> Image.Image:
    """Draws the scores of a sweep over the length, a panel for each curve.

    Args:
        curves: Points, index of the best one, names of the scores and of the lengths, and the standard error of the
            scores if there are repeats.
        title: Title of the picture.
        figsize: Width and height in inches.

    Returns:
        An RGB image.
    """
    return _image(_native.draw_scores(curves, title, _size(figsize)))


def _size(figsize: tuple[float, float]) -> tuple[int, int]:
    """Returns width and height in pixels.

    Raises:
        ValueError: If one is not finite or not above 0.
    """
    width, height = figsize
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(f"figsize = {figsize}: width and height must be finite and above 0")
    return round(_DOTS_PER_INCH * width), round(_DOTS_PER_INCH * height)


def _image(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png)).convert("RGB")
