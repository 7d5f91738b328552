"""Errors of synthesized averages over their length, as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ._plans import plan
from ._trials import Swept
from .utils import as_floats

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = [
    "compute_reconstruction_errors",
    "plot_reconstruction_errors",
    "plot_sweep",
    "reconstruction_error",
    "target_points",
]

DEFAULT_RANGE = (0.05, 0.28)
"""Shortest and longest sigma_rel of Karras et al. 2023, and the two that are tracked by default."""


def compute_reconstruction_errors(
    sigma_rels: Sequence[float],
    target_sigma_rel_range: tuple[float, float] | None = None,
    num_target_points: int = 100,
    max_checkpoints: int = 20,
    update_every: int = 10,
    checkpoint_every: int = 1000,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Predicts the errors of synthesized averages after a training that fills its checkpoints.

    The training has `max_checkpoints * checkpoint_every` steps; `posthoc_ema.plan` takes any other length.

    Args:
        sigma_rels: Lengths of the tracked averages.
        target_sigma_rel_range: Shortest and longest target; default (0.05, 0.28).
        num_target_points: Number of targets; tracked lengths within the range are among them.
        max_checkpoints: Snapshots of each tracked average.
        update_every: Steps between updates.
        checkpoint_every: Steps between snapshots.

    Returns:
        `(target_sigma_rels, errors, None)`: two float64 tensors of shape `(num_target_points,)`, the targets rising. An
            error is the norm of the difference between the synthesized and the target profile, relative to the norm
            of the target (`Plan.relative_error`). The None is there for compatibility with pytorch-posthoc-ema.

    Raises:
        ValueError: If no length is tracked or one is outside (0, 1/sqrt 12], if the range is in the wrong order, if
            there are fewer targets than tracked lengths within it, or if the intervals leave no snapshot.
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
        # The whole training counts, however short it is.
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
    """Draws errors over the length of the average, on a logarithmic scale, with the tracked lengths marked.

    The picture is that of `posthoc-ema error --plot`.

    Args:
        target_sigma_rels: Lengths of the averages, shape `(n,)`, rising.
        errors: Their relative errors, shape `(n,)`, at least 0.
        source_sigma_rels: Lengths of the tracked averages.
        title: Title of the picture; default "Error of synthesized averages".
        figsize: Width and height in inches, at 150 dots per inch. The picture keeps its proportions.

    Returns:
        An RGB image.

    Raises:
        ValueError: If the shapes differ, a value is negative or not finite, or the picture has no size.
    """
    lengths = as_floats(target_sigma_rels)
    values = as_floats(errors)
    tracked = as_floats(list(source_sigma_rels))
    if lengths.ndim != 1 or lengths.shape != values.shape or lengths.size == 0:
        raise ValueError(
            f"target_sigma_rels of shape {lengths.shape} and errors of shape {values.shape}: give one error for each "
            f"target"
        )
    for name, numbers in (("target_sigma_rels", lengths), ("errors", values), ("source_sigma_rels", tracked)):
        if not (np.isfinite(numbers) & (numbers >= 0.0)).all():
            raise ValueError(f"{name}: every value must be finite and at least 0")
    from . import _draw

    title = title or "Error of synthesized averages"
    return _draw.draw_errors(lengths.tolist(), values.tolist(), tracked.tolist(), title, figsize)


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
    """Computes errors with `compute_reconstruction_errors` and draws them with `plot_reconstruction_errors`.

    Args:
        sigma_rels: Lengths of the tracked averages.
        target_sigma_rel_range: Shortest and longest target; default (0.05, 0.28).
        num_target_points: Number of targets; tracked lengths within the range are among them.
        max_checkpoints: Snapshots of each tracked average.
        update_every: Steps between updates.
        checkpoint_every: Steps between snapshots.
        title: Title of the picture; default "Error of synthesized averages".
        figsize: Width and height in inches, at 150 dots per inch. The picture keeps its proportions.

    Returns:
        An RGB image.

    Raises:
        ValueError: If `compute_reconstruction_errors` refuses an argument.
    """
    targets, errors, _ = compute_reconstruction_errors(
        sigma_rels, target_sigma_rel_range, num_target_points, max_checkpoints, update_every, checkpoint_every
    )
    return plot_reconstruction_errors(targets, errors, sigma_rels, title, figsize)


def plot_sweep(swept: Swept, title: str | None = None, figsize: tuple[float, float] = (10, 6)) -> Image.Image:
    """Draws the scores of a sweep over the length; the same as `Swept.plot`.

    Args:
        swept: Result of `PostHocEMA.sweep`.
        title: Title of the picture; by default the best profile and its score.
        figsize: Width and height in inches, at 150 dots per inch. The picture keeps its proportions.

    Returns:
        An RGB image.

    Raises:
        ValueError: If the best profile is a table, which has no length.
    """
    return swept.plot(title, figsize)


def target_points(
    sigma_rels: Iterable[float], target_sigma_rel_range: tuple[float, float] | None = None, num_target_points: int = 100
) -> list[float]:
    """Returns evenly spaced targets over a range, those nearest to tracked lengths moved onto them.

    Args:
        sigma_rels: Lengths of the tracked averages; those outside the range have no effect.
        target_sigma_rel_range: Shortest and longest target; default (0.05, 0.28).
        num_target_points: Number of targets.

    Returns:
        The targets, rising.

    Raises:
        ValueError: If the range is not above 0 or in the wrong order, or if there are fewer targets than tracked
            lengths within it.
    """
    shortest, longest = DEFAULT_RANGE if target_sigma_rel_range is None else target_sigma_rel_range
    if not 0.0 < shortest < longest < np.inf:
        raise ValueError(
            f"target_sigma_rel_range = ({shortest}, {longest}): give a shorter and a longer one, finite and above 0"
        )
    tracked = {float(sigma_rel) for sigma_rel in sigma_rels if shortest <= sigma_rel <= longest}
    if num_target_points < max(1, len(tracked)):
        raise ValueError(
            f"num_target_points = {num_target_points}: give at least 1, and no fewer than the {len(tracked)} that are "
            f"tracked"
        )
    points = np.linspace(shortest, longest, num_target_points)
    moved = np.zeros(points.shape, dtype=bool)
    for sigma_rel in sorted(tracked):
        nearest = int(np.argmin(np.where(moved, np.inf, np.abs(points - sigma_rel))))
        points[nearest], moved[nearest] = sigma_rel, True
    return sorted(points.tolist())
