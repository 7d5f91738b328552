"""Advice before a training."""

from __future__ import annotations

import pytest

from posthoc_ema import Profile, advise, plan


def test_advice_fits_the_disk_and_agrees_with_plans() -> None:
    known = {"steps": 20_000, "parameters": 10_000_000, "disk": 1.1e9, "checkpoint_dtype": "float16"}
    reported: list[tuple[int, int | None]] = []
    advice = advise(**known, progress=lambda done, total: reported.append((done, total)))
    assert reported[-1][0] == reported[-1][1] and [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert [len(each.profiles) for each in advice] == [2, 2, 2, 3, 3, 3, 4, 4]
    best = min((each for each in advice if each.disk <= 1.1e9), key=lambda each: each.error)
    [found] = plan(
        [best.sigma_rel],
        steps=20_000,
        profiles=best.profiles,
        checkpoint_every=best.checkpoint_every,
        max_checkpoints=best.max_checkpoints,
    )
    together = (found.relative_error**2 + (2.1e-4 * found.noise_gain) ** 2) ** 0.5
    # The advised error is the largest of the last tenth of the training, not only of its end.
    assert 0.1 * best.error < together < 1.02 * best.error
    default = max(each.relative_error for each in plan([0.06, 0.1, 0.2, 0.26], steps=20_000, max_checkpoints=19))
    assert best.relative_error < default
    assert all(isinstance(profile, Profile) for profile in best.profiles)
    assert all(each.predicted is None for each in advice)


def test_invalid_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="do not hold one step's snapshots of two profiles"):
        advise(steps=20_000, parameters=10_000_000, disk=1e6)
    with pytest.raises(ValueError, match="the shorter sigma_rel first"):
        advise(steps=20_000, parameters=10_000_000, disk=1e9, sigma_rels=(0.2, 0.1))


def test_advice_predicts_errors_if_the_movement_is_known() -> None:
    known = {"steps": 400, "parameters": 1_000_000, "disk": 6e7, "sigma_rels": (0.1, 0.25)}
    for each in advise(**known, movement="walk:0.3"):
        found = plan(
            [each.sigma_rel],
            steps=400,
            profiles=each.profiles,
            checkpoint_every=each.checkpoint_every,
            max_checkpoints=each.max_checkpoints,
            retention=(0.1, 0.25),
            movement="walk:0.3",
        )[0].predicted
        assert each.predicted is not None and found is not None and each.predicted.total >= found.total > 0
    with pytest.raises(ValueError, match="give one of them"):
        advise(**known, movement="walk", like="runs/old")
