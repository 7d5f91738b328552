"""Copies beside the training of a GPU: the training waits for them before the weights change, and at no other place.

On the stand-in driver, whose copies read their source as late as a device may: a weight that changes too early spoils
the average. Its clocks show for how long the stream of the training is held up.
"""

# ruff: noqa: F811
from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EACH_STEP
from test_cuda import REAL, ToDevice, to_device  # noqa: F401
from test_cuda import pytestmark as needs_cuda

import posthoc_ema
from posthoc_ema import PostHocEMA, _fence, _lend

pytestmark = [*needs_cuda, pytest.mark.skipif(REAL, reason="only the stand-in driver shows it")]

# Its weight is copied by itself: small tensors are gathered before.
SHAPE = (600, 500)


@pytest.fixture(autouse=True)
def late_copies() -> Iterator[None]:
    """Lets copies read their source as late as a device may."""
    from test_cuda import DRIVER

    DRIVER.standin_late_copies(1)
    yield
    DRIVER.standin_late_copies(0)


class Net(torch.nn.Module):
    """Two large weights, and a large buffer that changes in each pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Parameter(torch.randn(SHAPE))
        self.second = torch.nn.Parameter(torch.randn(SHAPE))
        self.register_buffer("seen", torch.zeros(SHAPE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return ((x * self.first).tanh() * self.second).square().mean()


class Pair:
    """Equal models on the host and on the device, which train alike."""

    def __init__(self, run: Path, to_device: ToDevice, **options: Any):
        options = {**EACH_STEP, "device_copy": False, **options}
        self.models = [Net(), to_device(Net())]
        self.emas = [PostHocEMA.from_model(m, run / str(i), **options) for i, m in enumerate(self.models)]

    @property
    def device(self) -> tuple[Net, PostHocEMA]:
        return self.models[1], self.emas[1]

    def optimizers(self, kind: Any = torch.optim.SGD, **options: Any) -> list[Any]:
        return [kind(model.parameters(), **{"lr": 0.5, **options}) for model in self.models]

    def backward(self, step: int) -> None:
        x = torch.full(SHAPE, 0.1 * step)
        for model in self.models:
            model.zero_grad()
            model(x).backward()

    def check(self) -> None:
        """Checks that the averages are the same."""
        for model, other in zip(self.models[0].state_dict().values(), self.models[1].state_dict().values()):
            assert torch.equal(model, other)
        right, got = (ema.synthesize([0.1])[0] for ema in self.emas)
        assert all(torch.equal(tensor, got[name]) for name, tensor in right.items())


def stalled(ema: PostHocEMA) -> int:
    """Returns the nanoseconds for which waits have held up the stream that trains."""
    from test_cuda import DRIVER

    DRIVER.standin_stalled.restype = ctypes.c_uint64
    return int(DRIVER.standin_stalled(ctypes.c_void_p(next(iter(ema._tracker.tensors.lender().streams.values())))))


def work(ema: PostHocEMA, nanoseconds: int) -> None:
    """Lets the stream that trains be busy."""
    from test_cuda import DRIVER

    stream = ctypes.c_void_p(next(iter(ema._tracker.tensors.lender().streams.values())))
    DRIVER.standin_work(stream, ctypes.c_uint64(nanoseconds))


BUS = 600 * 500 * 4 // 50
"""Nanoseconds that a weight takes on the bus of the stand-in."""


def stalls(ema: PostHocEMA, model: Net, optimizer: Any, busy: int) -> list[tuple[int, int]]:
    """Trains 5 steps, and returns the stalls before the optimizer's step and after it."""
    before_step: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: before_step.append(stalled(ema)))
    found = []
    for _ in range(5):
        model(torch.ones(SHAPE)).backward()
        work(ema, busy)
        begin = stalled(ema)
        optimizer.step()
        found.append((before_step[-1] - begin, stalled(ema) - before_step[-1]))
    return found


def test_training_waits_before_the_step_and_nowhere_else(tmp_path: Path, to_device: ToDevice) -> None:
    model = to_device(Net())
    ema = PostHocEMA.from_model(model, tmp_path / "ema", device_copy=False, leave_out=["seen"], **EACH_STEP)
    assert "at its fence" in ema.placement
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = ema.attach(optimizer, model)
    # The first update is waited for at once.
    assert stalls(ema, model, optimizer, 0) == [(0, 2 * BUS), (0, 0)] + 3 * [(2 * BUS, 0)]
    handle.remove()
    ema.attach(optimizer, model)
    assert stalls(ema, model, optimizer, 1_000_000) == 5 * [(0, 0)]
    ema.wait_for_copy()


def test_training_waits_for_a_copy_within_the_device_only(tmp_path: Path, to_device: ToDevice) -> None:
    model = to_device(Net())
    ema = PostHocEMA.from_model(model, tmp_path / "ema", leave_out=["seen"], **EACH_STEP)
    assert "for that alone" in ema.placement
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer, model)
    assert all(before == 0 and after < 2 * BUS / 20 for before, after in stalls(ema, model, optimizer, 1_000_000))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_attached_averages_have_the_bits_of_the_host(tmp_path: Path, to_device: ToDevice, kind: Any) -> None:
    pair = Pair(tmp_path, to_device)
    options = {"max_iter": 2} if kind is torch.optim.LBFGS else {}
    optimizers = pair.optimizers(kind, lr=0.1, **options)
    for ema, optimizer, model in zip(pair.emas, optimizers, pair.models):
        ema.attach(optimizer, model)
    for step in range(1, 7):
        for optimizer, model in zip(optimizers, pair.models):

            def closure(optimizer: Any = optimizer, model: Net = model, step: int = step) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(torch.full(SHAPE, 0.1 * step))
                loss.backward()
                return loss

            optimizer.step(closure)
    pair.check()


def test_compiled_steps_wait(tmp_path: Path, to_device: ToDevice) -> None:
    pair = Pair(tmp_path, to_device)
    optimizers = pair.optimizers()
    steps = [torch.compile(optimizer.step, backend="eager") for optimizer in optimizers]
    for ema, optimizer, model in zip(pair.emas, optimizers, pair.models):
        ema.attach(optimizer, model)
    for number in range(1, 5):
        pair.backward(number)
        for step in steps:
            step()
    assert [ema.step for ema in pair.emas] == [4, 4]
    pair.check()


def test_update_that_does_not_wait_needs_the_wait(tmp_path: Path, to_device: ToDevice) -> None:
    pair = Pair(tmp_path, to_device)
    for step in range(1, 5):
        for model, ema in zip(pair.models, pair.emas):
            with torch.no_grad():
                ema.wait_for_copy()
                model.first.add_(step)
                model.seen.add_(1)
            ema.update_(model, wait=False)
    pair.check()
    model, ema = pair.device
    ema.update_(model, wait=False)
    model.first.data.add_(1e6)
    assert not torch.equal(ema.synthesize([0.1])[0]["first"], pair.emas[0].synthesize([0.1])[0]["first"])
    ema.wait_for_copy()
    ema.update_(model, wait=False)
    with torch.no_grad():
        model.second.mul_(2)
    with pytest.raises(RuntimeError, match="tensor `second`: something but the optimizer has changed it.*go back"):
        ema.wait_for_copy()
    ema.wait_for_copy()


def test_any_optimizer_waits_for_an_update_that_did_not(tmp_path: Path, to_device: ToDevice) -> None:
    pair = Pair(tmp_path, to_device)
    optimizers = pair.optimizers()
    for step in range(1, 5):
        pair.backward(step)
        for model, ema, optimizer in zip(pair.models, pair.emas, optimizers):
            optimizer.step()
            ema.update_(model, wait=False)
    pair.check()


def test_weights_that_are_clipped_after_the_step_are_waited_for(tmp_path: Path, to_device: ToDevice) -> None:
    pair = Pair(tmp_path, to_device)
    optimizers = pair.optimizers()
    for ema, optimizer, model in zip(pair.emas, optimizers, pair.models):
        ema.attach(optimizer, model)

    def step(number: int) -> None:
        pair.backward(number)
        for optimizer, model in zip(optimizers, pair.models):
            optimizer.step()
            with torch.no_grad():
                model.second.clamp_(-0.1 * number, 0.1 * number)

    step(1)
    with pytest.warns(RuntimeWarning, match="tensor `second`: something but the optimizer changes the weights"):
        step(2)
    for number in range(3, 7):
        step(number)
    pair.check()


def test_loaded_weights_are_an_error_without_the_wait(tmp_path: Path, to_device: ToDevice) -> None:
    pair = Pair(tmp_path, to_device)
    optimizers = pair.optimizers()
    for ema, optimizer, model in zip(pair.emas, optimizers, pair.models):
        ema.attach(optimizer, model)
    kept = copy.deepcopy(pair.models[0].state_dict())

    def step(number: int) -> None:
        pair.backward(number)
        for optimizer in optimizers:
            optimizer.step()

    for number in range(1, 4):
        step(number)
    for model, ema in zip(pair.models, pair.emas):
        ema.wait_for_copy()
        model.load_state_dict(kept)
    step(4)
    pair.check()
    pair.models[1].load_state_dict(kept)
    with pytest.raises(RuntimeError, match="tensor `first`.*call `wait_for_copy` before"):
        step(5)


def test_parameters_of_other_optimizers_are_waited_for(tmp_path: Path, to_device: ToDevice) -> None:
    pair = Pair(tmp_path, to_device)
    firsts = [torch.optim.SGD([model.first], lr=0.5) for model in pair.models]
    seconds = [torch.optim.SGD([model.second], lr=0.5) for model in pair.models]
    shared = [torch.optim.SGD([model.first], lr=0.1) for model in pair.models]
    for ema, optimizer, model in zip(pair.emas, firsts, pair.models):
        ema.attach(optimizer, model)
    for number in range(1, 6):
        pair.backward(number)
        for optimizers in (firsts, seconds, shared):
            for optimizer in optimizers:
                optimizer.step()
    pair.check()


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_keep_the_bits(tmp_path: Path, to_device: ToDevice, fused: bool) -> None:
    pair = Pair(tmp_path, to_device)
    optimizers = pair.optimizers(torch.optim.Adam, fused=fused)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in optimizers]
    for ema, optimizer, model in zip(pair.emas, optimizers, pair.models):
        ema.attach(optimizer, model)
    for number in range(9):
        for scaler, optimizer, model in zip(scalers, optimizers, pair.models):
            optimizer.zero_grad()
            scaler.scale(model(torch.full(SHAPE, 0.1 * number + 0.1))).backward()
            if number % 3 == 1:
                model.first.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    assert [ema.step for ema in pair.emas] == [6, 6]
    pair.check()


def test_the_package_waits_before_it_changes_weights(tmp_path: Path, to_device: ToDevice) -> None:
    pair = Pair(tmp_path, to_device)
    run = tmp_path / "other"
    other = PostHocEMA.from_model(pair.models[0], run, **EACH_STEP)
    for _ in range(3):
        other.update_(pair.models[0])
    other.finish()
    reader = PostHocEMA.from_path(run)
    for model, ema in zip(pair.models, pair.emas):
        with torch.no_grad():
            model.first.mul_(1.5)
        ema.update_(model, wait=False)
        with reader.model(model, 0.1):
            pass
        ema.update_(model, wait=False)
        ema.switch_(model, 0.1)
    pair.check()


def test_freed_weights_stay_until_they_are_copied(tmp_path: Path, to_device: ToDevice) -> None:
    model = to_device(Net())
    ema = PostHocEMA.from_model(model, tmp_path / "ema", device_copy=False, **EACH_STEP)
    ema.update_(model, wait=False)
    storage = model.first.untyped_storage()
    assert any(kept.data_ptr() == storage.data_ptr() for kept in ema._tracker.fence._storages)
    ema.wait_for_copy()
    assert not ema._tracker.fence._storages and not _fence._pending


def test_accelerate_copies_beside_the_training(tmp_path: Path, to_device: ToDevice) -> None:
    accelerate = pytest.importorskip("accelerate")
    from posthoc_ema.integrations.accelerate import attach

    accelerator = accelerate.Accelerator(cpu=True)
    model = to_device(Net())
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ema = PostHocEMA.from_model(model, tmp_path / "ema", device_copy=False, leave_out=["seen"], **EACH_STEP)
    attach(accelerator, ema, prepared, optimizer)
    for _ in range(3):
        accelerator.backward(prepared(torch.ones(SHAPE)))
        work(ema, 1_000_000)
        before = stalled(ema)
        optimizer.step()
    assert stalled(ema) == before
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.load_state(str(tmp_path / "state"))
    optimizer.step()


class Strided(torch.nn.Module):
    """A weight in the order of `channels_last`, from one with the channels last."""

    def __init__(self, weight: torch.nn.Module):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.weight.data.permute(0, 3, 1, 2))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_strided_weights_keep_the_table_of_tensors(
    tmp_path: Path,
    to_device: ToDevice,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from test_cuda import DRIVER, in_device_memory

    DRIVER.standin_count.restype = ctypes.c_uint64
    # The memory of the copies is on the device, as that of the weight.
    in_place = staticmethod(lambda tensor: in_device_memory(torch.zeros(tensor.shape)))
    monkeypatch.setattr(_lend.Lender, "_new_buffer", in_place)
    runs, uploaded = {}, []
    for name in ("host", "device"):
        torch.manual_seed(4)
        holder = torch.nn.Module()
        holder.weight = torch.nn.Parameter(torch.randn(8, 3, 3, 5))
        model = Strided(holder if name == "host" else to_device(holder))
        assert not model.weight.is_contiguous()
        where = device if name == "device" else "cpu"
        runs[name] = PostHocEMA.from_model(model, tmp_path / name, device=where, **EACH_STEP)
        for step in range(5):
            with torch.no_grad():
                model.weight.mul_(1.0 + step)
            runs[name].update_(model)
            uploaded.append(DRIVER.standin_count(b"h2d_bytes"))
    # The first update uploads the table, and no other one does.
    assert uploaded[4] < uploaded[5] and len(set(uploaded[5:])) == 1
    right, got = (ema.synthesize([0.1])[0]["weight"] for ema in runs.values())
    assert torch.equal(right, got)


def test_placement_is_told(tmp_path: Path) -> None:
    ema = PostHocEMA.from_model(Net(), tmp_path / "ema")
    assert ema.placement == "averages in host memory, beside the parameters"
    ema.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = posthoc_ema.PostHocEMA.placement.fget(ema)
