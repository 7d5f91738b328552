"""Names and keys of wrapped models: compiled, delegating, of PEFT, Fabric, DataParallel and FSDP."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import bits, shake, train

from posthoc_ema import KarrasEMA, PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 20}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check_keys(model: torch.nn.Module, run_dir: Path, names: set[str]) -> PostHocEMA:
    """Checks the names in the files, and that a state dict loads into the model as it was given."""
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 30)
    ema.flush()
    assert set(PostHocEMA.from_path(run_dir).synthesize([0.1])[0]) == names
    (average,) = ema.synthesize([0.28])
    assert set(average) == set(model.state_dict())
    before = bits(model)
    with ema.model(model, 0.28):
        assert all(torch.equal(tensor, average[key]) for key, tensor in model.state_dict().items())
    assert bits(model) == before
    model.load_state_dict(average)
    assert all(torch.equal(tensor, average[key]) for key, tensor in model.state_dict().items())
    (opened,) = PostHocEMA.from_path(run_dir, model).synthesize([0.1])
    assert set(opened) == set(model.state_dict())
    return ema


class Delegating(torch.nn.Module):
    """Wrapper with a head of its own that hands on all other attributes of the inner model."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner
        self.head = torch.nn.Linear(2, 2)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def test_delegating_wrapper_around_a_compiled_model_is_tracked_whole(run_dir: Path) -> None:
    model = Delegating(torch.compile(torch.nn.Linear(4, 2), backend="eager"))
    assert model._orig_mod is model.inner._orig_mod
    check_keys(model, run_dir, {"inner.weight", "inner.bias", "head.weight", "head.bias"})


def test_delegating_wrapper_around_data_parallel_is_tracked_whole(run_dir: Path) -> None:
    model = Delegating(torch.nn.DataParallel(torch.nn.Linear(4, 2)))
    names = {"inner.module.weight", "inner.module.bias", "head.weight", "head.bias"}
    check_keys(model, run_dir, names)


def test_peft_over_a_compiled_model_has_its_names(run_dir: Path) -> None:
    peft = pytest.importorskip("peft")
    inner = torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), backend="eager")
    model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["0"], r=2))
    ema = PostHocEMA.from_model(model, run_dir, only_save_diff=True, **OPTIONS)
    train(ema, model, 30)
    (average,) = ema.synthesize([0.28])
    keys = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(average) == keys and len(keys) == 2
    missing, unexpected = model.load_state_dict(average, strict=False)
    assert not unexpected and not keys & set(missing)
    for name, parameter in model.named_parameters():
        assert name not in keys or torch.equal(parameter, average[name])
    files = set(PostHocEMA.from_path(run_dir).synthesize([0.1])[0])
    assert files == {name.replace("_orig_mod.", "") for name in keys}


@pytest.mark.parametrize("wrapper", ["compiled", "data_parallel", "ddp_of_compiled", "compiled_inside", "tied"])
def test_state_dict_has_the_keys_of_the_given_model(wrapper: str, run_dir: Path, process_group: None) -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    if wrapper == "tied":
        plain[2].weight = plain[0].weight
        plain.weight = plain[0].weight
    model = {
        "compiled": lambda: torch.compile(plain, backend="eager"),
        "data_parallel": lambda: torch.nn.DataParallel(plain),
        "ddp_of_compiled": lambda: torch.nn.parallel.DistributedDataParallel(torch.compile(plain, backend="eager")),
        "compiled_inside": lambda: torch.nn.Sequential(torch.compile(plain, backend="eager"), torch.nn.ReLU()),
        "tied": lambda: torch.nn.DataParallel(plain),
    }[wrapper]()
    inside = "0." if wrapper == "compiled_inside" else ""
    check_keys(model, run_dir, {f"{inside}{name}" for name in plain.state_dict()})


def test_best_average_of_a_sweep_has_the_keys_of_its_model(run_dir: Path) -> None:
    model = torch.compile(torch.nn.Linear(4, 2), backend="eager")
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 40)
    ema.finish()
    opened = PostHocEMA.from_path(run_dir)
    swept = opened.sweep(lambda averaged: averaged.weight.sum().item(), [0.1, 0.2], model=model, refine=0)
    model.load_state_dict(swept.best.state_dict)


def test_state_dict_has_the_keys_of_a_fabric_module(run_dir: Path) -> None:
    lightning = pytest.importorskip("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model, _ = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    check_keys(model, run_dir, {"0.weight", "0.bias", "1.weight", "1.bias"})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("original", [True, False])
def test_fsdp_is_tracked_within_summon_full_params(original: bool, run_dir: Path, process_group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    options = {"use_orig_params": original, "device_id": torch.device("cpu")}
    net[2] = FullyShardedDataParallel(net[2], **options)
    model = FullyShardedDataParallel(net, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"0.weight", "0.bias", "2.weight", "2.bias"}
    with FullyShardedDataParallel.summon_full_params(model):
        ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    for _ in range(20):
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            ema.update_(model)
    assert ema.step == 20
    with FullyShardedDataParallel.summon_full_params(model):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with ema.model(model, 0.28):
            assert not any(map(torch.equal, before, model.parameters()))
        assert all(map(torch.equal, before, model.parameters()))
    assert set(ema.synthesize([0.28])[0]) == names


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("wrapped", [False, True])
def test_update_can_be_called_in_a_compiled_function(wrapped: bool, run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    given = torch.compile(model, backend="eager") if wrapped else model
    ema = PostHocEMA.from_model(given, run_dir, **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(lambda inputs: (given(inputs), ema.update_(given)), backend=backend)
    for i in range(1, 31):
        step(torch.randn(5, 4))[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert ema.step == i
    # No step of the training is traced again.
    assert len(graphs) <= 3
    (average,) = ema.synthesize([0.28])

    def switch() -> None:
        ema.switch_(given, 0.28)
        ema.update_at_(40, given)

    torch.compile(switch, backend=backend)()
    assert ema.step == 40 and torch.equal(model[0].weight, average["_orig_mod." * wrapped + "0.weight"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_evaluation_can_be_called_in_a_compiled_function(run_dir: Path) -> None:
    model = torch.nn.Linear(4, 2)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 20)
    inputs = torch.randn(3, 4)
    with ema.model(model, 0.28):
        wanted = model(inputs)

    def evaluate(inputs: torch.Tensor) -> torch.Tensor:
        with ema.model(model, 0.28) as averaged:
            return averaged(inputs)

    before = bits(model)
    assert torch.equal(torch.compile(evaluate, backend="eager")(inputs), wanted)
    assert bits(model) == before


def test_copies_are_refused_with_the_remedy(run_dir: Path) -> None:
    model = torch.nn.Linear(4, 2)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    holder = torch.nn.Linear(2, 2)
    holder.ema = ema
    for act in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"can be neither copied nor pickled.*`ema.save\(path\)`"):
            act(holder if act is copy.deepcopy else ema)
    single = KarrasEMA(model, sigma_rel=0.1)
    single.update()
    with pytest.raises(TypeError, match=r"KarrasEMA can be neither copied nor pickled.*`state_dict\(\)`"):
        copy.deepcopy(single)
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(TypeError, match=r"call `ema.save\(path\)` whenever"):
        accelerator.register_for_checkpointing(ema)
    assert not hasattr(ema, "anything")
    shake(model)
    thread = threading.Thread(target=ema.update_, args=(model,))
    thread.start()
    thread.join()
    assert ema.step == 1
