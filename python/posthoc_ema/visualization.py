"""How well averages of each length can be synthesized, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._plans import plan
from .utils import as_floats

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from ._sweeping import Swept, Trial

__all__ = [
    "compute_reconstruction_errors",
    "plot_reconstruction_errors",
    "plot_sweep",
    "reconstruction_error",
    "target_points",
]

_Floats = npt.NDArray[np.float64]

DEFAULT_RANGE = (0.05, 0.28)
"""The lengths that the paper looks at, and those of the two averages it tracks."""

# Decades below the largest error that are drawn: tracked lengths have no error but rounding, and would take the axis
# down to 1e-16.
_DECADES = 3.0
# Errors below this are rounding.
_LEAST = 1e-12

_INK = "#222222"
_FAINT = "#e1e1e1"
_CURVE = "#005aa0"
_TRACKED = "#be461e"
_DOTS_PER_INCH = 150


def compute_reconstruction_errors(
    sigma_rels: Sequence[float],
    target_sigma_rel_range: tuple[float, float] | None = None,
    num_target_points: int = 100,
    max_checkpoints: int = 20,
    update_every: int = 10,
    checkpoint_every: int = 1000,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """How far off synthesized averages will be after a training that fills its checkpoints, for a range of lengths.

    The training has ``max_checkpoints * checkpoint_every`` steps; `posthoc_ema.plan` takes any other.

    Args:
        sigma_rels: lengths of the tracked averages.
        target_sigma_rel_range: the shortest and the longest target, (0.05, 0.28) where it is not given.
        num_target_points: how many targets; tracked lengths within the range are among them.
        max_checkpoints: snapshots of each tracked average.
        update_every: steps between updates.
        checkpoint_every: steps between snapshots.

    Returns:
        ``(target_sigma_rels, errors, None)``: two f64 tensors of shape ``(num_target_points,)``, the targets rising. An
        error is the norm of the difference between the synthesized and the target's profile, relative to the norm of
        the latter (`Plan.relative_error`). The None stands where pytorch-posthoc-ema returns one.

    Raises:
        ValueError: for no tracked length, one outside of (0, 1/sqrt 12], a range in the wrong order, fewer targets than
            tracked lengths within it, and intervals that leave no snapshot.
    """
    import torch

    if len(sigma_rels) == 0:
        raise ValueError("sigma_rels is empty: give the length of at least one tracked average")
    targets = target_points(sigma_rels, target_sigma_rel_range, num_target_points)
    plans = plan(
        targets,
        steps=max_checkpoints * checkpoint_every,
        sigma_rels=sigma_rels,
        update_every=update_every,
        # The whole training counts, however short.
        update_after_step=0,
        checkpoint_every=checkpoint_every,
        max_checkpoints=max_checkpoints,
    )
    errors = [each.relative_error for each in plans]
    return torch.tensor(targets, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64), None


def plot_reconstruction_errors(
    target_sigma_rels: torch.Tensor | npt.ArrayLike,
    errors: torch.Tensor | npt.ArrayLike,
    source_sigma_rels: Sequence[float],
    title: str | None = None,
    figsize: tuple[float, float] = (10, 6),
) -> Image.Image:
    """Draws the error over the length of the average, on a logarithmic scale, with the tracked lengths marked.

    Args:
        target_sigma_rels: ``(n,)``, rising.
        errors: ``(n,)``, relative errors, at least 0. The axis ends three decades below the largest: where the curve
            leaves it, there is next to none.
        source_sigma_rels: lengths of the tracked averages.
        title: above the picture.
        figsize: inches, at 150 dots each.

    Returns:
        An RGB image.

    Raises:
        ValueError: for arguments of other shapes, and for values that are negative or not finite.
    """
    lengths, values = as_floats(target_sigma_rels), as_floats(errors)
    tracked = as_floats(list(source_sigma_rels))
    if lengths.ndim != 1 or lengths.shape != values.shape or lengths.size == 0:
        raise ValueError(f"{lengths.shape} target_sigma_rels and {values.shape} errors: give one error for each target")
    for name, numbers in (("target_sigma_rels", lengths), ("errors", values), ("source_sigma_rels", tracked)):
        if not (np.isfinite(numbers) & (numbers >= 0.0)).all():
            raise ValueError(f"{name} must be finite and at least 0")
    from matplotlib.figure import Figure

    # No pyplot: its list of figures belongs to the user.
    figure = Figure(figsize=figsize, dpi=_DOTS_PER_INCH, layout="constrained", facecolor="white")
    # Text keeps its share of a smaller picture.
    size = 15.0 * min(figsize[0] / 10.0, figsize[1] / 6.0)
    _draw(figure.add_subplot(), lengths, values, tracked, title or "Error of synthesized averages", size)
    return _rendered(figure)


def reconstruction_error(
    sigma_rels: Sequence[float],
    target_sigma_rel_range: tuple[float, float] | None = None,
    num_target_points: int = 100,
    max_checkpoints: int = 20,
    update_every: int = 10,
    checkpoint_every: int = 1000,
    title: str | None = None,
    figsize: tuple[float, float] = (10, 6),
) -> Image.Image:
    """Computes errors as `compute_reconstruction_errors` does and draws them as `plot_reconstruction_errors` does."""
    targets, errors, _ = compute_reconstruction_errors(
        sigma_rels, target_sigma_rel_range, num_target_points, max_checkpoints, update_every, checkpoint_every
    )
    return plot_reconstruction_errors(targets, errors, sigma_rels, title, figsize)


def plot_sweep(swept: Swept, title: str | None = None, figsize: tuple[float, float] = (10, 6)) -> Image.Image:
    """Draws the scores of a sweep over the length, in the family of the best: as a dot for each target, as a ring for each
    step of the refinement; lengths whose evaluation failed are marked at the foot.

    Args:
        swept: what `posthoc_ema.PostHocEMA.sweep` returned.
        title: above the picture.
        figsize: inches, at 150 dots each.

    Returns:
        An RGB image.

    Raises:
        ValueError: where the best is a table, which has no length.
    """
    best = next(trial for trial in swept.results if trial.profile == swept.best.profile)
    family = _family(best)
    if best.length is None:
        raise ValueError(f"the best is a {best.profile}, which has no length: there is no curve to draw")
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, dpi=_DOTS_PER_INCH, layout="constrained", facecolor="white")
    size = 15.0 * min(figsize[0] / 10.0, figsize[1] / 6.0)
    axes = figure.add_subplot()
    _draw_scores(axes, [trial for trial in swept.results if _family(trial) == family], best, size)
    axes.set_title(title or f"Best: {best.profile}, score {best.score:.6g}", color=_INK, fontsize=size, loc="left")
    better = "smaller" if swept.minimize else "larger"
    axes.set_ylabel(f"score ({better} is better)", color=_INK, fontsize=size)
    return _rendered(figure)


def target_points(
    sigma_rels: Iterable[float], target_sigma_rel_range: tuple[float, float] | None = None, num_target_points: int = 100
) -> list[float]:
    """Evenly spaced targets over a range, those nearest to tracked lengths moved onto them.

    Args:
        sigma_rels: lengths of the tracked averages; those outside of the range move nothing.
        target_sigma_rel_range: the shortest and the longest target, (0.05, 0.28) where it is not given.
        num_target_points: how many.

    Returns:
        So many numbers, rising.

    Raises:
        ValueError: for a range that is not above 0 or in the wrong order, and fewer targets than tracked lengths within
            it.
    """
    shortest, longest = DEFAULT_RANGE if target_sigma_rel_range is None else target_sigma_rel_range
    if not 0.0 < shortest < longest < np.inf:
        raise ValueError(
            f"target_sigma_rel_range = ({shortest}, {longest}): give a shorter and a longer one, finite and above 0"
        )
    tracked = {float(sigma_rel) for sigma_rel in sigma_rels if shortest <= sigma_rel <= longest}
    if num_target_points < max(1, len(tracked)):
        raise ValueError(
            f"num_target_points = {num_target_points}: at least 1, and the {len(tracked)} that are tracked"
        )
    points = np.linspace(shortest, longest, num_target_points)
    moved = np.zeros(points.shape, dtype=bool)
    for sigma_rel in sorted(tracked):
        nearest = int(np.argmin(np.where(moved, np.inf, np.abs(points - sigma_rel))))
        points[nearest], moved[nearest] = sigma_rel, True
    return sorted(points.tolist())


def _draw(axes: Axes, lengths: _Floats, errors: _Floats, tracked: _Floats, title: str, size: float) -> None:
    """The curve, the tracked lengths as lines, and what the axes mean."""
    top = max(float(errors.max()), _LEAST)
    bottom = top / 10.0**_DECADES
    # Below the axis, so that the line leaves it; zero has no place on a logarithmic one.
    axes.plot(lengths, np.maximum(errors, bottom / 10.0), color=_CURVE, linewidth=2.0, zorder=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom, top * 2.0)
    if errors.max() < _LEAST:
        note = f"nothing but rounding: all below {_LEAST:g}"
        axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", color=_CURVE, fontsize=size)
    axes.set_title(title, color=_INK, fontsize=size, loc="left")
    axes.set_xlabel("length of the synthesized average, σ_rel", color=_INK, fontsize=size)
    axes.set_ylabel("profile error, ‖synthesized − target‖ / ‖target‖", color=_INK, fontsize=0.9 * size)
    _mark(axes, tracked, 0.9 * size)
    _style(axes, 0.9 * size)


_LENGTHS = {
    "sigma_rel": "length of the average, σ_rel",
    "half_life": "half-life of the average in steps",
    "window": "window of the average in steps",
    "fraction": "window of the average as a share of the training",
}


def _family(trial: Trial) -> tuple[object, ...] | None:
    """What the trials of one curve have in common."""
    if trial.length is None:
        return None
    described = trial.profile.to_dict()
    return (described["kind"], described.get("shape"), trial.length[0])


def _draw_scores(axes: Axes, trials: Sequence[Trial], best: Trial, size: float) -> None:
    """One family's scores over its lengths, a line through them, and the best one marked."""
    lengths = {trial.profile: trial.length[1] for trial in trials if trial.length is not None}
    points = sorted((lengths[t.profile], t.score, t.refined) for t in trials if t.score is not None)
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=_CURVE, linewidth=1.5, alpha=0.5, zorder=2)
    asked = [(x, y) for x, y, refined in points if not refined]
    chosen = [(x, y) for x, y, refined in points if refined]
    _dots(axes, asked, "asked for", color=_CURVE, markersize=0.5 * size)
    _dots(axes, chosen, "refined", color=_CURVE, markersize=0.5 * size, markerfacecolor="white")
    top = [(x, y) for x, y, _ in points if x == lengths[best.profile]]
    _dots(axes, top, "best", color=_TRACKED, markersize=0.9 * size, markerfacecolor="none", markeredgewidth=2.0)
    # On the axis itself: a failure has no score.
    failed = [(lengths[trial.profile], 0.0) for trial in trials if trial.score is None]
    foot = axes.get_xaxis_transform()
    _dots(axes, failed, "failed", color=_TRACKED, marker="x", transform=foot, clip_on=False, markersize=0.5 * size)
    name = best.length[0] if best.length is not None else "sigma_rel"
    if name != "sigma_rel":
        axes.set_xscale("log")
    axes.set_xlabel(_LENGTHS[name], color=_INK, fontsize=size)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=0.9 * size)
    _style_plain(axes, 0.9 * size)


def _dots(axes: Axes, points: Sequence[tuple[float, float]], label: str, **style: Any) -> None:
    if points:
        x, y = zip(*points)
        axes.plot(x, y, label=label, **{"linestyle": "none", "marker": "o", "zorder": 3, **style})


def _mark(axes: Axes, tracked: _Floats, size: float) -> None:
    """Lines at the tracked lengths, and one key above the axes: texts at close lines would collide."""
    for sigma_rel in tracked:
        line = axes.axvline(sigma_rel, color=_TRACKED, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
    if tracked.size:
        lengths = ", ".join(f"{sigma_rel:g}" for sigma_rel in sorted(set(tracked.tolist())))
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
        axes.legend([line], [f"tracked: {lengths}"], frameon=False, labelcolor=_TRACKED, fontsize=size, **place)


def _style(axes: Axes, size: float) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    # Decades only: an error is rarely read to more than that.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100.0 * error:.3g}%"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _style_plain(axes, size)


def _style_plain(axes: Axes, size: float) -> None:
    """Light on ink, whatever the axes show."""
    axes.tick_params(colors=_INK, labelsize=size)
    axes.tick_params(which="minor", colors=_FAINT)
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    axes.grid(True, color=_FAINT, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)


def _rendered(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
