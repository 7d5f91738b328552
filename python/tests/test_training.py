"""Averages during training and after it, compared with averages computed by their definition."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import allowance, exact, shake, train

from posthoc_ema import PostHocEMA, Profile

SIGMA_RELS = [0.05, 0.10, 0.15, 0.20, 0.25]
STEPS = 20_000


def paths() -> np.ndarray:
    """Returns a ramp 0..1 and three random walks, shape (steps, 4), in float32."""
    walk = np.random.default_rng(1).standard_normal((STEPS, 3)).cumsum(axis=0) / np.sqrt(STEPS)
    ramp = np.arange(1, STEPS + 1) / STEPS
    return np.column_stack([ramp, walk]).astype(np.float32)


def test_defaults_agree_with_the_exact_averages(run_dir: Path) -> None:
    values = paths()
    model = torch.nn.Module()
    model.register_parameter("weight", torch.nn.Parameter(torch.zeros(4)))
    ema = PostHocEMA.from_model(model, run_dir)
    rows = torch.from_numpy(values)
    train(ema, model, STEPS, lambda i: model.weight.data.copy_(rows[i - 1]))
    times = np.arange(100, STEPS + 1, 10)
    at_updates = values[times - 1]
    for source in (ema, PostHocEMA.from_path(run_dir)):
        averages = source.synthesize(SIGMA_RELS)
        plans = source.plan(SIGMA_RELS)
        for sigma_rel, average, plan in zip(SIGMA_RELS, averages, plans):
            profile = Profile.sigma_rel(sigma_rel)
            right = exact(profile, times, at_updates)
            got = average["weight"].double().numpy()
            # The profile's error, and the rounding of float32 averages as the blend amplifies it.
            allowed = allowance(profile, times, at_updates, plan.relative_error) + 1e-6 * plan.noise_gain
            assert plan.relative_error < 0.02
            assert np.all(np.abs(got - right) <= allowed), (sigma_rel, got, right, allowed)
    # Other tools get 0.244 here.
    assert abs(ema.synthesize([0.15])[0]["weight"][0].item() - 0.820) < 0.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_averaged(run_dir: Path, dtype: torch.dtype) -> None:
    model = torch.nn.Linear(3, 2, dtype=dtype)
    ema = PostHocEMA.from_model(model, run_dir, update_every=1, update_after_step=0, checkpoint_every=50)
    seen = []
    for _ in range(200):
        shake(model, 0.3)
        ema.update_(model)
        seen.append(model.weight.detach().double().numpy().copy())
    times, values = np.arange(1, 201), np.stack(seen)
    for sigma_rel in (0.05, 0.28):
        with ema.state_dict(sigma_rel) as state_dict:
            assert state_dict["weight"].dtype == dtype
            got = state_dict["weight"].double().numpy()
        # Half an ulp of the dtype, and the float32 rounding of the running average.
        allowed = np.abs(got) * torch.finfo(dtype).eps / 2 + 4e-7
        assert np.all(np.abs(got - exact(Profile.sigma_rel(sigma_rel), times, values)) <= allowed)


def test_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    def run(name: str, stops: bool) -> None:
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 5)

        def open_() -> PostHocEMA:
            options = {"checkpoint_every": 100, "update_every": 3, "update_after_step": 0, "resume": True}
            return PostHocEMA.from_model(model, tmp_path / name, **options)

        ema = open_()
        train(ema, model, 250)
        if stops:
            ema.save()
            del ema
            ema = open_()
        assert ema.step == 250
        train(ema, model, 250)
        ema.finish()

    run("straight", False)
    run("resumed", True)
    names = sorted(path.name for path in (tmp_path / "straight").glob("*.*.safetensors"))
    assert len(names) == 40
    assert names == sorted(path.name for path in (tmp_path / "resumed").glob("*.*.safetensors"))
    a = {name: PostHocEMA.from_path(tmp_path / "straight").synthesize([0.1])[0] for name in ("x",)}
    b = PostHocEMA.from_path(tmp_path / "resumed").synthesize([0.1])[0]
    assert all(torch.equal(tensor, b[name]) for name, tensor in a["x"].items())
    for name in names:
        # The metadata contain the run's own id; the tensors are the last bytes.
        one, other = ((tmp_path / run / name).read_bytes()[-120:] for run in ("straight", "resumed"))
        assert one == other, name
    assert not filecmp.cmp(tmp_path / "straight" / names[0], tmp_path / "resumed" / names[0], shallow=False)


def test_updates_follow_a_clock_of_the_caller(run_dir: Path) -> None:
    model, seen, times = torch.nn.Linear(2, 2), [], []
    ema = PostHocEMA.from_model(model, run_dir, update_every=100, update_after_step=0, checkpoint_every=1000)
    rng, images = np.random.default_rng(3), 0
    for _ in range(300):
        shake(model)
        before, images = images, images + int(rng.integers(10, 60))
        ema.update_at_(images, model)
        if images // 100 > before // 100:
            seen.append(model.weight.detach().double().numpy().copy())
            times.append(images)
    assert ema.step == images
    got = ema.ema_models[1].ema_model.weight.detach().double().numpy()
    assert np.allclose(got, exact(Profile.sigma_rel(0.28), np.array(times), np.stack(seen)), rtol=0, atol=1e-6)


def test_classical_averages_are_tracked_beside_power_functions(run_dir: Path) -> None:
    model, seen = torch.nn.Linear(2, 2), []
    ema = PostHocEMA.from_model(
        model, run_dir, sigma_rels=(0.1,), betas=(0.99,), profiles=[Profile.half_life(30)], update_after_step=0
    )
    for i in range(1, 401):
        shake(model)
        ema.update_(model)
        if i % 10 == 0:
            seen.append(model.weight.detach().double().numpy().copy())
    assert [str(profile) for profile in ema.profiles][:2] == ["sigma_rel 0.1", "beta 0.99"]
    assert ema.sigma_rels == (pytest.approx(0.1),)
    times, values = np.arange(10, 401, 10), np.stack(seen)
    for index, profile in enumerate([Profile.sigma_rel(0.1), Profile.beta(0.99), Profile.half_life(30)]):
        got = ema.ema_models[index].ema_model.weight.detach().double().numpy()
        assert np.allclose(got, exact(profile, times, values), rtol=0, atol=1e-6)
    other = PostHocEMA.from_model(torch.nn.Linear(1, 1), run_dir.parent / "other", betas=(0.99, 0.999))
    assert other.reconstruction_error().size > (100, 100)
    uniform = ema.synthesize([Profile.uniform(fraction=0.5), Profile.linear(200)])
    assert all(torch.isfinite(target["weight"]).all() for target in uniform)


def test_switch_replaces_the_model_by_its_average(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    ema = PostHocEMA.from_model(model, run_dir, update_every=1, update_after_step=0)
    train(ema, model, 50)
    with ema.state_dict(0.15) as average:
        pass
    model[1].num_batches_tracked.fill_(77)
    loss = model(torch.randn(4, 3)).sum()
    assert ema.switch_(model, 0.15) is model
    assert torch.equal(model[0].weight, average["0.weight"])
    # Tensors that are not averaged stay as they are.
    assert model[1].num_batches_tracked.item() == 78
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_diverged_training_is_refused_and_not_stored(run_dir: Path) -> None:
    model = torch.nn.Linear(2, 2)
    options = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 10, "snapshot_growth": 0}
    ema = PostHocEMA.from_model(model, run_dir, on_nonfinite="ignore", **options)
    train(ema, model, 15)
    model.weight.data[1, 0] = float("nan")
    with pytest.raises(RuntimeError, match="`weight`.*NaN at element 2 at step 20"):
        train(ema, model, 5, lambda _: None)
    assert [path.name for path in sorted(run_dir.glob("0.*.safetensors"))] == ["0.10.safetensors"]
    with pytest.warns(RuntimeWarning, match="its live state could not be stored: .*NaN at element 2"):
        ema.close()


def every_step(model: torch.nn.Module, directory: Path, **options: object) -> PostHocEMA:
    return PostHocEMA.from_model(model, directory, update_every=1, update_after_step=0, checkpoint_every=1, **options)


def snapshots(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.*.safetensors"))


def test_snapshots_exist_after_a_flush_and_at_once_without_background(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    ema = every_step(model, tmp_path / "background")
    at_once = every_step(model, tmp_path / "at-once", checkpoint_in_background=False)
    for step in (1, 2, 3):
        shake(model)
        at_once.update_(model)
        assert len(snapshots(tmp_path / "at-once")) == 2 * step
        ema.update_(model)
    ema.flush()
    at_once.flush()
    assert snapshots(tmp_path / "background") == snapshots(tmp_path / "at-once")
    a, b = (PostHocEMA.from_path(tmp_path / name).synthesize([0.1])[0] for name in ("background", "at-once"))
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    # A plan at a stored step uses all snapshots up to it.
    for _ in range(5):
        shake(model)
        ema.update_(model)
    assert {name for name in snapshots(tmp_path / "background")} >= {"0.3.safetensors"}
    assert max(step for plan in ema.plan([0.1], step=7) for _, step in ((w.index, w.step) for w in plan.weights)) == 7
    ema.close()
    ema.flush()


def test_background_error_is_raised_by_a_later_call(tmp_path: Path) -> None:
    model, run = torch.nn.Linear(3, 3), tmp_path / "run"
    ema = every_step(model, run)
    ema.update_(model)
    ema.flush()
    run.rename(tmp_path / "aside")
    ema.update_(model)
    with pytest.raises(OSError, match="check the path"):
        ema.flush()
    ema.update_(model)
    with pytest.raises(OSError, match="check the path"):
        ema.close()
    (tmp_path / "aside").rename(run)
    assert snapshots(run) == ["0.1.safetensors", "1.1.safetensors"]
    # The run is released, and an error of the disk does not hide that of the block.
    with pytest.warns(UserWarning, match="a snapshot was not stored"), pytest.raises(KeyError, match="own"):
        with every_step(model, run, resume=True) as ema:
            run.rename(tmp_path / "aside")
            ema.update_(model)
            raise KeyError("own")


ENDED = """
    import sys, torch
    from posthoc_ema import PostHocEMA
    model = torch.nn.Linear(1000, 1000)
    ema = PostHocEMA.from_model(model, sys.argv[1], update_every=1, update_after_step=0, checkpoint_every=1)
    model.ema = [ema, lambda: model]
    ema.update_(model)
    ema.update_(model)
    if sys.argv[2] == "raises":
        raise KeyError("own")
"""


@pytest.mark.parametrize("how", ["returns", "raises"])
def test_interpreter_waits_for_snapshots_at_exit(run_dir: Path, how: str) -> None:
    program = [sys.executable, "-c", textwrap.dedent(ENDED), str(run_dir), how]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert ("KeyError" in done.stderr) == (how == "raises"), done.stderr
    assert snapshots(run_dir) == ["0.1.safetensors", "0.2.safetensors", "1.1.safetensors", "1.2.safetensors"]
    assert not list(run_dir.glob(".posthoc-ema-*"))
