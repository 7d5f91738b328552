"""Options and their errors, plans, progress, files, and averages in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shake, train

from posthoc_ema import KarrasEMA, Plan, PostHocEMA, Profile, _native, plan


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"update_every": 0}, "option update_every: an interval is at least 1 step"),
        ({"checkpoint_every": -5}, "checkpoint_every = -5: must be a whole number, 0 or more"),
        ({"update_after_step": 1.5}, "update_after_step = 1.5: must be a whole number"),
        ({"max_checkpoints": 0}, "max_checkpoints: 0 keeps no snapshot"),
        ({"retention": "newest"}, "retention = 'newest': must be 'latest'"),
        ({"retention": (0.1, 0.15, 0.2)}, "a range is two sigma_rel, steps are whole numbers"),
        ({"retention": (0.2, 0.1)}, "option retention: the range of lengths 0.2 to 0.1"),
        ({"sigma_rels": (0.05, 0.4)}, "sigma_rel = 0.4: must be above 0 and at most"),
        ({"sigma_rels": (0.1, 0.1)}, "sigma_rel 0.1 is given twice"),
        ({"betas": (1.5,)}, "beta = 1.5"),
        ({"profiles": [Profile.uniform(100)]}, "uniform 100 cannot be tracked by a running average"),
        ({"checkpoint_dtype": torch.int8}, "dtype torch.int8: averages can be float32"),
        ({"calculation_dtype": torch.int64}, "dtype torch.int64: averages can be float32"),
        ({"device": "gpu"}, "`gpu` is not a device: the devices are auto, cpu, cuda and cuda:N"),
        ({"copy": ["[", "weight"]}, "option copy"),
    ],
)
def test_invalid_options_are_refused(run_dir: Path, options: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        PostHocEMA.from_model(torch.nn.Linear(2, 2), run_dir, **options)
    assert not list(run_dir.glob("*.safetensors"))


def test_missing_device_is_refused(run_dir: Path) -> None:
    if _native.cuda_devices()[0]:
        pytest.skip("there is a CUDA device")
    with pytest.raises(RuntimeError, match="device='cuda': .*keep the averages on the host with device='cpu'"):
        PostHocEMA.from_model(torch.nn.Linear(2, 2), run_dir, device="cuda")
    # Without a device, "auto" is the host.
    train(PostHocEMA.from_model(torch.nn.Linear(2, 2), run_dir, device="auto"), torch.nn.Linear(2, 2), 3)


def test_directory_with_a_run_is_not_overwritten(run_dir: Path) -> None:
    model = torch.nn.Linear(2, 2)
    ema = PostHocEMA.from_model(model, run_dir, update_every=1, checkpoint_every=1, update_after_step=0)
    ema.update_(model)
    ema.flush()
    with pytest.raises(ValueError, match="already contains checkpoints"):
        PostHocEMA.from_model(model, run_dir)
    with pytest.raises(RuntimeError, match=r"this process is writing this run already: close .*`close\(\)`"):
        PostHocEMA.from_model(model, run_dir, resume=True)
    ema.close()
    with pytest.raises(RuntimeError, match="the run was closed"):
        ema.update_(model)
    again = PostHocEMA.from_model(model, run_dir, update_every=1, checkpoint_every=1, update_after_step=0, resume=True)
    assert again.step == 1
    with pytest.raises(ValueError, match="the run has sigma_rel 0.05, sigma_rel 0.28, but sigma_rel 0.1"):
        again.close()
        PostHocEMA.from_model(model, run_dir, sigma_rels=(0.1,), resume=True)


def test_old_checkpoints_are_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "0.1000.pt")
    for act in (
        lambda: PostHocEMA.from_model(torch.nn.Linear(2, 2), tmp_path),
        lambda: PostHocEMA.from_path(tmp_path),
    ):
        with pytest.raises(ValueError, match="import_run"):
            act()
    with pytest.raises(ValueError, match="already contains checkpoints"):
        PostHocEMA.from_model(torch.nn.Linear(2, 2), tmp_path)


def test_with_block_finishes_the_run(run_dir: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with PostHocEMA.from_model(model, run_dir, update_every=1, update_after_step=0) as ema:
        train(ema, model, 7)
    assert {path.name for path in run_dir.glob("*.7.safetensors")} == {"0.7.safetensors", "1.7.safetensors"}
    with pytest.raises(ZeroDivisionError):
        with PostHocEMA.from_model(model, run_dir.parent / "other", update_every=1, update_after_step=0) as ema:
            train(ema, model, 7)
            raise ZeroDivisionError
    # A block that fails stores no snapshot, but what a resume needs.
    assert [path.name for path in (run_dir.parent / "other").glob("*.safetensors")] == ["state.safetensors"]


def test_rank_zero_only_switches_other_ranks_off(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    monkeypatch.setenv("RANK", "3")
    off = PostHocEMA.from_model(model, run_dir, rank_zero_only=True)
    train(off, model, 200)
    off.save()
    off.finish()
    assert off.step == 200 and not run_dir.exists()
    for act in (lambda: off.synthesize([0.1]), lambda: off.switch_(model, 0.1)):
        with pytest.raises(RuntimeError, match="rank 0"):
            act()
    monkeypatch.setenv("RANK", "0")
    on = PostHocEMA.from_model(model, run_dir, rank_zero_only=True)
    train(on, model, 200)
    assert on.synthesize([0.1])


def test_directory_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot create .*/file/ema"):
        PostHocEMA.from_model(torch.nn.Linear(2, 2), tmp_path / "file" / "ema")


def test_checkpoint_dtype_is_that_of_files_only(run_dir: Path) -> None:
    from safetensors.torch import load_file

    model = torch.nn.Linear(2, 2)
    ema = PostHocEMA.from_model(
        model, run_dir, checkpoint_dtype=torch.bfloat16, update_every=1, update_after_step=0, checkpoint_every=5
    )
    train(ema, model, 5)
    assert load_file(run_dir / "0.5.safetensors")["weight"].dtype == torch.bfloat16
    # A synthesis has the dtype of the model.
    with PostHocEMA.from_path(run_dir).state_dict(0.05) as state_dict:
        assert state_dict["weight"].dtype == torch.float32


def test_plans_before_a_training_equal_those_after_it(run_dir: Path) -> None:
    model = torch.nn.Linear(2, 2)
    schedule = {"update_every": 7, "update_after_step": 30, "checkpoint_every": 50, "max_checkpoints": 4}
    ema = PostHocEMA.from_model(model, run_dir, sigma_rels=(0.06, 0.2), **schedule)
    train(ema, model, 400)
    ema.finish()
    before = plan([0.1, Profile.uniform(100)], steps=400, sigma_rels=(0.06, 0.2), **schedule)
    after = PostHocEMA.from_path(run_dir).plan([0.1, Profile.uniform(100)])
    assert [p.weights for p in before] == [p.weights for p in after]
    assert isinstance(before[0], Plan) and before[0].at == 400
    assert sum(w.weight for w in before[0].weights) == pytest.approx(1)


def test_profiles_round_trip_through_their_description() -> None:
    for profile in (
        Profile.sigma_rel(0.1),
        Profile.gamma(3),
        Profile.beta(0.999),
        Profile.half_life(100),
        Profile.uniform(500),
        Profile.linear(fraction=0.2),
        Profile.lr_decay("1-sqrt", 500),
        Profile.table([(0.0, 0.0), (0.5, 0.25), (1.0, 1.0)]),
    ):
        assert Profile(profile.to_dict()) == profile
        assert len({profile, Profile(profile.to_dict())}) == 1
        shares = profile.cumulative([0, 500, 1000], 1000)
        assert shares[0] <= shares[1] <= shares[2] == 1
        assert repr(profile) == f"<Profile {profile}>"
    assert Profile.sigma_rel(0.1).as_sigma_rel == pytest.approx(0.1)
    assert Profile.beta(0.9).as_sigma_rel is None
    for wrong, expected in [
        (lambda: Profile.uniform(), "either in steps or as a fraction"),
        (lambda: Profile.lr_decay("square", 5), "unknown variant `square`"),
        (lambda: Profile.uniform(-1), "window"),
        (lambda: Profile({"kind": "power"}), "missing field `gamma`"),
    ]:
        with pytest.raises(ValueError, match=expected):
            wrong()


@pytest.mark.parametrize(
    ("retention", "kept"),
    [("latest", [26, 28, 30]), ([4, 9], [4, 10, 30]), ((0.05, 0.28), None), (None, None)],
)
def test_retention_selects_the_snapshots(run_dir: Path, retention: Any, kept: list[int] | None) -> None:
    model = torch.nn.Linear(2, 2)
    options = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 2, "max_checkpoints": 3}
    ema = PostHocEMA.from_model(model, run_dir, retention=retention, **options)
    train(ema, model, 30)
    steps = sorted({int(path.name.split(".")[1]) for path in run_dir.glob("*.*.safetensors")})
    if kept is None:
        assert len(steps) == 3 and steps[0] < 20 and steps[2] == 30, steps
        kept = sorted({weight.step for weight in plan([0.1], steps=30, **options)[0].weights})
    assert steps == kept


def test_step_without_update_takes_under_two_microseconds(run_dir: Path) -> None:
    model = torch.nn.Linear(2, 2)
    ema = PostHocEMA.from_model(model, run_dir, update_every=10**9, checkpoint_every=10**9)

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            ema.update_(model)
        return (time.perf_counter() - start) / calls

    # The fastest of many: other programs can only slow it down.
    assert min(seconds(1000) for _ in range(100)) < 2e-6


def test_update_of_many_small_tensors_costs_little_more_than_listing_them(run_dir: Path) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(500)])
    options = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 10**9, "snapshot_growth": None}
    ema = PostHocEMA.from_model(model, run_dir, **options)

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def list_all() -> object:
        return [(name, p.data_ptr(), p.dtype, p.shape) for name, p in model.named_parameters()]

    # Both are timed in turns: their ratio does not depend on the machine's speed.
    turns = [(seconds(lambda: ema.update_(model)), seconds(list_all)) for _ in range(100)]
    assert min(update for update, _ in turns) < 1.5 * min(listing for _, listing in turns)


def test_progress_is_reported_and_its_errors_are_raised(run_dir: Path) -> None:
    model = torch.nn.Linear(300, 300)
    ema = PostHocEMA.from_model(model, run_dir, update_every=1, update_after_step=0, checkpoint_every=5)
    train(ema, model, 20)
    run, reported = PostHocEMA.from_path(run_dir), []
    run.synthesize([0.1, 0.2], progress=lambda done, total: reported.append((done, total)))
    assert reported[-1][0] == reported[-1][1] > 0
    ema.synthesize([0.1], progress=lambda done, total: reported.append((done, total)))
    assert reported[-1][0] > 0 and reported[-1][1] is None

    def fail(done: int, total: int | None) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.synthesize([0.1], progress=fail)
    with pytest.raises(ZeroDivisionError):
        run.write([0.1], run_dir.parent / "out", progress=fail)


def test_bar_is_drawn_only_on_request(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(3, 3)
    ema = PostHocEMA.from_model(model, run_dir, update_every=1, update_after_step=0, checkpoint_every=5)
    train(ema, model, 20)
    run = PostHocEMA.from_path(run_dir)
    run.synthesize([0.1])
    run.synthesize([0.1], progress=False)
    assert capsys.readouterr().err == ""
    run.synthesize([0.1], progress=True)
    assert "synthesizing" in capsys.readouterr().err


def test_files_equal_synthesized_averages(run_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    ema = PostHocEMA.from_model(model, run_dir, update_every=1, update_after_step=0, checkpoint_every=5)
    train(ema, model, 20)
    run = PostHocEMA.from_path(run_dir)
    paths = run.write([0.1, Profile.uniform(fraction=0.5)], tmp_path / "out")
    assert [path.name for path in paths] == [
        "sigma_rel-0.1.step-20.safetensors",
        "uniform-50%.step-20.safetensors",
    ]
    for path, average in zip(paths, run.synthesize([0.1, Profile.uniform(fraction=0.5)])):
        stored = load_file(path)
        assert set(stored) == set(average) == set(model.state_dict())
        assert all(torch.equal(stored[name], tensor) for name, tensor in average.items())
    half = run.synthesize([0.1], dtype=torch.float16)[0]
    assert half["0.weight"].dtype == torch.float16 and half["1.num_batches_tracked"].dtype == torch.int64
    with pytest.raises(ValueError, match="a run's directory holds nothing but its snapshots"):
        run.write([0.1], run_dir)


def test_damaged_files_are_refused(run_dir: Path) -> None:
    model = torch.nn.Linear(30, 30)
    ema = PostHocEMA.from_model(model, run_dir, update_every=1, update_after_step=0, checkpoint_every=5)
    train(ema, model, 10)
    ema.close()
    run = PostHocEMA.from_path(run_dir)
    run.verify()
    path = run_dir / "1.5.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="1.5.safetensors: .*checksum"):
        run.verify()
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="1.5.safetensors.*damaged or incomplete"):
        run.synthesize([0.1])


def test_run_opened_by_path_is_read_only(run_dir: Path) -> None:
    model = torch.nn.Linear(3, 3)
    ema = PostHocEMA.from_model(model, run_dir, update_every=1, update_after_step=0, checkpoint_every=5)
    train(ema, model, 23)
    run = PostHocEMA.from_path(run_dir, sigma_rels=(0.05, 0.28))
    assert run.step == 20 and run.sigma_rels == pytest.approx((0.05, 0.28)) and run.ema_models is None
    assert "0.05" in repr(run)
    with pytest.raises(RuntimeError, match="opened to synthesize from.*resume=True"):
        run.update_(model)
    with pytest.raises(ValueError, match="tracked sigma_rel 0.05, sigma_rel 0.28, not sigma_rels"):
        PostHocEMA.from_path(run_dir, sigma_rels=(0.1, 0.2))
    with pytest.raises(FileNotFoundError, match="no run here"):
        PostHocEMA.from_path(run_dir / "nowhere")
    average = PostHocEMA.from_path(run_dir, model).ema_models[1].ema_model
    with run.state_dict(0.28) as state_dict:
        assert torch.allclose(average.weight, state_dict["weight"], rtol=0, atol=1e-7)
    with pytest.raises(TypeError, match="from_model or PostHocEMA.from_path"):
        PostHocEMA()


def test_tracked_averages_are_stable_modules(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    ema = PostHocEMA.from_model(model, run_dir, update_after_step=50)
    first = ema.ema_models[0].ema_model
    begin = first[0].weight.detach().clone()
    assert torch.equal(begin, model[0].weight)
    train(ema, model, 49)
    assert ema.ema_models[0].ema_model is first and torch.equal(first[0].weight, begin)
    train(ema, model, 1)
    assert ema.ema_models[0].ema_model is first and torch.equal(first[0].weight, model[0].weight)
    assert [average.profile for average in ema.ema_models] == ema.profiles


def test_average_in_memory_is_exact_and_resumes() -> None:
    import numpy as np
    from conftest import exact

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    ema = KarrasEMA(model, sigma_rel=0.15, update_every=4, ignore_startswith_names={"1."})
    start, seen, halfway = model[1].weight.detach().clone(), [], None
    for call in range(1, 102):
        shake(model)
        ema.update()
        if call % 4 == 1:
            seen.append(model[0].weight.detach().double().numpy().copy())
        if call == 50:
            halfway = ema.state_dict()
    right = exact(Profile.sigma_rel(0.15), np.arange(1, 102, 4), np.stack(seen))
    assert np.allclose(ema.ema_model[0].weight.detach().double().numpy(), right, rtol=0, atol=1e-6)
    assert torch.equal(ema.ema_model[1].weight, start)
    assert ema.step == 101 and ema(torch.zeros(2, 3)).shape == (2, 3)
    # Another object continues from the state in the middle and arrives at the same average.
    assert halfway is not None and halfway["step"].item() == 50 and halfway["initted"].item()
    other = KarrasEMA(model, gamma=ema.gamma, update_every=4, ignore_startswith_names={"1."})
    other.load_state_dict(halfway)
    weights = iter(seen[13:])
    for call in range(51, 102):
        if call % 4 == 1:
            model[0].weight.data.copy_(torch.from_numpy(next(weights)))
        other.update()
    assert np.allclose(other.ema_model[0].weight.detach().double().numpy(), right, rtol=0, atol=1e-6)
    for wrong in ({}, {"sigma_rel": 0.1, "gamma": 2.0}):
        with pytest.raises(ValueError, match="either sigma_rel or gamma"):
            KarrasEMA(model, **wrong)


def test_frozen_average_keeps_its_values() -> None:
    model = torch.nn.Linear(3, 3)
    ema = KarrasEMA(model, sigma_rel=0.1, update_every=1, frozen=True)
    ema.update()
    before = ema.ema_model.weight.detach().clone()
    shake(model)
    ema.update()
    assert torch.equal(ema.ema_model.weight, before)
