"""Interrupts, forks, other defaults, and memory that other code changes or shares."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DlpackOnly, bits, train

from posthoc_ema import KarrasEMA, PostHocEMA, _lend
from posthoc_ema._model import plain_name

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 10}


def trained(model: object, run_dir: Path, steps: int = 15, **options: object) -> PostHocEMA:
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS, **options)
    train(ema, model, steps)
    return ema


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Enables interrupts, which a process that was started in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("strided", [False, True])
def test_interrupt_at_any_moment_restores_every_bit(run_dir: Path, strided: bool, interruptible: None) -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(200, 200) for _ in range(4)])
    if strided:
        for layer in model:
            layer.weight.data = torch.randn(200, 200).t()
    ema = trained(model, run_dir)
    before, main, hits = bits(model), threading.get_ident(), 0
    for attempt in range(40):
        delay = 0.0005 * attempt
        timer = threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            with ema.model(model, 0.1):
                pass
            timer.join()
            time.sleep(0.002)
        except KeyboardInterrupt:
            hits += 1
        timer.join()
        assert bits(model) == before, attempt
        assert model.training
    assert hits > 20
    train(ema, model, 1)


def test_interrupt_is_raised_after_the_model_is_restored(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 3)
    ema = trained(model, run_dir)
    before, presses = bits(model), iter([True, True, False])
    check = _lend.Lender._check_writable

    def pressed(lender: _lend.Lender) -> None:
        check(lender)
        if next(presses, False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with ema.model(model, 0.1):
            monkeypatch.setattr(_lend.Lender, "_check_writable", pressed)
    assert bits(model) == before


def test_tensors_that_cannot_be_written_are_refused_before_any_write(run_dir: Path) -> None:
    model = torch.nn.Linear(3, 3)
    model.register_buffer("wide", torch.zeros(1).expand(5))
    ema = trained(model, run_dir)
    before = bits(model)
    for act in (lambda: ema.switch_(model, 0.1), lambda: ema.model(model, 0.1).__enter__()):
        with pytest.raises(ValueError, match="`wide`: its elements share memory"):
            act()
        assert bits(model) == before and model.training
    ema.update_(model)


def test_gradients_structure_and_order_are_restored(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    ema = trained(model, run_dir)
    model(torch.randn(4, 3)).sum().backward()
    parts, names = list(model.modules()), list(model.state_dict())
    gradients = [parameter.grad for parameter in model.parameters()]
    values, before = [grad.clone() for grad in gradients], bits(model)
    with ema.model(model, 0.1):
        model.half()
        model.requires_grad_(False)
        model[2] = torch.nn.Identity()
        del model[0].weight
        model[1].register_buffer("extra", torch.zeros(1))
    assert [id(part) for part in model.modules()] == list(map(id, parts))
    assert list(model.state_dict()) == names and bits(model) == before
    for parameter, grad, value in zip(model.parameters(), gradients, values):
        assert parameter.requires_grad and parameter.dtype == torch.float32
        assert parameter.grad is grad and torch.equal(grad, value)


def test_backward_pass_through_weights_of_a_closed_block_fails(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    ema = trained(model, run_dir)
    inputs = torch.randn(4, 3, requires_grad=True)
    loss = model(inputs).sum()
    (expected,) = torch.autograd.grad(loss, inputs, retain_graph=True)
    with ema.model(model, 0.2):
        inner = model(inputs).sum()
        assert torch.isfinite(torch.autograd.grad(inner, inputs, retain_graph=True)[0]).all()
    assert torch.equal(torch.autograd.grad(loss, inputs)[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(inner, inputs)


def test_wrappers_are_in_eval_mode_in_a_block(run_dir: Path) -> None:
    model = torch.nn.DataParallel(torch.nn.Linear(3, 3))
    ema = trained(model, run_dir)
    with ema.model(model, 0.1) as averaged:
        assert not averaged.training and not averaged.module.training
    assert model.training and model.module.training


def test_parts_of_a_model_that_holds_an_average_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    whole = torch.nn.Sequential(model, torch.nn.Linear(1, 1))
    ema, outer = trained(model, tmp_path / "model"), trained(whole, tmp_path / "whole")
    part = trained(model[0], tmp_path / "part")
    loose = PostHocEMA.from_model(dict(model.named_parameters()), tmp_path / "loose", **OPTIONS)
    single = KarrasEMA(model, sigma_rel=0.1, update_every=1)
    single.update()
    with ema.model(model, 0.1):
        for act in (
            lambda: outer.update_(whole),
            lambda: part.update_(model[0]),
            lambda: loose.update_({name: p.detach() for name, p in model.named_parameters()}),
            lambda: outer.switch_(whole, 0.1),
            single.update,
        ):
            with pytest.raises(RuntimeError, match="averages of averages"):
                act()
    assert (outer.step, part.step, loose.step, single.step) == (15, 15, 0, 1)
    outer.update_(whole)
    single.update()


def test_models_without_a_common_element_are_independent(tmp_path: Path) -> None:
    # Tensors without elements have the same address, 0.
    first = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.zeros(3))])
    second = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.zeros(3))])
    one, other = trained(first, tmp_path / "first"), trained(second, tmp_path / "second")
    with one.model(first, 0.1):
        other.update_(second)
    assert other.step == 16


def test_default_device_of_pytorch_has_no_effect(run_dir: Path) -> None:
    model = torch.nn.Linear(3, 3)
    ema = trained(model, run_dir)
    with torch.device("meta"), ema.state_dict(0.1) as state_dict:
        assert state_dict["weight"].device.type == "cpu"


FORKED = """
    import os, sys, torch
    from posthoc_ema import PostHocEMA, _native
    model = torch.nn.Linear(3, 3)
    ema = PostHocEMA.from_model(model, sys.argv[1], update_every=1, update_after_step=0, checkpoint_every=5)
    for _ in range(10):
        ema.update_(model)
    ready, held = os.pipe(), os.pipe()
    if os.fork() == 0:
        for act in (lambda: ema.update_(model), lambda: PostHocEMA.from_path(sys.argv[1]).synthesize([0.1])):
            try:
                act()
                os._exit(1)
            except RuntimeError as error:
                assert "spawn" in str(error), error
        os.write(ready[1], b"x")
        os.read(held[0], 1)      # stays alive, as a worker that loads data does
        os._exit(0)
    assert os.read(ready[0], 1) == b"x"
    run = _native.Run(sys.argv[1])
    if os.fork() == 0:
        del run                  # its files would be unmapped by threads of the parent
        sys.exit(0)              # must not wait for anything
    ema.finish()
    ema.close()
    again = PostHocEMA.from_model(model, sys.argv[1], resume=True)
    assert again.step == 10
    os.write(held[1], b"x")
    assert os.wait()[1] == 0 and os.wait()[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_forked_process_is_refused_and_does_not_hold_the_lock(run_dir: Path) -> None:
    program = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKED), str(run_dir)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_parameters_that_share_memory_stay_tied(run_dir: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = torch.nn.Parameter(model["a"].weight.data)
    ema, single = PostHocEMA.from_model(model, run_dir, **OPTIONS), KarrasEMA(model, sigma_rel=0.05, update_every=1)
    for _ in range(12):
        with torch.no_grad():
            model["a"].weight.add_(torch.randn(3, 3))
        ema.update_(model)
        single.update()
    average = ema.ema_models[0].ema_model
    assert torch.equal(average["a"].weight, average["b"].weight)
    assert torch.equal(average["a"].weight, single.state_dict()["b.weight"])
    assert not torch.equal(average["a"].weight, model["a"].weight)


def test_tied_tensors_stay_tied_when_they_become_strided(run_dir: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    ema = trained(model, run_dir)
    model["a"].weight.data = torch.randn(3, 3).t()
    train(ema, model, 2)
    before = bits(model)
    with ema.model(model, 0.1):
        assert torch.equal(model["a"].weight, ema.synthesize([0.1])[0]["b.weight"])
    assert bits(model) == before


def test_arrays_of_the_other_byte_order_are_averaged(run_dir: Path) -> None:
    arrays = {"w": np.ones(4, dtype=">f4")}
    ema = PostHocEMA.from_model(arrays, run_dir, **OPTIONS)
    for _ in range(3):
        ema.update_(arrays)
    assert np.array_equal(ema.synthesize([0.1])[0]["w"], np.ones(4))
    with ema.model(arrays, 0.1):
        assert np.array_equal(arrays["w"], np.ones(4))


def test_tensors_from_dlpack_are_not_written(run_dir: Path) -> None:
    shared = {"w": DlpackOnly(np.ones(4, dtype=np.float32))}
    ema = PostHocEMA.from_model(shared, run_dir, **OPTIONS)
    ema.update_(shared)
    with pytest.raises(ValueError, match="`w`: it came by DLPack, which is only read"):
        ema.switch_(shared, 0.1)
    assert np.array_equal(shared["w"].array, np.ones(4))


def test_storages_that_were_made_smaller_are_refused(run_dir: Path) -> None:
    model = torch.nn.Linear(400, 400)
    model.weight.untyped_storage().resize_(64)
    with pytest.raises(ValueError, match="`weight`: it reaches beyond its storage"):
        PostHocEMA.from_model(model, run_dir)


def test_resume_keeps_options_that_are_not_given(run_dir: Path) -> None:
    model = torch.nn.Linear(3, 3)
    options = {"copy": ["bias"], "checkpoint_dtype": torch.bfloat16, "sigma_rels": (0.1, 0.2), "compensated": False}
    ema = PostHocEMA.from_model(model, run_dir, max_checkpoints=50, snapshot_growth=None, **OPTIONS, **options)
    train(ema, model, 300)
    ema.save()
    ema.close()
    again = PostHocEMA.from_model(model, run_dir, resume=True)
    train(again, model, 60)
    assert len(list(run_dir.glob("0.*.safetensors"))) == 36
    assert again.sigma_rels == pytest.approx((0.1, 0.2))


def test_other_ranks_count_from_the_step_of_the_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(3, 3)
    ema = trained(model, run_dir, 40)
    ema.save()
    ema.close()
    monkeypatch.setenv("RANK", "1")
    other = PostHocEMA.from_model(model, run_dir, resume=True, rank_zero_only=True)
    assert other.step == 40
    other.update_at_(1000, model)
    assert other.step == 1000


def test_closed_run_can_be_read(run_dir: Path) -> None:
    model = torch.nn.Linear(3, 3)
    with PostHocEMA.from_model(model, run_dir, **OPTIONS) as ema:
        train(ema, model, 17)
    assert ema.step == 17 and ema.plan([0.1])[0].at == 17
    with ema.model(model, 0.1), ema.state_dict(0.1) as state_dict:
        assert torch.equal(model.weight, state_dict["weight"])
    with pytest.raises(RuntimeError, match="the run was closed"):
        ema.update_(model)


def test_tensors_of_any_kind_can_be_left_out(run_dir: Path) -> None:
    model = torch.nn.Linear(3, 3)
    model.register_buffer("values", torch.eye(3).to_sparse())
    model.phase = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex128), requires_grad=False)
    ema = trained(model, run_dir, leave_out=["val*", "phase"])
    with ema.model(model, 0.1):
        assert model.values.is_sparse
    assert set(ema.synthesize([0.1])[0]) == {"weight", "bias"}
    with pytest.raises(ValueError, match="`nothing` matches no tensor"):
        PostHocEMA.from_model(model, run_dir.parent / "other", leave_out=["values", "phase", "nothing"])


def test_copied_tensors_keep_their_dtype(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    ema = trained(model, run_dir, copy=["1.running_*"])
    ema.finish()
    for source in (ema, PostHocEMA.from_path(run_dir)):
        half = source.synthesize([0.1], dtype=torch.float16)[0]
        assert half["0.weight"].dtype == torch.float16 and half["1.running_mean"].dtype == torch.float32


def test_names_similar_to_those_of_wrappers_are_kept() -> None:
    assert plain_name("my_orig_mod.weight") == "my_orig_mod.weight"
    assert plain_name("a._orig_mod.b._fsdp_wrapped_module.weight") == "a.b.weight"


def test_infinite_mask_is_refused_with_the_remedy(run_dir: Path) -> None:
    model = torch.nn.Linear(3, 3)
    model.mask = torch.nn.Parameter(torch.full((3,), -torch.inf))
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    with pytest.raises(RuntimeError, match="`mask`.*as in a mask, name the tensor among those to copy"):
        train(ema, model, 10)
    ema.close()
    ema = trained(model, run_dir.parent / "other", copy=["mask"])
    assert torch.equal(ema.synthesize([0.1])[0]["mask"], model.mask)


def test_warnings_of_the_library_reach_standard_error(run_dir: Path) -> None:
    program = f"""
        import torch
        from posthoc_ema import PostHocEMA
        model = torch.nn.Linear(3, 3)
        model.weight.data.fill_(1e6)
        ema = PostHocEMA.from_model(model, {str(run_dir)!r}, update_every=1, update_after_step=0, checkpoint_every=2,
                                    checkpoint_dtype=torch.float16)
        for _ in range(2):
            ema.update_(model)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert "WARN" in done.stderr and "weight" in done.stderr


def test_failed_start_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    model = torch.nn.Linear(3, 3)
    ema = KarrasEMA(model, sigma_rel=0.1, device="nowhere")
    with pytest.raises(ValueError, match="`nowhere` is not a device"):
        ema.update()
    assert ema.step == 0
    del ema
    assert not list(tmp_path.iterdir())
