"""Pictures of errors and scores, drawn with matplotlib.

No other module names matplotlib or makes images of PIL. This one is imported by the functions that draw, so that the
package itself imports neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

_Points = Sequence[tuple[float, float]]
_Floats = npt.NDArray[np.float64]

# Decades drawn below the largest error. The rounding errors of tracked lengths would stretch the axis to 1e-16.
_DECADES = 3.0
# Largest error that is nothing but rounding.
_LEAST = 1e-12

_INK = "#222222"
_FAINT = "#e1e1e1"
_CURVE = "#005aa0"
_TRACKED = "#be461e"
_DOTS_PER_INCH = 150

_LENGTH_LABELS = {
    "sigma_rel": "length of the average, σ_rel",
    "half_life": "half-life of the average in steps",
    "window": "window of the average in steps",
    "fraction": "window of the average as a share of the training",
}


def draw_errors(
    lengths: _Floats, errors: _Floats, tracked: _Floats, title: str, figsize: tuple[float, float]
) -> Image.Image:
    """Draws relative errors over sigma_rel, on a logarithmic scale.

    Args:
        lengths: Lengths of the averages, shape (n,), rising.
        errors: Their relative errors, shape (n,), finite and at least 0.
        tracked: Tracked lengths, drawn as vertical lines.
        title: Title of the picture.
        figsize: Width and height in inches.

    Returns:
        An RGB image.
    """
    figure, axes, size = _new_figure(figsize)
    top = max(float(errors.max()), _LEAST)
    bottom = top / 10.0**_DECADES
    # Small errors go below the axis, where the line leaves the picture; zero has no place on a logarithmic scale.
    axes.plot(lengths, np.maximum(errors, bottom / 10.0), color=_CURVE, linewidth=2.0, zorder=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top * 2.0)
    if errors.max() < _LEAST:
        note = f"nothing but rounding: all below {_LEAST:g}"
        axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", color=_CURVE, fontsize=size)
    axes.set_title(title, color=_INK, fontsize=size, loc="left")
    axes.set_xlabel("length of the synthesized average, σ_rel", color=_INK, fontsize=size)
    axes.set_ylabel("profile error, ‖synthesized − target‖ / ‖target‖", color=_INK, fontsize=0.9 * size)
    _mark_tracked(axes, tracked, 0.9 * size)
    # Labels at decades only: nobody reads an error off the picture to more than that.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100.0 * error:.3g}%"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _style(axes, 0.9 * size)
    return _rendered(figure)


def draw_scores(
    *,
    asked: _Points,
    refined: _Points,
    best: _Points,
    failed: Sequence[float],
    length_name: str,
    minimize: bool,
    title: str,
    figsize: tuple[float, float],
) -> Image.Image:
    """Draws the scores of a sweep over the length.

    Args:
        asked: Length and score of each target.
        refined: Length and score of each step of the refinement.
        best: Points to mark as the best.
        failed: Lengths whose evaluation failed.
        length_name: Name of the length, as in `Trial.length`.
        minimize: True if small scores are better.
        title: Title of the picture.
        figsize: Width and height in inches.

    Returns:
        An RGB image.
    """
    figure, axes, size = _new_figure(figsize)
    points = sorted([*asked, *refined])
    axes.plot([x for x, _ in points], [y for _, y in points], color=_CURVE, linewidth=1.5, alpha=0.5, zorder=2)
    _dots(axes, sorted(asked), "asked for", color=_CURVE, markersize=0.5 * size)
    _dots(axes, sorted(refined), "refined", color=_CURVE, markersize=0.5 * size, markerfacecolor="white")
    _dots(axes, best, "best", color=_TRACKED, markersize=0.9 * size, markerfacecolor="none", markeredgewidth=2.0)
    # A failure has no score: it is marked on the axis.
    crosses = {"marker": "x", "transform": axes.get_xaxis_transform(), "clip_on": False}
    _dots(axes, [(x, 0.0) for x in failed], "failed", color=_TRACKED, markersize=0.5 * size, **crosses)
    if length_name != "sigma_rel":
        axes.set_xscale("log")
    axes.set_xlabel(_LENGTH_LABELS[length_name], color=_INK, fontsize=size)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=0.9 * size)
    _style(axes, 0.9 * size)
    axes.set_title(title, color=_INK, fontsize=size, loc="left")
    axes.set_ylabel(f"score ({'smaller' if minimize else 'larger'} is better)", color=_INK, fontsize=size)
    return _rendered(figure)


def _new_figure(figsize: tuple[float, float]) -> tuple[Figure, Axes, float]:
    """Returns a figure, its axes, and the size of its text, which scales with the picture."""
    # Without pyplot, whose list of figures belongs to the user.
    figure = Figure(figsize=figsize, dpi=_DOTS_PER_INCH, layout="constrained", facecolor="white")
    return figure, figure.add_subplot(), 15.0 * min(figsize[0] / 10.0, figsize[1] / 6.0)


def _dots(axes: Axes, points: _Points, label: str, **style: Any) -> None:
    if points:
        x, y = zip(*points)
        axes.plot(x, y, label=label, **{"linestyle": "none", "marker": "o", "zorder": 3, **style})


def _mark_tracked(axes: Axes, tracked: _Floats, size: float) -> None:
    """Draws lines at the tracked lengths with one legend above the axes: labels of close lines would collide."""
    for sigma_rel in tracked:
        line = axes.axvline(sigma_rel, color=_TRACKED, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
    if tracked.size:
        lengths = ", ".join(f"{sigma_rel:g}" for sigma_rel in sorted(set(tracked.tolist())))
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
        axes.legend([line], [f"tracked: {lengths}"], frameon=False, labelcolor=_TRACKED, fontsize=size, **place)


def _style(axes: Axes, size: float) -> None:
    """Draws a faint grid, dark text, and axes at the left and the bottom only."""
    axes.tick_params(colors=_INK, labelsize=size)
    axes.tick_params(which="minor", colors=_FAINT)
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    axes.grid(True, color=_FAINT, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)


def _rendered(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
