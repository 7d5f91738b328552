"""Everything that may happen in a block that holds an average, and the state of the model after it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from block_model import OPTIONS, TOKENS, Net, check_works, everything, trained
from conftest import bits, shake, train
from torch.nn.utils import parametrize, prune

from posthoc_ema import PostHocEMA


def half(model: Net) -> None:
    model.half()


def swapped_half(model: Net) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def overwritten_half(model: Net) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def meta(model: Net) -> None:
    model.to("meta")


def emptied(model: Net) -> None:
    model.to_empty(device="cpu")


def backward(model: Net) -> None:
    model.train()
    model(TOKENS).sum().backward()


def zero_grad(model: Net) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.zero_grad(set_to_none=False)


def optimizer(model: Net) -> None:
    steps = torch.optim.Adam([p for p in model.parameters() if p is not model.lone.weight and p is not model.lone.bias])
    model(TOKENS).sum().backward()
    steps.step()


def retained(model: Net) -> None:
    model(TOKENS).sum().backward(retain_graph=True, create_graph=False)
    model.requires_grad_(False)
    model.embedding.weight.requires_grad_(True)


def inference(model: Net) -> None:
    with torch.inference_mode():
        model(TOKENS)
        model.table.add_(1)
        model.cache.mul_(2)
        model.embedding.weight.zero_()


def inference_replaced(model: Net) -> None:
    with torch.inference_mode():
        model.half()
        model.embedding.weight.data = torch.ones(3)
        model.table = torch.zeros(9)


def loaded(model: Net) -> None:
    other = Net()
    own = {name: tensor for name, tensor in other.state_dict().items() if "lone" not in name}
    model.load_state_dict(own, strict=False)


def assigned(model: Net) -> None:
    model.load_state_dict(Net().state_dict(), assign=True)


def replaced(model: Net) -> None:
    model.embedding = torch.nn.Embedding(3, 3)
    model.recurrent.weight_ih_l0 = torch.nn.Parameter(torch.zeros(16, 4))
    model.table = None
    model.absent = torch.ones(3)


def deleted(model: Net) -> None:
    del model.recurrent, model.norm.weight, model.table
    model.extra = torch.nn.Linear(2, 2)
    model.register_buffer("more", torch.zeros(1))


def parametrized(model: Net) -> None:
    torch.nn.utils.parametrizations.spectral_norm(model.frozen)
    torch.nn.utils.parametrizations.weight_norm(model.embedding)
    torch.nn.utils.parametrizations.orthogonal(model.lone)


def pruned(model: Net) -> None:
    prune.l1_unstructured(model.frozen, "weight", amount=0.5)
    prune.random_unstructured(model.lone, "weight", amount=0.5)
    model(TOKENS)


def flattened(model: Net) -> None:
    model.recurrent.flatten_parameters()
    parameters = [parameter for name, parameter in model.named_parameters() if "lone" not in name]
    size = sum(parameter.numel() for parameter in parameters)
    torch.nn.utils.vector_to_parameters(torch.zeros(size), parameters)


def compiled(model: Net) -> None:
    compiled = torch.compile(model, backend="eager")
    compiled(TOKENS)
    compiled.train()
    model.compile(backend="eager")
    model._compiled_call_impl = None


def untied(model: Net) -> None:
    model.output.weight = torch.nn.Parameter(model.output.weight.detach().clone())


def through_numpy(model: Net) -> None:
    model.embedding.weight.detach().numpy()[:] = np.nan
    model.embedding.weight.data.add_(1)
    model.norm.running_mean.data.fill_(3)


CHANGES = [half, swapped_half, overwritten_half, meta, emptied, backward, zero_grad, optimizer, retained, inference]
CHANGES += [inference_replaced, loaded, assigned, replaced, deleted, parametrized, pruned, flattened, compiled]
CHANGES += [untied, through_numpy]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_in_a_block_are_undone(change: Callable[[Net], None], fails: bool, run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before = everything(model)
    with torch.no_grad():
        own = model.eval()(TOKENS)
    model.train()
    model.dropout.eval()
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        with ema.model(model, 0.28):
            assert bits(model) != before["bits"]
            change(model)
            if fails:
                raise ZeroDivisionError
    after = everything(model)
    for what, value in before.items():
        assert after[what] == value, what
    with torch.no_grad():
        assert torch.equal(model.eval()(TOKENS), own)
    model.train()
    check_works(ema, model)


def test_storages_that_a_block_resized_are_filled_again(run_dir: Path) -> None:
    model = torch.nn.BatchNorm1d(3)
    model.register_buffer("cache", torch.ones(4), persistent=False)
    ema, model = trained(run_dir, model)
    tensors = [*model.parameters(), *model.buffers()]
    own = [tensor.detach().clone() for tensor in tensors]
    with ema.model(model, 0.28):
        for tensor in tensors:
            tensor.untyped_storage().resize_(0)
    assert all(map(torch.equal, tensors, own))
    shake(model)
    ema.update_(model)


def test_changed_parameter_outside_the_run_is_named(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before = everything(model)
    message = "could not be given back as it was: tensor `lone.bias`: the block changed its elements"
    with pytest.raises(RuntimeError, match=message) as raised:
        with ema.model(model, 0.1):
            with torch.no_grad():
                model.lone.bias.add_(1)
            raise ZeroDivisionError
    assert isinstance(raised.value.__context__, ZeroDivisionError)
    with torch.no_grad():
        model.lone.bias.sub_(1)
    after = everything(model)
    assert {key: value for key, value in after.items() if key != "bits"} == {
        key: value for key, value in before.items() if key != "bits"
    }
    assert {n for n in after["bits"] if after["bits"][n] != before["bits"][n]} <= {"lone.bias"}
    check_works(ema, model)


@pytest.mark.parametrize("where", ["outside", "inside", "model"])
def test_inference_mode_around_and_in_a_block(where: str, run_dir: Path) -> None:
    if where == "model":
        with torch.inference_mode():
            model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
            model[0].weight.requires_grad_(False)
        assert model[0].weight.is_inference()
        ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
        for _ in range(20):
            with torch.inference_mode():
                shake(model)
            ema.update_(model)
    else:
        ema, model = trained(run_dir, torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)))
    before = bits(model)
    with torch.inference_mode(where == "outside"):
        with ema.model(model, 0.28):
            assert bits(model) != before
            with torch.inference_mode():
                model.train()(torch.randn(8, 4))
                model[1].running_mean.fill_(3.0)
    assert bits(model) == before and model.training
    assert [p.is_inference() for p in model.parameters()] == [where == "model"] * 4
    if where != "model":
        model(torch.randn(8, 4)).sum().backward()
    ema.update_(model)


def test_gradients_of_a_block_are_its_own(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before = everything(model)
    with ema.model(model, 0.28):
        assert all(parameter.grad is None for parameter in model.parameters())
        model(TOKENS).sum().backward()
        inner = model.frozen.weight.grad, model.embedding.weight.grad
        assert inner[0] is None and inner[1] is not None
    assert everything(model) == before


def test_weights_that_autocast_has_converted_are_not_mixed_up(run_dir: Path) -> None:
    ema, model = trained(run_dir, torch.nn.Linear(4, 4))
    inputs = torch.randn(3, 4)

    def output() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs).detach()

    own = output()
    with ema.model(model, 0.28):
        average = output()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs), own)
        with ema.model(model, 0.28):
            assert torch.equal(model(inputs), average)
        assert torch.equal(model(inputs), own)
        ema.switch_(model, 0.28)
        assert torch.equal(model(inputs), average) and not torch.equal(average, own)


def test_block_ends_after_its_averages_were_closed(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before = everything(model)
    with ema.model(model, 0.1):
        ema.close()
        del ema
        gc.collect()
    assert everything(model) == before


def test_mapping_is_given_back_whole(run_dir: Path) -> None:
    tensors = {"w": torch.randn(3, requires_grad=True), "b": torch.zeros(2), "n": np.ones(2)}
    ema = PostHocEMA.from_model(tensors, run_dir, **OPTIONS)
    for _ in range(20):
        tensors["w"].data.add_(1)
        tensors["n"] += 1
        ema.update_(tensors)
    tensors["w"].grad = torch.ones(3)
    own, values = dict(tensors), {name: torch.as_tensor(tensor).detach().clone() for name, tensor in tensors.items()}
    with ema.model(tensors, 0.28):
        (tensors["w"] * 2).sum().backward()
        tensors["w"].data = torch.zeros(7)
        tensors["w"].requires_grad_(False)
        del tensors["b"]
        tensors["n"] = tensors["n"] * 0
        tensors["new"] = torch.zeros(1)
    assert list(tensors) == list(own) and all(tensors[name] is own[name] for name in own)
    assert all(torch.equal(torch.as_tensor(tensor), values[name]) for name, tensor in tensors.items())
    assert tensors["w"].requires_grad and torch.equal(tensors["w"].grad, torch.ones(3))
    ema.update_(tensors)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_scripted_modules_are_tracked_and_given_back(whole: bool, run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    scripted = torch.jit.script(model) if whole else torch.nn.Sequential(torch.jit.script(model[0]), model[1])
    ema = PostHocEMA.from_model(scripted, run_dir, **OPTIONS)
    train(ema, scripted, 20)
    inputs, own = torch.randn(6, 4), scripted(torch.ones(6, 4))
    before = everything(scripted)
    with ema.model(scripted, 0.28):
        assert not torch.equal(scripted(torch.ones(6, 4)), own)
        scripted.train()(inputs)
    assert everything(scripted) == before
    scripted.load_state_dict(ema.synthesize([0.28])[0])


def test_graphs_made_in_a_block_use_the_weights_of_their_call(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 20)
    before, inputs = bits(model), torch.randn(6, 4)
    with ema.model(model, 0.28):
        traced = torch.fx.symbolic_trace(model)
        wanted = model(inputs)
        assert torch.equal(traced(inputs), wanted)
        replica = torch.func.functional_call(model, {n: p.clone() for n, p in model.named_parameters()}, (inputs,))
        assert torch.equal(replica, wanted)
    assert bits(model) == before
    assert not torch.equal(traced.eval()(inputs), wanted)


def test_blocks_hold_nothing_after_their_end(run_dir: Path) -> None:
    import weakref

    ema, model = trained(run_dir)
    with ema.model(model, 0.1):
        pass
    watched = weakref.ref(model.embedding.weight)
    ema.close()
    del ema, model
    gc.collect()
    assert watched() is None


def test_parametrization_removed_in_a_block_is_back(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4)))
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 20)
    before, own = everything(model), model(torch.ones(1, 4))
    with ema.model(model, 0.28):
        parametrize.remove_parametrizations(model[0], "weight")
        assert not torch.equal(model(torch.ones(1, 4)), own)
    assert everything(model) == before and torch.equal(model(torch.ones(1, 4)), own)
    ema.update_(model)
