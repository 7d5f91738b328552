"""Errors of synthesized averages, as numbers and as a picture."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

from posthoc_ema import plan
from posthoc_ema.visualization import (
    compute_reconstruction_errors,
    plot_reconstruction_errors,
    reconstruction_error,
    target_points,
)

# Colours of the curve, and of the lines at tracked lengths.
BLUE, GREY = (0, 90, 160), (110, 110, 110)


def test_errors_have_shapes_and_order() -> None:
    targets, errors, nothing = compute_reconstruction_errors((0.05, 0.10), (0.05, 0.28), 50, checkpoint_every=10)
    assert nothing is None
    for tensor in (targets, errors):
        assert tensor.shape == (50,) and tensor.dtype == torch.float64
    assert targets[0] >= 0.05 and targets[-1] <= 0.28 and (targets.diff() > 0).all()
    assert torch.isfinite(errors).all() and (errors >= 0).all()


@pytest.mark.parametrize("count", [2, 3, 10, 99, 100])
def test_target_count_is_exact_and_includes_tracked_lengths(count: int) -> None:
    points = target_points((0.05, 0.123456, 0.4), (0.05, 0.28), count)
    assert len(set(points)) == count and points == sorted(points)
    assert 0.05 in points and 0.123456 in points
    assert min(points) >= 0.05 and max(points) <= 0.28


def test_close_tracked_lengths_are_all_kept() -> None:
    close = (0.1, 0.1001, 0.1002, 0.1003)
    points = target_points(close, (0.05, 0.28), 10)
    assert len(points) == 10 and set(close) <= set(points)


def test_default_range_is_that_of_the_paper() -> None:
    points = target_points((0.05, 0.28))
    assert len(points) == 100 and (points[0], points[-1]) == (0.05, 0.28)
    # No target was moved: they are evenly spaced.
    np.testing.assert_allclose(points, np.linspace(0.05, 0.28, 100), rtol=1e-14)


def test_errors_equal_those_of_plans() -> None:
    training = {"sigma_rels": (0.05, 0.28), "max_checkpoints": 9, "checkpoint_every": 300}
    targets, errors, _ = compute_reconstruction_errors(
        target_sigma_rel_range=(0.01, 0.288), num_target_points=7, **training
    )
    expected = plan(targets.tolist(), steps=2700, update_after_step=0, **training)
    assert errors.tolist() == [each.relative_error for each in expected]
    assert errors.max() > 0.001


def test_tracked_lengths_have_no_error() -> None:
    targets, errors, _ = compute_reconstruction_errors((0.05, 0.10, 0.28))
    for sigma_rel in (0.05, 0.10, 0.28):
        assert errors[targets.tolist().index(sigma_rel)] < 1e-12
    # All other lengths have an error, of a few percent at most.
    assert (errors > 1e-6).sum() == 97 and errors.max() < 0.05


def test_hundred_targets_take_under_five_seconds() -> None:
    start = time.perf_counter()
    compute_reconstruction_errors((0.05, 0.28), max_checkpoints=100)
    # It takes 0.2 s on a slow core; solved one by one, the targets would take a hundred times as long.
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_sigma_rel_range": (0.28, 0.05)}, "shorter and a longer"),
        ({"target_sigma_rel_range": (0.1, 0.1)}, "shorter and a longer"),
        ({"target_sigma_rel_range": (-0.05, 0.1)}, "above 0"),
        ({"target_sigma_rel_range": (0.05, math.nan)}, "above 0"),
        ({"target_sigma_rel_range": (0.05, math.inf)}, "finite"),
        ({"target_sigma_rel_range": (0.05, 0.4)}, "plain mean"),
        ({"sigma_rels": (-0.05, 0.28)}, "sigma_rel = -0.05"),
        ({"sigma_rels": (math.nan,)}, "NaN"),
        ({"sigma_rels": ()}, "empty"),
        ({"num_target_points": 1}, "2 that are tracked"),
        ({"num_target_points": 0}, "at least 1"),
        ({"update_every": 0}, "update_every"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"max_checkpoints": 0}, "at least 1"),
    ],
)
def test_invalid_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reconstruction_error(**{"sigma_rels": (0.05, 0.28), **arguments})


def pixels_of(image: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Returns rows and columns of the pixels of about a colour."""
    return np.argwhere((np.abs(np.asarray(image).astype(int) - color) < 30).all(axis=-1))


def test_picture_shows_curve_and_tracked_lengths() -> None:
    image = reconstruction_error((0.05, 0.28), (0.02, 0.285), figsize=(12, 8), title="A title")
    assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (1800, 1200)
    assert len(pixels_of(image, BLUE)) > 500
    targets, errors, _ = compute_reconstruction_errors((0.05, 0.28), (0.02, 0.285))
    without = plot_reconstruction_errors(targets, errors, (), "A title", (12, 8))
    assert len(pixels_of(image, GREY)) > len(pixels_of(without, GREY)) + 500
    # Most of the picture is white.
    assert (np.asarray(image) == 255).all(axis=-1).mean() > 0.9


@pytest.mark.parametrize("figsize", [(-1.0, 6.0), (10.0, 0.0), (math.inf, 6.0), (10.0, math.nan)])
def test_invalid_sizes_are_refused(figsize: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="figsize"):
        reconstruction_error((0.05, 0.28), figsize=figsize)


def test_larger_error_is_drawn_higher() -> None:
    image = plot_reconstruction_errors(torch.linspace(0.05, 0.28, 50), torch.logspace(-3, -1, 50), ())
    curve = pixels_of(image, BLUE)
    left, right = curve[curve[:, 1].argmin()], curve[curve[:, 1].argmax()]
    assert left[0] > right[0] + 200


@pytest.mark.parametrize("errors", [torch.ones(100), torch.zeros(100), torch.full((100,), 1e-15)])
def test_flat_and_vanishing_errors_can_be_drawn(errors: torch.Tensor) -> None:
    image = plot_reconstruction_errors(torch.linspace(0.05, 0.28, 100), errors, (0.05, 0.10))
    assert isinstance(image, Image.Image) and image.size == (1500, 900)
    assert len(pixels_of(image, BLUE)) > 100


@pytest.mark.parametrize(
    ("targets", "errors", "sources"),
    [
        ([0.1, 0.2], [0.1], ()),
        ([], [], ()),
        ([0.1, 0.2], [0.1, math.nan], ()),
        ([0.1, 0.2], [0.1, -0.1], ()),
        ([0.1, math.inf], [0.1, 0.1], ()),
        ([0.1, 0.2], [0.1, 0.1], (math.nan,)),
    ],
)
def test_invalid_values_are_not_drawn(targets: list, errors: list, sources: tuple) -> None:
    with pytest.raises(ValueError, match="errors|finite"):
        plot_reconstruction_errors(targets, errors, sources)
