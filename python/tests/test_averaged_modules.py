"""Averages as modules: their weights after the module was moved, and single averages in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import exact, shake

from posthoc_ema import KarrasEMA, PostHocEMA, Profile

LONG = Profile.sigma_rel(0.28)


class Averages:
    """The same average of a model, by a run and in memory."""

    def __init__(self, model: torch.nn.Module, directory: Path, **options: Any):
        self.model = model
        self.run = PostHocEMA.from_model(model, directory, profiles=[LONG], update_every=1, update_after_step=0)
        self.single = KarrasEMA(model, sigma_rel=0.28, update_every=1, **options)
        self.values: list[dict[str, np.ndarray]] = []

    def train(self, steps: int) -> None:
        for _ in range(steps):
            shake(self.model)
            self.run.update_(self.model)
            self.single.update()
            self.values.append({name: p.detach().numpy().copy() for name, p in self.model.named_parameters()})

    def modules(self) -> list[torch.nn.Module]:
        assert self.run.ema_models is not None
        return [self.run.ema_models[0].ema_model, self.single.ema_model]

    def expected(self, name: str) -> np.ndarray:
        times = np.arange(1, len(self.values) + 1)
        return exact(LONG, times, np.stack([values[name] for values in self.values]))


@pytest.mark.parametrize(
    "move",
    [{"memory_format": torch.channels_last}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}],
    ids=["strides", "float64", "bfloat16"],
)
def test_modules_that_were_moved_hold_the_average(run_dir: Path, move: dict[str, Any]) -> None:
    averages = Averages(torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Conv2d(3, 2, 2)), run_dir)
    averages.train(5)
    moved = [module.to(**move) for module in averages.modules()]
    averages.train(5)
    for module, before in zip(averages.modules(), moved):
        assert module is before
        for name, parameter in module.named_parameters():
            error = np.abs(parameter.detach().double().numpy() - averages.expected(name)).max()
            assert error < (0.01 if parameter.dtype == torch.bfloat16 else 1e-6), name
            assert "memory_format" not in move or parameter.dim() != 4 or not parameter.is_contiguous()


def test_average_in_memory_copies_names_and_takes_a_module(run_dir: Path) -> None:
    model, given = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    averages = Averages(model, run_dir, copy=["bias"], ema_model=given)
    averages.train(5)
    assert averages.single.ema_model is given
    assert torch.equal(given.bias, model.bias)
    assert np.abs(given.weight.detach().numpy() - averages.expected("weight")).max() < 1e-6
