"""Everything that may happen in a block that holds an average, and the state of the model after it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bits, shake, train
from torch.nn.utils import parametrize, prune

from posthoc_ema import PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 10}


class Net(torch.nn.Module):
    """Model with tied weights, batch normalisation, a recurrent part, buffers of all kinds and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.recurrent = torch.nn.LSTM(4, 4, batch_first=True)
        self.norm = torch.nn.BatchNorm1d(4)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.lone = torch.nn.Linear(4, 4)
        self.output = torch.nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("cache", torch.ones(4), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.recurrent(self.embedding(tokens) + self.table)
        hidden = self.norm(self.lone(self.frozen(hidden)).transpose(1, 2)).transpose(1, 2)
        return self.output(self.dropout(hidden * self.cache))


TOKENS = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(0))


def trained(run_dir: Path, model: torch.nn.Module | None = None) -> tuple[PostHocEMA, torch.nn.Module]:
    model = Net() if model is None else model
    left_out = ["lone.*"] if isinstance(model, Net) else None
    ema = PostHocEMA.from_model(model, run_dir, leave_out=left_out, **OPTIONS)
    if isinstance(model, Net):
        # Gradients, one of them absent, and a mixture of modes.
        model(TOKENS).square().sum().backward()
        model.norm.bias.grad = None
        model.dropout.eval()
    train(ema, model, 20)
    return ema, model


def everything(model: torch.nn.Module) -> dict[str, object]:
    """Returns all that a block must give back: bits, identities, places, flags, modes, gradients and versions."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    facts = {
        name: (id(t), t.data_ptr(), t.stride(), t.dtype, t.device, t.requires_grad, t.is_leaf, id(t.grad))
        for name, t in tensors
    }
    gradients = {name: t.grad.clone().numpy().tobytes() for name, t in tensors if t.grad is not None}
    modules = [
        (name, id(part), type(part), part.training, len(part._forward_hooks)) for name, part in model.named_modules()
    ]
    hidden = [name for part in model.modules() for name, value in part.__dict__.items() if torch.is_tensor(value)]
    return {"bits": bits(model), "facts": facts, "gradients": gradients, "modules": modules, "hidden": hidden}


def check_works(ema: PostHocEMA, model: torch.nn.Module) -> None:
    """Checks that model and averages can still be used."""
    model(TOKENS).sum().backward()
    step = ema.step
    shake(model)
    ema.update_(model)
    assert ema.step == step + 1
    with ema.model(model, 0.1):
        assert not model.training


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


def test_blocks_of_several_models_do_not_touch_each_other(tmp_path: Path) -> None:
    first, one = trained(tmp_path / "1")
    second, two = trained(tmp_path / "2")
    states = everything(one), everything(two)
    with first.model(one, 0.1), second.model(two, 0.28), first.model(one, 0.28):
        with second.model(one, 0.2):
            pass
        two.half()
        assert everything(one)["bits"] != states[0]["bits"]
    assert (everything(one), everything(two)) == states


def test_blocks_that_end_in_another_order_restore_the_model(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before = everything(model)
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [2, 1, 0]):
        blocks = [ema.model(model, length) for length in (0.1, 0.2, 0.28)]
        for block in blocks:
            block.__enter__()
            model.half() if block is blocks[1] else None
        for i in order[:-1]:
            blocks[i].__exit__(None, None, None)
            with pytest.raises(RuntimeError, match="averages of averages"):
                ema.update_(model)
        blocks[order[-1]].__exit__(None, None, None)
        assert everything(model) == before, order
    check_works(ema, model)


def test_moved_model_that_holds_an_average_is_not_averaged(run_dir: Path) -> None:
    ema, model = trained(run_dir, torch.nn.Conv2d(3, 3, 3))
    with ema.model(model, 0.1):
        model.to(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError, match="averages of averages"):
            ema.update_(model)


def test_another_thread_is_refused_while_a_block_is_open(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    other, spare = trained(run_dir.parent / "other")
    before, errors, scores = everything(model), [], []

    def evaluate(length: float) -> None:
        try:
            with ema.model(model, length):
                scores.append(length)
        except RuntimeError as error:
            errors.append(str(error))

    def elsewhere() -> None:
        with other.model(spare, 0.1):
            scores.append("other")

    with ema.model(model, 0.1):
        held = bits(model)
        for act in (lambda: evaluate(0.28), elsewhere):
            thread = threading.Thread(target=act)
            thread.start()
            thread.join()
        assert bits(model) == held
    assert len(errors) == 1 and "another thread or task has put an average into this model" in errors[0]
    assert scores == ["other"] and everything(model) == before
    evaluate(0.28)
    assert scores == ["other", 0.28]


def test_many_threads_leave_the_model_as_it_was(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before, wanted, bad, refused = everything(model), {}, [], []
    for length in (0.1, 0.2, 0.28):
        with ema.model(model, length):
            wanted[length] = bits(model)

    def evaluate(length: float) -> None:
        for _ in range(40):
            try:
                with ema.model(model, length):
                    if bits(model) != wanted[length]:
                        bad.append(length)
            except RuntimeError as error:
                refused.append("another thread or task" in str(error))

    threads = [threading.Thread(target=evaluate, args=(length,)) for length in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad and all(refused)
    assert everything(model) == before


def test_tasks_of_asyncio_are_refused_like_threads(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before = everything(model)

    async def evaluate(length: float) -> bool:
        with ema.model(model, length):
            held = bits(model)
            await asyncio.sleep(0.01)
            return bits(model) == held

    async def both() -> list[object]:
        return await asyncio.gather(evaluate(0.1), evaluate(0.28), return_exceptions=True)

    results = asyncio.run(both())
    assert results[0] is True and isinstance(results[1], RuntimeError)
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


def test_scripted_and_lazy_parts_are_given_back(run_dir: Path) -> None:
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
