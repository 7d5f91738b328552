"""Fresh statistics of batch normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import bits, train
from torch.optim.swa_utils import update_bn as reference

from posthoc_ema import PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 20}


def net() -> torch.nn.Sequential:
    layers = [torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6, momentum=0.3), torch.nn.ReLU(), torch.nn.Linear(6, 6)]
    return torch.nn.Sequential(*layers, torch.nn.BatchNorm1d(6, momentum=None), torch.nn.BatchNorm1d(6, affine=False))


class ByName(torch.nn.Module):
    """Model that takes its inputs by name, as those of transformers do."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs * scale)


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "dictionary"])
def test_statistics_are_those_of_pytorch_and_the_rest_is_given_back(kind: str) -> None:
    batches = [torch.randn(5, 4) + i for i in range(7)]
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    reference(batches, twin)
    if kind == "dictionary":
        loader: list[object] = [{"inputs": batch, "scale": torch.ones(1)} for batch in batches]
        given: torch.nn.Module = ByName(model)
    else:
        loader = [{"tensor": b, "list": [b, 0], "tuple": (b, 1)}[kind] for b in batches]
        given = model
    model[2].eval()
    modes, momenta = [part.training for part in model.modules()], [model[i].momentum for i in (1, 4, 5)]
    PostHocEMA.update_bn(loader, given, device="cpu")
    assert is_equal(statistics(model), statistics(twin))
    assert [part.training for part in model.modules()] == modes
    assert [model[i].momentum for i in (1, 4, 5)] == momenta == [0.3, None, 0.1]


def test_statistics_last_until_the_block_ends(run_dir: Path) -> None:
    model = net()
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    batches = [torch.randn(6, 4) for _ in range(5)]

    def step(_: int) -> None:
        model(torch.randn(8, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))

    train(ema, model, 40, step)
    before = bits(model)
    twin = net()
    twin.load_state_dict(ema.synthesize([0.28])[0])
    reference(batches, twin)
    with ema.model(model, 0.28) as averaged:
        stored = statistics(averaged)
        ema.update_bn(batches, averaged)
        assert not averaged.training and not is_equal(statistics(averaged), stored)
        assert is_equal(statistics(averaged), statistics(twin))
    assert bits(model) == before and model.training
    opened = PostHocEMA.from_path(run_dir)
    fresh = net()
    fresh.load_state_dict(opened.synthesize([0.28])[0])
    opened.update_bn(batches, fresh)
    assert torch.allclose(fresh[1].running_mean, twin[1].running_mean, rtol=0, atol=1e-3)


def test_only_normalisation_runs_in_training_mode() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.calls += 1
            return inputs

    model = torch.nn.Sequential(torch.nn.Dropout(0.9), Counting(), torch.nn.BatchNorm1d(3))
    PostHocEMA.update_bn([torch.ones(4, 3)] * 3, model)
    assert model[1].calls == 0
    assert torch.equal(model[2].running_mean, torch.ones(3)) and torch.equal(model[2].running_var, torch.zeros(3))


def test_instance_normalisation_is_averaged_over_the_batches() -> None:
    model = torch.nn.Sequential(torch.nn.InstanceNorm1d(2, track_running_stats=True))
    batches = [torch.randn(3, 2, 5) + i for i in range(4)]
    PostHocEMA.update_bn(batches, model)
    means = torch.stack([batch.mean(dim=(0, 2)) for batch in batches])
    assert torch.allclose(model[0].running_mean, means.mean(dim=0), atol=1e-6)
    assert model[0].momentum == 0.1


def test_model_without_normalisation_is_not_run() -> None:
    def loader() -> Iterator[torch.Tensor]:
        pytest.fail("the loader must not be used")
        yield torch.zeros(1)

    PostHocEMA.update_bn(loader(), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)))
    PostHocEMA.update_bn(loader(), torch.nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(TypeError, match="dict is not a module"):
        PostHocEMA.update_bn(loader(), {})


@pytest.mark.parametrize("failure", ["empty", "error", "interrupt"])
def test_statistics_are_as_before_after_a_failure(failure: str) -> None:
    model = net()
    model(torch.randn(9, 4))
    before = statistics(model)

    def loader() -> Iterator[torch.Tensor]:
        if failure != "empty":
            yield torch.randn(5, 4)
            raise KeyboardInterrupt if failure == "interrupt" else ZeroDivisionError

    error = {"empty": ValueError, "error": ZeroDivisionError, "interrupt": KeyboardInterrupt}[failure]
    with pytest.raises(error, match="the loader gave no batch" if failure == "empty" else None):
        PostHocEMA.update_bn(loader(), model)
    assert is_equal(statistics(model), before)
    assert all(part.training for part in model.modules()) and model[1].momentum == 0.3
