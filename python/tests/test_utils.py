"""Conversions and closed forms: identities, and properties that the tests of pytorch-posthoc-ema check."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from posthoc_ema import Profile, plan
from posthoc_ema.utils import (
    MAX_SIGMA_REL,
    beta_to_sigma_rel,
    gamma_to_sigma_rel,
    p_dot_p,
    sigma_rel_to_beta,
    sigma_rel_to_gamma,
    solve_weights,
)

GAMMAS = [(0.05, 16.97219860230345), (0.1, 6.937203937601808), (0.28, 0.1693439937694992)]
CONVERSIONS: list[Callable] = [
    sigma_rel_to_gamma,
    gamma_to_sigma_rel,
    lambda sigma_rel: sigma_rel_to_beta(sigma_rel, 1000),
    lambda share: beta_to_sigma_rel(1.0 - 0.1 * share, 1000),
]


@pytest.mark.parametrize(("sigma_rel", "gamma"), GAMMAS)
def test_gamma_of_known_lengths(sigma_rel: float, gamma: float) -> None:
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, rel=1e-13)


def test_plain_mean_is_the_longest_profile() -> None:
    assert sigma_rel_to_gamma(MAX_SIGMA_REL) == pytest.approx(0.0, abs=1e-14)
    assert gamma_to_sigma_rel(0.0) == pytest.approx(MAX_SIGMA_REL, rel=1e-15)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 0.4, math.nan, math.inf])
def test_lengths_out_of_range_are_refused_with_the_reason(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="plain mean"):
        sigma_rel_to_gamma(sigma_rel)


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf])
def test_exponents_out_of_range_are_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        gamma_to_sigma_rel(gamma)


def test_length_and_exponent_round_trip() -> None:
    sigma_rels = np.linspace(0.001, MAX_SIGMA_REL, 1000)
    np.testing.assert_allclose(gamma_to_sigma_rel(sigma_rel_to_gamma(sigma_rels)), sigma_rels, rtol=1e-13)


def test_exponent_gives_the_standard_deviation_of_its_profile() -> None:
    gamma = sigma_rel_to_gamma(0.17)
    t = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = (gamma + 1.0) * t**gamma
    mean = np.mean(density * t)
    assert math.sqrt(np.mean(density * (t - mean) ** 2)) == pytest.approx(0.17, rel=1e-9)


@pytest.mark.parametrize("function", CONVERSIONS)
def test_results_have_the_type_of_the_arguments(function: Callable) -> None:
    one = function(0.2)
    assert type(one) is float and type(function(np.float64(0.2))) is float
    array = function(np.array([[0.2, 0.1]], dtype=np.float32))
    assert array.dtype == np.float32 and array.shape == (1, 2)
    tensor = function(torch.tensor([[0.2, 0.1]], dtype=torch.float64, requires_grad=True))
    assert tensor.dtype == torch.float64 and tensor.shape == (1, 2) and not tensor.requires_grad
    assert tensor[0, 0].item() == one
    assert function(torch.tensor(0.2)).shape == ()


def test_beta_agrees_at_one_length_of_training() -> None:
    assert beta_to_sigma_rel(0.999, 10_000) == pytest.approx(0.1, rel=1e-12)
    assert sigma_rel_to_beta(0.1, 10_000) == pytest.approx(0.999, rel=1e-15)
    assert sigma_rel_to_beta(0.1, 20_000) == pytest.approx(0.9995, rel=1e-15)
    betas = torch.tensor([0.999, 0.9999], dtype=torch.float64)
    back = sigma_rel_to_beta(beta_to_sigma_rel(betas, 100_000), 100_000)
    torch.testing.assert_close(back, betas, rtol=1e-14, atol=0.0)


def test_end_of_the_range_round_trips() -> None:
    for steps in range(10, 2000, 7):
        back = beta_to_sigma_rel(sigma_rel_to_beta(MAX_SIGMA_REL, steps), steps)
        assert back == pytest.approx(MAX_SIGMA_REL, rel=1e-12) and back <= MAX_SIGMA_REL


@pytest.mark.parametrize("function", [beta_to_sigma_rel, sigma_rel_to_beta])
def test_missing_length_of_training_is_refused_with_an_example(function: Callable) -> None:
    with pytest.raises(ValueError, match=r"one length of training only.*steps=100_000"):
        function(0.1)
    for steps in (0, -5, math.nan, math.inf):
        with pytest.raises(ValueError, match="length of training is above 0"):
            function(0.1, steps)


def test_decays_without_a_counterpart_are_refused() -> None:
    with pytest.raises(ValueError, match="longer than the plain mean"):
        beta_to_sigma_rel(0.9999, 1000)
    with pytest.raises(ValueError, match="no longer than one step"):
        sigma_rel_to_beta(0.001, 1000)
    for beta in (0.0, 1.0, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="decay per step"):
            beta_to_sigma_rel(beta, 1000)


def test_p_dot_p_is_the_integral_of_the_product() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        (t_a, t_b), (gamma_a, gamma_b) = rng.uniform(1.0, 10.0, 2), rng.uniform(0.0, 20.0, 2)
        edges = np.linspace(0.0, min(t_a, t_b), 200_001)
        t = 0.5 * (edges[1:] + edges[:-1])
        a, b = ((g + 1.0) * t**g / end ** (g + 1.0) for end, g in ((t_a, gamma_a), (t_b, gamma_b)))
        integral = np.sum(a * b) * (edges[1] - edges[0])
        assert p_dot_p(t_a, gamma_a, t_b, gamma_b) == pytest.approx(integral, rel=1e-6)


def test_p_dot_p_is_symmetric_and_a_density() -> None:
    assert p_dot_p(3.0, 2.0, 7.0, 5.0) == p_dot_p(7.0, 5.0, 3.0, 2.0)
    # Per unit of time: with units twice as long, the value doubles.
    assert p_dot_p(3.0, 2.0, 7.0, 5.0) == pytest.approx(2.0 * p_dot_p(6.0, 2.0, 14.0, 5.0), rel=1e-14)


def test_p_dot_p_at_time_zero() -> None:
    # All mass is at 0, where only the plain mean has a density.
    assert p_dot_p(0.0, 7.0, 10.0, 28.0) == 0.0
    assert p_dot_p(10.0, 28.0, 0.0, 7.0) == 0.0
    assert p_dot_p(0.0, 7.0, 10.0, 0.0) == pytest.approx(0.1)
    # The limit of small times.
    assert p_dot_p(1e-30, 7.0, 10.0, 0.0) == pytest.approx(0.1)
    # Two profiles of time 0, as in the published implementations.
    assert p_dot_p(0.0, 7.0, 0.0, 28.0) == pytest.approx(8.0 * 29.0 / 36.0)
    times = torch.tensor([[0.0, 10.0], [20.0, 30.0]], dtype=torch.float64)
    result = p_dot_p(times, torch.full_like(times, 7.0), times, torch.full_like(times, 28.0))
    assert torch.isfinite(result).all() and result.shape == (2, 2)


def test_p_dot_p_broadcasts_and_keeps_the_widest_dtype() -> None:
    times = torch.tensor([1.0, 2.0, 3.0])
    result = p_dot_p(times[:, None], 2.0, times.double()[None, :], torch.tensor(5))
    assert result.shape == (3, 3) and result.dtype == torch.float64
    assert p_dot_p(torch.tensor(3), 2.0, torch.tensor(7), 5.0).dtype == torch.float64
    assert isinstance(p_dot_p(3, 2, 7, 5), float)
    assert p_dot_p(np.array([3, 4]), 2, 7, 5).dtype == np.float64


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("place", range(4))
def test_p_dot_p_refuses_invalid_profiles(place: int, bad: float) -> None:
    arguments = [3.0, 2.0, 7.0, 5.0]
    arguments[place] = bad
    with pytest.raises(ValueError, match=["t_a", "gamma_a", "t_b", "gamma_b"][place]):
        p_dot_p(*arguments)


def reference_weights(gammas: torch.Tensor, times: torch.Tensor, target_gamma: float) -> torch.Tensor:
    """Solves Algorithm 3 as it is published, without scaling."""
    gram = p_dot_p(times[:, None], gammas[:, None], times[None, :], gammas[None, :])
    right = p_dot_p(times, gammas, times[-1], torch.tensor(target_gamma, dtype=torch.float64))
    return torch.linalg.solve(gram, right)


@pytest.mark.parametrize(
    ("gammas", "times", "target"),
    [
        ([7.0, 28.0], [1.0, 10.0], 15.0),
        ([1.0, 5.0, 10.0], [1.0, 5.0, 10.0], 3.0),
        ([100.0, 500.0], [1.0, 100.0], 200.0),
    ],
)
def test_weights_equal_algorithm_3(gammas: list[float], times: list[float], target: float) -> None:
    g, t = torch.tensor(gammas, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)
    expected = reference_weights(g, t, target)
    weights = solve_weights(g, t, target, calculation_dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    in_f32 = solve_weights(g.float(), t.float(), target)
    assert in_f32.dtype == torch.float32
    torch.testing.assert_close(in_f32.double(), expected, rtol=1e-5, atol=1e-5)


def snapshots(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns exponents and times of a run of two profiles."""
    gammas = [sigma_rel_to_gamma(sigma_rel) for sigma_rel in (0.05, 0.28) for _ in range(count)]
    times = torch.arange(1, count + 1, dtype=torch.float64).repeat(2) * 1000
    return torch.tensor(gammas, dtype=torch.float64), times


def test_stored_average_has_weight_one() -> None:
    gammas, times = snapshots(20)
    weights = solve_weights(gammas, times, sigma_rel_to_gamma(0.28), target_sigma_rel=0.28)
    expected = torch.zeros(40, dtype=torch.float64)
    expected[-1] = 1.0
    torch.testing.assert_close(weights, expected, rtol=0.0, atol=1e-9)


def test_weights_are_close_to_a_plan_with_dense_updates() -> None:
    gammas, times = snapshots(20)
    weights = solve_weights(gammas, times, sigma_rel_to_gamma(0.15))
    (dense,) = plan([0.15], steps=20_000, update_every=1, update_after_step=0, snapshot_growth=None)
    planned = {(weight.index, weight.step): weight.weight for weight in dense.weights}
    expected = [planned[index, step] for index in (0, 1) for step in range(1000, 20_001, 1000)]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=0.01)
    # Only the plan holds the sum at 1.
    assert 1e-7 < abs(weights.sum().item() - 1.0) < 1e-4
    assert dense.sum == pytest.approx(1.0, abs=1e-13)


def test_equal_averages_share_their_weight() -> None:
    weights = solve_weights(np.full(3, 7.0), np.full(3, 5.0), 7.0)
    np.testing.assert_allclose(weights, np.full(3, 1.0 / 3.0), rtol=1e-12)


@pytest.mark.parametrize(
    ("gammas", "times", "target", "message"),
    [
        ([1.0, 2.0], [1.0], 1.0, "one of each"),
        ([], [], 1.0, "one of each"),
        ([[1.0]], [[1.0]], 1.0, "one of each"),
        ([1.0, 2.0], [0.0, 1.0], 1.0, "time 0"),
        ([1.0, -2.0], [1.0, 2.0], 1.0, "gammas"),
        ([1.0, 2.0], [1.0, math.nan], 1.0, "timesteps"),
        ([1.0, 2.0], [1.0, 2.0], -0.5, "gamma"),
        ([1.0, 2.0], [1.0, 2.0], math.nan, "gamma"),
    ],
)
def test_invalid_systems_are_refused(gammas: list, times: list, target: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_weights(torch.tensor(gammas), torch.tensor(times), target)


def test_contradicting_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="target_sigma_rel"):
        solve_weights(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 1.0, target_sigma_rel=0.1)


def test_conversions_agree_with_profiles() -> None:
    assert Profile.gamma(sigma_rel_to_gamma(0.1)) == Profile.sigma_rel(0.1)


def test_numbers_and_arrays_work_without_torch() -> None:
    program = """
import sys
sys.modules["torch"] = None  # importing it fails
import numpy as np
from posthoc_ema import utils, visualization
two = np.array([1.0, 2.0])
assert utils.sigma_rel_to_gamma(np.array([0.1]))[0] > 6
assert utils.solve_weights(two, two, 1.0, calculation_dtype=np.float32).dtype == np.float32
visualization.plot_reconstruction_errors([0.1, 0.2], [0.01, 0.02], (0.05,))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
