"""Updates by hooks of an optimizer: real steps count, once each."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EACH_STEP, RecordedWeights, shake

from posthoc_ema import PostHocEMA


def loss(model: torch.nn.Module) -> torch.Tensor:
    """Returns a loss of a batch."""
    return model(torch.randn(4, 3)).square().mean()


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


def test_accumulation_counts_optimizer_steps(run_dir: Path, model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema, recorded = PostHocEMA.from_model(model, run_dir, **EACH_STEP), RecordedWeights(model)
    ema.attach(optimizer, model)
    for batch in range(1, 41):
        (loss(model) / 4).backward()
        if batch % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
            recorded.add()
    assert len(recorded.seen) == 10
    recorded.check(ema)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(run_dir: Path, model: torch.nn.Module, fused: bool) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
    # A fused optimizer is called and looks for infinities itself; others are not called.
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ema, recorded = PostHocEMA.from_model(model, run_dir, **EACH_STEP), RecordedWeights(model)
    ema.attach(optimizer, model)
    for batch in range(12):
        scaler.scale(loss(model)).backward()
        before = model.weight.detach().clone()
        if batch % 3 == 0:
            model.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not torch.equal(before, model.weight):
            recorded.add()
    assert len(recorded.seen) == 8
    recorded.check(ema)


def test_skipped_steps_of_an_optimizer_that_takes_the_scaler(run_dir: Path, model: torch.nn.Module) -> None:
    class Scaled(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:
            grad_scaler.unscale_(self)
            if not any(found.item() for found in grad_scaler._found_inf_per_device(self).values()):
                super().step()

    optimizer = Scaled(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ema, recorded = PostHocEMA.from_model(model, run_dir, **EACH_STEP), RecordedWeights(model)
    ema.attach(optimizer, model)
    for batch in range(6):
        scaler.scale(loss(model)).backward()
        if batch == 2:
            model.weight.grad[0, 0] = torch.inf
        with pytest.warns(FutureWarning, match="stop passing itself"):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if batch != 2:
            recorded.add()
    recorded.check(ema)


def test_several_closures_of_a_step_count_once(run_dir: Path, model: torch.nn.Module) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    ema, recorded, closures = PostHocEMA.from_model(model, run_dir, **EACH_STEP), RecordedWeights(model), 0
    ema.attach(optimizer, model)

    def closure() -> torch.Tensor:
        nonlocal closures
        closures += 1
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
        recorded.add()
    assert closures > 10
    recorded.check(ema)


def test_a_step_that_calls_its_parents_step_counts_once(run_dir: Path, model: torch.nn.Module) -> None:
    class Clipped(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.param_groups[0]["params"][0].data.clamp_(-0.2, 0.2)

    # The first instance of each class makes its step call hooks.
    torch.optim.SGD([torch.zeros(1)])
    optimizer = Clipped(model.parameters(), lr=0.1)
    calls: list[object] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    ema, recorded = PostHocEMA.from_model(model, run_dir, **EACH_STEP), RecordedWeights(model)
    ema.attach(optimizer, model)
    for _ in range(5):
        loss(model).backward()
        optimizer.step()
        recorded.add()
    assert len(calls) == 10
    recorded.check(ema)


def test_only_the_attached_optimizer_counts(run_dir: Path, model: torch.nn.Module) -> None:
    critic = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(critic.parameters(), lr=0.1)
    ema, recorded = PostHocEMA.from_model(model, run_dir, **EACH_STEP), RecordedWeights(model)
    with pytest.raises(ValueError, match="the SGD holds no parameter of the Linear"):
        ema.attach(other, model)
    ema.attach(optimizer, model)
    for step in range(10):
        (loss(model) + loss(critic)).backward()
        other.step()
        if step % 2:
            optimizer.step()
            recorded.add()
    recorded.check(ema)


def test_handle_and_block_end_the_updates(run_dir: Path, model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = PostHocEMA.from_model(model, run_dir, **EACH_STEP)
    handle = ema.attach(optimizer, model)
    loss(model).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"attached to an optimizer already \(SGD\)"):
        ema.attach(optimizer, model)
    handle.remove()
    handle.remove()
    optimizer.step()
    assert ema.step == 1
    with ema.attach(optimizer, model) as handle:
        optimizer.step()
        assert handle.is_active
    optimizer.step()
    assert ema.step == 2 and not handle.is_active


def test_update_besides_is_refused(run_dir: Path, model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = PostHocEMA.from_model(model, run_dir, **EACH_STEP)
    ema.attach(optimizer, model)
    loss(model).backward()
    optimizer.step()
    ema.update_(model)
    with pytest.raises(RuntimeError, match="at step 1, and something else has counted to step 2: do not call"):
        optimizer.step()


def test_errors_of_an_update_end_the_step(run_dir: Path, model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = PostHocEMA.from_model(model, run_dir, **EACH_STEP)
    ema.attach(optimizer, model)
    loss(model).backward()
    optimizer.step()
    with ema.model(model, 0.28), pytest.raises(RuntimeError, match="averages of averages"):
        optimizer.step()
    optimizer.step()
    assert ema.step == 2
    ema.close()
    with pytest.raises(RuntimeError, match="the run was closed"):
        optimizer.step()


def test_optimizers_without_hooks_are_refused(run_dir: Path, model: torch.nn.Module) -> None:
    class Lookahead(torch.optim.Optimizer):
        """Steps another optimizer, then changes the weights itself."""

        def __init__(self, base: torch.optim.Optimizer):
            self._base = base
            self.param_groups = base.param_groups

        def step(self, closure: Any = None) -> None:
            self._base.step(closure)

    ema = PostHocEMA.from_model(model, run_dir, **EACH_STEP)
    with pytest.raises(TypeError, match="Lookahead calls no hooks after its steps: call `update_`"):
        ema.attach(Lookahead(torch.optim.SGD(model.parameters(), lr=0.1)), model)


def test_hooks_keep_nothing_alive_after_the_optimizer(run_dir: Path, model: torch.nn.Module) -> None:
    module = copy.deepcopy(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    ema = PostHocEMA.from_model(module, run_dir, **EACH_STEP)
    handle = ema.attach(optimizer, module)
    # Copies of an optimizer have no hooks.
    assert not copy.deepcopy(optimizer)._optimizer_step_post_hooks
    alive = [weakref.ref(module), weakref.ref(ema)]
    del ema, module
    assert all(each() is not None for each in alive)
    del optimizer
    assert not handle.is_active and [each() for each in alive] == [None, None]
    # The lock is free again.
    PostHocEMA.from_model(model, run_dir.with_name("other"), **EACH_STEP)


def test_another_optimizer_may_follow_one_that_is_gone(run_dir: Path, model: torch.nn.Module) -> None:
    ema = PostHocEMA.from_model(model, run_dir, **EACH_STEP)
    for steps in (1, 2):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema.attach(optimizer, model)
        loss(model).backward()
        optimizer.step()
        assert ema.step == steps
        del optimizer


def test_compiled_models_are_attached(run_dir: Path, model: torch.nn.Module) -> None:
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    ema, recorded = PostHocEMA.from_model(compiled, run_dir, **EACH_STEP), RecordedWeights(model)
    ema.attach(optimizer, compiled)
    for _ in range(3):
        loss(compiled).backward()
        optimizer.step()
        recorded.add()
    recorded.check(ema, "_orig_mod.weight")


def test_compiled_steps_count(run_dir: Path, model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, recorded = PostHocEMA.from_model(model, run_dir, **EACH_STEP), RecordedWeights(model)
    ema.attach(optimizer, model)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        loss(model).backward()
        step()
        recorded.add()
    recorded.check(ema)


def test_a_training_loop_can_ask(run_dir: Path, model: torch.nn.Module) -> None:
    options = {"update_every": 3, "update_after_step": 4, "checkpoint_every": 6}
    ema, updates = PostHocEMA.from_model(model, run_dir, **options), []
    assert not ema.has_average and ema.last_update is None
    for step in range(1, 17):
        shake(model)
        due, before = ema.due, ema.last_update
        ema.update_(model)
        assert due == (ema.last_update != before), step
        assert ema.has_average == (ema.last_update is not None)
        if due:
            updates.append(step)
        assert ema.last_update == (updates[-1] if updates else None)
    assert updates == [6, 9, 12, 15]
    ema.save()
    ema.close()
    with pytest.raises(RuntimeError, match="the run was closed"):
        _ = ema.due
    # A closed run still has its stored snapshots.
    assert ema.last_update == PostHocEMA.from_path(run_dir).last_update == 12
    with pytest.raises(RuntimeError, match="was opened to synthesize from"):
        _ = PostHocEMA.from_path(run_dir).due
    with pytest.raises(RuntimeError, match="was opened to synthesize from"):
        PostHocEMA.from_path(run_dir).attach(torch.optim.SGD(model.parameters()), model)
    resumed = PostHocEMA.from_model(model, run_dir, resume=True)
    assert (resumed.step, resumed.last_update, resumed.has_average, resumed.due) == (16, 15, True, False)
    resumed.check_step(16)
    with pytest.raises(ValueError, match="are at step 16, and the training continues from step 20: resume both"):
        resumed.check_step(20)


def test_a_run_without_snapshots_has_no_average_once_closed(run_dir: Path, model: torch.nn.Module) -> None:
    ema = PostHocEMA.from_model(model, run_dir, **EACH_STEP)
    ema.close()
    assert ema.last_update is None and not ema.has_average


def test_ranks_that_do_not_track_count_by_hooks(
    run_dir: Path, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    ema = PostHocEMA.from_model(model, run_dir, rank_zero_only=True, **EACH_STEP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer, model)
    loss(model).backward()
    optimizer.step()
    assert ema.step == 1 and ema.due and ema.has_average and not run_dir.exists()
