"""Averages that several processes get together, with real process groups of gloo."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import bits, train
from process_group import OPTIONS, SIZE, Group, Net, begin, enter, equal, outcome, states

import posthoc_ema._broadcast
from posthoc_ema import PostHocEMA, Profile

# Averages in models.


def _evaluate(rank: int, run_dir: str, piece: int) -> Any:
    posthoc_ema._broadcast.PIECE, before = piece, posthoc_ema._broadcast.PIECE
    model, ema = begin(rank, run_dir)
    own = bits(model)
    inside = [enter(ema, model, 0.28), enter(ema, model, Profile.sigma_rel(0.1), step=10)]
    posthoc_ema._broadcast.PIECE = before
    restored = bits(model) == own and all(part.training for part in model.modules())
    with ema.model(model, 0.28), torch.no_grad():
        scores = model.module(torch.ones(2, 2, 5, 5)).tolist()
    alone = enter(ema.local, model, 0.28) if rank == 0 else inside[0]
    ema.close()
    return {"inside": inside, "restored": restored, "scores": scores, "alone": alone == inside[0]}, own


@pytest.mark.parametrize("piece", [64 << 20, 7])
def test_all_ranks_evaluate_the_same_bits(group: Group, tmp_path: Path, piece: int) -> None:
    results = group(_evaluate, str(tmp_path / "ema"), piece)
    shared = equal([result[0] for result in results])
    assert shared["restored"] and shared["alone"]
    assert shared["inside"][0] != shared["inside"][1]
    assert results[0][1]["module.norm.running_mean"] != results[1][1]["module.norm.running_mean"]


def _raise_inside(rank: int, run_dir: str) -> Any:
    model, ema = begin(rank, run_dir)
    own = bits(model)

    def body() -> None:
        with ema.model(model, 0.28):
            model.half()
            if rank == 1:
                raise ZeroDivisionError("of the evaluation")

    error = outcome(body)
    again = enter(ema, model, 0.28)
    ema.close()
    return error, bits(model) == own, again


def test_exception_in_the_block_of_one_rank_stays_there(group: Group, tmp_path: Path) -> None:
    results = group(_raise_inside, str(tmp_path / "ema"))
    assert [result[0] for result in results] == ["", "ZeroDivisionError: of the evaluation", ""]
    assert equal([result[1:] for result in results])[0]


def _switch(rank: int, run_dir: str) -> Any:
    model, ema = begin(rank, run_dir, copy=["norm.*"])
    own = bits(model)
    inside = enter(ema, model, 0.28)
    returned = ema.switch_(model, 0.28) is model
    now = bits(model)
    ema.close()
    averaged = {name for name in now if ".norm." not in name}
    copied = now.keys() - averaged
    return (
        {name: now[name] for name in averaged} == {name: inside[name] for name in averaged} and returned,
        {name: now[name] for name in copied} == {name: own[name] for name in copied},
        {name: now[name] for name in averaged},
    )


def test_switch_replaces_the_weights_of_all_ranks(group: Group, tmp_path: Path) -> None:
    is_average, is_kept, _ = equal(group(_switch, str(tmp_path / "ema")))
    assert is_average and is_kept


def _spectral(rank: int, run_dir: str) -> Any:
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 3)))
    )
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(12):
        torch.manual_seed(SIZE * step + rank)
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        ema.update_(model)
    inside = enter(ema, model, 0.28)
    ema.switch_(model, 0.28)
    ema.close()
    return inside, bits(model)


def test_spectral_norms_are_the_same_on_all_ranks(group: Group, tmp_path: Path) -> None:
    equal(group(_spectral, str(tmp_path / "ema")))


def _update_inside(rank: int, run_dir: str) -> list[str]:
    model, ema = begin(rank, run_dir)
    with ema.model(model, 0.28):
        inside = outcome(lambda: ema.update_(model))
    after = outcome(lambda: ema.update_(model))
    ema.close()
    return [inside, after]


def test_update_inside_the_block_is_refused_on_all_ranks(group: Group, tmp_path: Path) -> None:
    for inside, after in group(_update_inside, str(tmp_path / "ema")):
        assert "the model holds an average at the moment" in inside and after == ""


# New tensors.


def _synthesize(rank: int, run_dir: str) -> Any:
    model, ema = begin(rank, run_dir)
    made = ema.synthesize([0.05, 0.28]) + ema.synthesize([0.1], 10, dtype=torch.float64)
    if rank == 0:
        alone = ema.local.synthesize([0.05, 0.28]) + ema.local.synthesize([0.1], 10, dtype=torch.float64)
        assert states(alone) == states(made)
        assert [t.dtype for t in alone[2].values()] == [t.dtype for t in made[2].values()]
    with ema.state_dict(0.28) as state_dict:
        fresh = torch.nn.parallel.DistributedDataParallel(Net())
        fresh.load_state_dict(state_dict)
        assert list(model.state_dict()) == list(state_dict)
    with ema.model(model, 0.28):
        assert bits(model) == bits(fresh)
    tied = all(each["module.head.weight"] is each["module.tied.weight"] for each in made)
    ema.close()
    return [list(each) for each in made], states(made), tied, str(made[0]["module.short"].dtype)


def test_all_ranks_get_the_same_state_dicts(group: Group, tmp_path: Path) -> None:
    _, _, tied, dtype = equal(group(_synthesize, str(tmp_path / "ema")))
    assert tied and dtype == "torch.bfloat16"


def _synthesize_arrays(rank: int, run_dir: str) -> Any:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array([rank])}
    ema = PostHocEMA.from_model(arrays, run_dir, **OPTIONS)
    for _ in range(3):
        arrays["a"] += 1
        ema.update_(arrays)
    made = ema.synthesize([0.28])
    with ema.model(arrays, 0.28):
        inside = {name: array.copy().tolist() for name, array in arrays.items()}
    own = arrays["count"].tolist()
    ema.close()
    return type(made[0]["a"]).__name__, {name: array.tolist() for name, array in made[0].items()} == inside, inside, own


def test_mappings_of_arrays_are_shared_too(group: Group, tmp_path: Path) -> None:
    results = group(_synthesize_arrays, str(tmp_path / "ema"))
    kind, same, inside = equal([result[:3] for result in results])
    assert kind == "ndarray" and same and inside["count"] == [0]
    assert [result[3] for result in results] == [[0], [1], [2]]


# Opening, counting and closing.


def _open_existing(rank: int, run_dir: str) -> list[Any]:
    model, ema = begin(rank, run_dir)
    ema.save()
    step = ema.step
    ema.close()
    dist.barrier()
    # Only rank 0 sees the directory, as without a shared file system.
    own = run_dir if rank == 0 else f"{run_dir}-of-{rank}"
    refused = outcome(lambda: PostHocEMA.from_model(model, own, **OPTIONS))
    resumed = PostHocEMA.from_model(model, own, resume=True, rank_zero_only=True)
    inside = enter(resumed, model, 0.28)
    profiles = list(map(str, resumed.profiles))
    resumed.update_(model)
    resumed.save(f"{own}.state")
    resumed.close()
    again = PostHocEMA.from_model(model, own, resume=f"{own}.state", rank_zero_only=True)
    again.close()
    return [refused, step, resumed.step, inside, profiles, again.step]


def _main_process_only(rank: int, run_dir: str) -> Any:
    if rank == 0:
        model = torch.nn.Linear(2, 2)
        ema = PostHocEMA.from_model(model, f"{run_dir}-main", **OPTIONS)
        train(ema, model, 12)
        with ema.local.model(model, 0.28):
            pass
        ema.close()
    dist.barrier()
    return True


def test_run_of_the_main_process_waits_for_no_other(tmp_path: Path) -> None:
    group = Group()
    try:
        assert group(_main_process_only, str(tmp_path / "ema")) == [True] * SIZE
    finally:
        group.close()


def _properties(rank: int, run_dir: str) -> Any:
    model = torch.nn.Linear(2, 2)
    schedule = {"update_every": 4, "update_after_step": 7, "checkpoint_every": 10, "rank_zero_only": True}
    seen = []
    for stop in (23, 47):
        options = schedule if stop == 23 else {"rank_zero_only": True}
        ema = PostHocEMA.from_model(model, run_dir if rank == 0 else f"{run_dir}-{rank}", resume=True, **options)
        while ema.step < stop:
            seen.append((ema.step, ema.due, ema.has_average, ema.last_update))
            ema.update_(model)
        ema.save()
        ema.close()
    return seen


def test_all_ranks_know_of_each_update(group: Group, tmp_path: Path) -> None:
    seen = equal(group(_properties, str(tmp_path / "ema")))
    assert [step for step, due, _, _ in seen if due] == [7, 9, 11, 15, 19, 23, 27, 29, 31, 35, 39, 43]
    assert [has for _, _, has, _ in seen] == [False] * 8 + [True] * 39
    assert seen[-1] == (46, False, True, 44)


def _left_out(rank: int, run_dir: str) -> Any:
    """Trains runs whose first updates are left out, and asks them in another order on each rank, or at the end."""
    model = torch.nn.Linear(2, 2)
    options = {"update_every": 2, "update_after_step": 0, "checkpoint_every": 7, "rank_zero_only": True}
    runs = [
        PostHocEMA.from_model(model, f"{run_dir}-{name}", on_nonfinite=name, **options) for name in ("skip", "raise")
    ]
    late = PostHocEMA.from_model(model, f"{run_dir}-late", on_nonfinite="skip", **options)
    seen, raised = [], []
    for step in range(1, 12):
        model.weight.data.fill_(float("nan") if step in (2, 4, 6, 10) else 1.0)
        if step > 1:
            late.update_at_(10 * step, model)
        for ema in runs if step % 2 else reversed(runs):
            try:
                ema.update_(model)
            except RuntimeError:
                raised.append(step)
        order = runs if rank == 1 else list(reversed(runs))
        has = {id(ema): ema.has_average for ema in order}
        seen.append([(step, has[id(ema)], ema.last_update) for ema in runs])
    is_late = late.has_average
    is_noted = all(ema._first_update is None for ema in (*runs, late))
    averages = [states(ema.synthesize([0.28])) for ema in (*runs, late)]
    for ema in (*runs, late):
        ema.close()
    return (seen[:9], is_late, is_noted, averages), raised


def test_all_ranks_know_of_first_updates_that_were_left_out(group: Group, tmp_path: Path) -> None:
    results = group(_left_out, str(tmp_path / "ema"))
    seen, is_late, is_noted, _ = equal([result[0] for result in results])
    assert is_late and is_noted
    expected = [(step, step >= 7, None if step < 7 else max(7, step // 2 * 2)) for step in range(1, 10)]
    assert seen == [[row, row] for row in expected]
    assert [raised for _, raised in results] == [[2, 4, 6, 10]] + [[]] * (SIZE - 1)


def test_ranks_without_a_shared_directory_resume_from_the_step_of_rank_0(group: Group, tmp_path: Path) -> None:
    results = group(_open_existing, str(tmp_path / "ema"))
    assert all("already contains checkpoints" in result[0] for result in results)
    step, resumed, _, profiles, again = equal([result[1:] for result in results])
    assert step == 12 and resumed == again == 13 and len(profiles) == 2


def _sweep(rank: int, run_dir: str) -> Any:
    model, ema = begin(rank, run_dir)
    error = outcome(
        lambda: ema.sweep(
            lambda averaged: averaged.short.sum().item(), [0.1, 0.2], model=model.module, refine=0, progress=False
        )
    )
    again = enter(ema, model, 0.28)
    ema.close()
    return error, again


def test_sweep_runs_on_rank_0_alone(group: Group, tmp_path: Path) -> None:
    results = group(_sweep, str(tmp_path / "ema"))
    assert results[0][0] == "" and all("does not track (rank_zero_only)" in result[0] for result in results[1:])
    equal([result[1] for result in results])


def _two_runs(rank: int, run_dir: str) -> Any:
    model, first = begin(rank, run_dir)
    second = PostHocEMA.from_model(model, f"{run_dir}-2", **OPTIONS)
    train(second, model.module, 3)
    made = [states(ema.synthesize([0.28])) for ema in (first, second, first)]
    first.close()
    second.close()
    return made


def test_several_runs_share_the_group(group: Group, tmp_path: Path) -> None:
    first, second, again = equal(group(_two_runs, str(tmp_path / "ema")))
    assert first == again != second


# Without a process group.


@pytest.mark.parametrize(
    ("config", "is_on_cuda", "kind"),
    [
        ("cpu:gloo,cuda:gloo", True, "cpu"),
        ("cuda:nccl", False, "cuda"),
        ("cuda:nccl", True, "cuda"),
        ("cpu:gloo,cuda:nccl", False, "cpu"),
        ("cpu:gloo,cuda:nccl", True, "cuda"),
        ("xpu:xccl", False, "xpu"),
    ],
)
def test_device_of_the_transfer_fits_the_backend(
    monkeypatch: pytest.MonkeyPatch, config: str, is_on_cuda: bool, kind: str
) -> None:
    group = types.SimpleNamespace(get_backend_config=lambda: config)
    monkeypatch.setattr(posthoc_ema._broadcast, "distributed", lambda: group)
    assert posthoc_ema._broadcast.transfer_device(is_on_cuda) == kind


def test_calls_before_the_process_group_say_so(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 3)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    monkeypatch.setenv("RANK", "1")
    other = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 12)
    for each in (ema, other):
        with pytest.raises(RuntimeError, match="call torch.distributed.init_process_group before it"):
            enter(each, model, 0.1)
        with pytest.raises(RuntimeError, match="synthesize.*call torch.distributed.init_process_group before it"):
            each.synthesize([0.1])
        with pytest.raises(RuntimeError, match="switch_.*call torch.distributed.init_process_group before it"):
            each.switch_(model, 0.1)
    assert enter(ema.local, model, 0.1)
    with pytest.raises(RuntimeError, match="this process does not track"):
        other.local  # noqa: B018


def test_single_process_needs_no_group(run_dir: Path) -> None:
    model = torch.nn.Linear(3, 3)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 12)
    assert enter(ema, model, 0.1) == enter(ema.local, model, 0.1)
    assert ema.switch_(model, 0.1) is model
