"""Models on CUDA devices: averages have the bits of the host, on whichever device they are.

The tests use the GPU if PyTorch has one. Otherwise `POSTHOC_EMA_STANDIN` may name the stand-in driver that the tests of
the library build (tests/standin). Its device memory is that of the process, so a tensor of PyTorch can use it and be
lent as if it were on a device. Both need a build of the package with CUDA.
"""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import bits, shake

from posthoc_ema import KarrasEMA, PostHocEMA, _lend, _native

STANDIN = os.environ.get("POSTHOC_EMA_STANDIN")
REAL = torch.cuda.is_available() and not STANDIN

if STANDIN:
    # The native part then finds this library as libcuda.so.1.
    DRIVER = ctypes.CDLL(STANDIN, mode=ctypes.RTLD_GLOBAL)

pytestmark = [
    pytest.mark.skipif(not _native.CUDA, reason="the package was built without CUDA"),
    pytest.mark.skipif(not (REAL or STANDIN), reason="no GPU, and POSTHOC_EMA_STANDIN names no stand-in driver"),
]

ToDevice = Callable[..., torch.nn.Module]


def call(name: str, *arguments: object) -> None:
    assert getattr(DRIVER, name)(*arguments) == 0, name


def in_device_memory(tensor: torch.Tensor, context: ctypes.c_void_p | None = None) -> torch.Tensor:
    """Copies a tensor to memory of the stand-in's device with this context, by default the current one."""
    if context is not None:
        call("cuCtxSetCurrent", context)
    address, size = ctypes.c_uint64(), tensor.numel() * tensor.element_size()
    call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
    memory = (ctypes.c_char * size).from_address(address.value)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.fixture
def to_device(monkeypatch: pytest.MonkeyPatch) -> ToDevice:
    """Returns a function that moves a module to the device, whose tensors are then lent as tensors of that device.

    With numbers of devices, the tensors go to them in turns; `HOST` leaves one in host memory.
    """
    if REAL:
        return move_to_gpus
    call("cuInit", 0)
    contexts, streams = [ctypes.c_void_p() for _ in range(2)], [ctypes.c_void_p() for _ in range(2)]
    for number in reversed(range(2)):
        call("cuDevicePrimaryCtxRetain", ctypes.byref(contexts[number]), number)
        call("cuCtxSetCurrent", contexts[number])
        call("cuStreamCreate", ctypes.byref(streams[number]), 1)
    moved: dict[int, int] = {}

    def move(module: torch.nn.Module, numbers: Sequence[int] = (0,)) -> torch.nn.Module:
        with torch.no_grad():
            for i, tensor in enumerate([*module.parameters(), *module.buffers()]):
                number = numbers[i % len(numbers)]
                if number != _lend.HOST:
                    tensor.data = in_device_memory(tensor, contexts[number])
                    moved[tensor.data_ptr()] = number
        call("cuCtxSetCurrent", contexts[0])
        return module

    move.stream = streams[0]  # type: ignore[attr-defined]

    def device_number(lender: _lend.Lender, i: int) -> int:
        return moved.get(lender.tensors[i].data_ptr(), _lend.HOST)

    def current_streams(lender: _lend.Lender) -> dict[int, int | None]:
        return {number: streams[number].value for number in lender._devices}

    monkeypatch.setattr(_lend.Lender, "_device_number", device_number)
    monkeypatch.setattr(_lend.Lender, "streams", property(current_streams))
    return move


def move_to_gpus(module: torch.nn.Module, numbers: Sequence[int] = (0,)) -> torch.nn.Module:
    """Moves the tensors of a module to these GPUs in turns."""
    with torch.no_grad():
        for i, tensor in enumerate([*module.parameters(), *module.buffers()]):
            number = numbers[i % len(numbers)]
            if number != _lend.HOST:
                tensor.data = tensor.to(f"cuda:{number % torch.cuda.device_count()}")
    return module


def net() -> torch.nn.Module:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.BatchNorm1d(17), torch.nn.Linear(17, 5))
    model[2].to(torch.bfloat16)
    return model


def trained(model: torch.nn.Module, run_dir: Path, device: str) -> PostHocEMA:
    # The first calls load the kernels and allocate the buffers.
    ema = PostHocEMA.from_model(model, run_dir, device=device, update_every=2, update_after_step=0, checkpoint_every=10)
    generator = torch.Generator().manual_seed(5)
    for _ in range(35):
        with torch.no_grad():
            for parameter in model.parameters():
                change = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(change.to(parameter.device) * 0.1)
            model[1].num_batches_tracked += 1
        ema.update_(model)
    return ema


def on_host(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state_dict.items()}


@pytest.mark.parametrize("numbers", [(0,), (0, 1), (1, _lend.HOST, 0)])
@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_averages_have_the_bits_of_the_host(
    tmp_path: Path, to_device: ToDevice, device: str, numbers: tuple[int, ...]
) -> None:
    host, model = net(), to_device(net(), numbers)
    expected, ema = trained(host, tmp_path / "host", "cpu"), trained(model, tmp_path / "device", device)
    before = on_host(model.state_dict())
    for right, got in zip(expected.synthesize([0.06, 0.15]), ema.synthesize([0.06, 0.15])):
        assert all(torch.equal(tensor, got[name]) for name, tensor in right.items())
    with expected.model(host, 0.15), ema.model(model, 0.15):
        held, right = on_host(model.state_dict()), on_host(host.state_dict())
        assert all(torch.equal(held[name], tensor) for name, tensor in right.items())
    after = on_host(model.state_dict())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    first = ema.ema_models[1].ema_model.state_dict()
    assert {tensor.device.type for tensor in first.values()} == {"cpu"}
    assert all(torch.equal(first[n], t) for n, t in expected.ema_models[1].ema_model.state_dict().items())
    ema.switch_(model, 0.2), expected.switch_(host, 0.2)
    switched = on_host(model.state_dict())
    assert all(torch.equal(switched[name], tensor) for name, tensor in host.state_dict().items())
    ema.finish(), expected.finish()
    stored, right = (PostHocEMA.from_path(tmp_path / run).synthesize([0.1])[0] for run in ("device", "host"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in right.items())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_run_continues_with_its_tensors_on_other_devices(tmp_path: Path, to_device: ToDevice, device: str) -> None:
    def trained_further(model: torch.nn.Module, run: str, device: str) -> dict[str, torch.Tensor]:
        ema = PostHocEMA.from_model(model, tmp_path / run, device=device, resume=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        ema.attach(optimizer, model)
        for _ in range(20):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.25)
            optimizer.step()
        ema.close()
        return PostHocEMA.from_path(tmp_path / run).synthesize([0.1])[0]

    host, model = net(), to_device(net(), (0, 1))
    trained(host, tmp_path / "host", "cpu").close()
    trained(model, tmp_path / "device", device).close()
    moved = to_device(net(), (1, _lend.HOST))
    with torch.no_grad():
        for ours, theirs in zip(moved.state_dict().values(), host.state_dict().values()):
            ours.copy_(theirs)
    expected, got = trained_further(host, "host", "cpu"), trained_further(moved, "device", device)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_average_of_a_run_is_swapped_into_a_model_on_the_device(tmp_path: Path, to_device: ToDevice) -> None:
    host = net()
    trained(host, tmp_path / "host", "cpu").finish()
    run, model = PostHocEMA.from_path(tmp_path / "host"), to_device(net())
    before = on_host(model.state_dict())
    with run.state_dict(0.1) as right:
        pass
    with pytest.raises(ZeroDivisionError):
        with run.model(model, 0.1):
            held = on_host(model.state_dict())
            assert all(torch.equal(held[name], tensor) for name, tensor in right.items())
            raise ZeroDivisionError
    assert all(torch.equal(on_host(model.state_dict())[name], tensor) for name, tensor in before.items())


def test_average_in_memory_has_the_bits_of_the_host(to_device: ToDevice) -> None:
    host, model = net(), to_device(net())
    averages = [KarrasEMA(each, sigma_rel=0.1, update_every=3) for each in (host, model)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        changes = [torch.randn(parameter.shape, generator=generator) for parameter in host.parameters()]
        for each in (host, model):
            with torch.no_grad():
                for parameter, change in zip(each.parameters(), changes):
                    parameter.add_(change.to(parameter.device, parameter.dtype))
        for average in averages:
            average.update()
    assert bits(averages[0].ema_model) == bits(averages[1].ema_model)


class Graph:
    """CUDA graph of PyTorch on a GPU, or one of the stand-in."""

    def __init__(self, to_device: ToDevice, work: Callable[[], object]):
        if REAL:
            self.real = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.real):
                work()
            return
        self.stream = to_device.stream  # type: ignore[attr-defined]
        graph, self.launchable = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuStreamBeginCapture_v2", self.stream, 0)
        try:
            work()
        finally:
            call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        call("cuGraphInstantiateWithFlags", ctypes.byref(self.launchable), graph, ctypes.c_uint64(0))

    def replay(self) -> None:
        if REAL:
            self.real.replay()
        else:
            call("cuGraphLaunch", self.launchable, self.stream)


@pytest.mark.skipif(REAL, reason="the model trains on the host between the replays")
def test_updates_in_graphs_have_the_bits_of_the_host(tmp_path: Path, to_device: ToDevice) -> None:
    host, model = net(), to_device(net())
    options = {"update_every": 2, "update_after_step": 0, "checkpoint_every": 10}
    expected = PostHocEMA.from_model(host, tmp_path / "host", **options)
    ema = PostHocEMA.from_model(model, tmp_path / "device", device="cuda", **options)
    graph = Graph(to_device, lambda: ema.capture_update_(model))
    for step in range(1, 26):
        for each in (host, model):
            with torch.no_grad():
                each[0].weight.add_(0.01 * step)
                each[1].num_batches_tracked.fill_(step)
        expected.update_(host)
        # At one step without the graph. The last call waits for the update before the weights change.
        ema.update_(model) if step == 8 else ema.replay_(graph)
        assert (ema.step, ema.last_update) == (expected.step, expected.last_update)
        if step == 15:
            with ema.model(model, 0.15), expected.model(host, 0.15):
                held, right = on_host(model.state_dict()), on_host(host.state_dict())
                assert all(torch.equal(held[name], tensor) for name, tensor in right.items())
                with pytest.raises(RuntimeError, match="holds an average"):
                    ema.replay_(graph)
    ema.check_step(25)
    ema.finish(), expected.finish()
    for right, got in zip(expected.synthesize([0.06, 0.15]), ema.synthesize([0.06, 0.15])):
        assert all(torch.equal(tensor, got[name]) for name, tensor in right.items())


def test_replay_without_the_averages_is_reported(tmp_path: Path, to_device: ToDevice) -> None:
    model = to_device(net())
    ema = PostHocEMA.from_model(model, tmp_path / "ema", device="cuda", update_every=1, update_after_step=0)
    with pytest.raises(RuntimeError, match="call `capture_update_` in its capture"):
        ema.replay_(None)
    with pytest.raises(RuntimeError, match="not being captured"):
        ema.capture_update_(model)
    graph = Graph(to_device, lambda: ema.capture_update_(model))
    ema.replay_(graph)
    assert ema.last_update == 1
    graph.replay()
    ema.replay_(graph)
    with pytest.raises(RuntimeError, match="has run once outside of `replay`"):
        ema.save()

    class Failing:
        def replay(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ema.replay_(Failing())
    assert (ema.step, ema.last_update) == (2, 2)
    ema.replay_(graph, time=7)
    assert (ema.step, ema.last_update) == (7, 7)
    ema.close()


def test_copies_of_an_earlier_capture_stay(tmp_path: Path, to_device: ToDevice) -> None:
    models = [to_device(net()) for _ in range(2)]
    ema = PostHocEMA.from_model(models[0], tmp_path / "ema", device="cuda", update_every=1, update_after_step=0)
    assert ema._tracker is not None
    captured = []
    for model in models:
        Graph(to_device, lambda model=model: ema.capture_update_(model))
        captured.append(weakref.ref(ema._tracker._captured[-1]))
    gc.collect()
    # The graph of the first capture copies strided tensors to memory of these.
    assert captured[0]() is not None and captured[0]() is not captured[1]()
    ema.close()


def test_captures_of_averages_on_the_host_are_refused(tmp_path: Path, to_device: ToDevice) -> None:
    host, model = net(), to_device(net())
    ema = PostHocEMA.from_model(host, tmp_path / "host", update_every=1)
    with pytest.raises(ValueError, match="needs a model on one GPU"):
        ema.capture_update_(host)
    ema = PostHocEMA.from_model(model, tmp_path / "device", device="cpu", update_every=1)

    def refused() -> None:
        with pytest.raises(ValueError, match="they are in host memory: make the tracker with device"):
            ema.capture_update_(model)

    Graph(to_device, refused)


@pytest.mark.skipif(not REAL, reason="needs a GPU")
def test_strided_tensors_and_moved_models_are_restored(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    model = model.cuda().to(memory_format=torch.channels_last)
    ema = PostHocEMA.from_model(model, tmp_path / "ema", update_every=1, update_after_step=0, checkpoint_every=10)
    for _ in range(12):
        shake(model)
        ema.update_(model)
    before, strides = on_host(model.state_dict()), [p.stride() for p in model.parameters()]
    allocated = torch.cuda.memory_allocated()
    with ema.model(model, 0.1):
        assert all(parameter.is_cuda for parameter in model.parameters())
        model.cpu()
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert all(torch.equal(on_host(model.state_dict())[name], tensor) for name, tensor in before.items())
    assert torch.cuda.memory_allocated() <= allocated
    # Updates must follow the stream that is current.
    with torch.cuda.stream(torch.cuda.Stream()):
        shake(model)
        ema.update_(model)
        torch.cuda.current_stream().synchronize()
    ema.finish()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("reaction", [None, "skip"])
def test_updates_with_nan_are_left_out_as_on_the_host(
    tmp_path: Path, to_device: ToDevice, device: str, reaction: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    host, model = net(), to_device(net())
    options = {"update_every": 2, "update_after_step": 0, "checkpoint_every": 10, "on_nonfinite": reaction}
    errors: dict[str, list[str]] = {"host": [], "device": []}

    def tried(name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError as error:
            errors[name].append(str(error))

    runs = {"host": PostHocEMA.from_model(host, tmp_path / "host", **options)}
    runs["device"] = PostHocEMA.from_model(model, tmp_path / "device", device=device, **options)
    capfd.readouterr()
    for step in range(1, 24):
        for name, module in [("host", host), ("device", model)]:
            with torch.no_grad():
                module[0].weight.add_(0.01 * step)
                module[1].num_batches_tracked.fill_(step)
                good = module[2].bias[4].item()
                if step in (2, 6, 8, 10, 22):
                    module[2].bias[4] = float("nan")
            tried(name, lambda run=runs[name], module=module: run.update_(module))
            # A call after the last one that had NaN must wait for it before the parameters change again.
            assert step % 5 or runs[name].last_update == max(s for s in range(2, step + 1, 2) if s not in (6, 8, 10))
            module[2].bias.data[4] = good
    for name, run in runs.items():
        tried(name, lambda run=run: run.finish())
    assert errors["device"] == errors["host"]
    steps = [] if reaction else [2, 6, 8, 10, 22]
    named = [f"`2.bias`: the parameter is NaN at element 4 at step {s}:" for s in steps]
    assert len(errors["host"]) == len(steps) and all(part in e for part, e in zip(named, errors["host"]))
    assert capfd.readouterr().err.count("is left out") == (6 if reaction else 0)
    files = {name: sorted(path.name for path in (tmp_path / name).glob("*.*.safetensors")) for name in runs}
    assert files["host"] == files["device"] and len(files["host"]) > 2
    for right, got in zip(runs["host"].synthesize([0.06, 0.15]), runs["device"].synthesize([0.06, 0.15])):
        assert all(torch.equal(tensor, got[name]) for name, tensor in right.items())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nan_of_the_last_update_is_reported_at_the_end(tmp_path: Path, to_device: ToDevice, device: str) -> None:
    model = to_device(net())
    options = {"update_every": 1, "update_after_step": 0, "device": device}

    def begun(name: str) -> PostHocEMA:
        model[2].bias.data[4] = 1.0
        ema = PostHocEMA.from_model(model, tmp_path / name, **options)
        ema.update_(model)
        model[2].bias.data[4] = float("nan")
        ema.update_(model)
        return ema

    what = "`2.bias`: the parameter is NaN at element 4 at step 2:"
    with pytest.raises(RuntimeError, match=what):
        begun("closed").close()
    ema = begun("left")
    with pytest.warns(RuntimeWarning, match="an update left out: .*" + what):
        del ema
    with pytest.warns(UserWarning, match="an update left out: .*" + what), pytest.raises(KeyError):
        with begun("failed"):
            raise KeyError
    with pytest.raises(RuntimeError, match=what), begun("finished"):
        pass
    for name in ("closed", "left", "failed", "finished"):
        resumed = PostHocEMA.from_model(model, tmp_path / name, resume=True, **options)
        assert (resumed.step, resumed.last_update) == (2, 1), name
        resumed.close()
