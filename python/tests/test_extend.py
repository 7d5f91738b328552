"""Runs that go on with a model of other tensors: unfrozen layers, adapters, resized embeddings, another dtype."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from posthoc_ema import PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 20}


def exact(values: list[float], first: int, last: int, gamma: float) -> float:
    """Returns the power-function average of values at the steps from `first` on; the first value counts for all before.

    Its share up to step t is (t / last) ** (gamma + 1), Karras et al. (2023), equation 121.
    """
    shares = [(step / last) ** (gamma + 1) for step in range(first, last + 1)]
    weights = np.diff(shares, prepend=0.0)
    return float(np.dot(weights, values))


def train(ema: PostHocEMA, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        with torch.no_grad():
            for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
                parameter += 0.1
        ema.update_(model)


def test_unfrozen_layer_is_averaged_from_its_step_on(tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    model["body"].requires_grad_(False)
    options = {**OPTIONS, "only_save_diff": True}
    with PostHocEMA.from_model(model, tmp_path, **options) as ema:
        train(ema, model, 30)
    model["body"].requires_grad_(True)
    with pytest.raises(ValueError, match="body.bias"):
        PostHocEMA.from_model(model, tmp_path, resume=True, only_save_diff=True)
    start = model["body"].weight[0, 0].item()
    ema = PostHocEMA.from_model(model, tmp_path, resume=True, extend=True, only_save_diff=True)
    train(ema, model, 50)
    ema.finish()
    run = PostHocEMA.from_path(tmp_path)
    (plan,) = run.plan([0.28])
    (later,) = plan.later
    assert later.since == 30 and set(later.tensors) == {"body.weight", "body.bias"}
    assert later.relative_error < 1e-6
    average = run.synthesize([0.28])[0]
    gamma = plan.profile.to_dict()["gamma"]
    expected = exact([start + 0.1 * k for k in range(51)], 30, 80, gamma)
    assert average["body.weight"][0, 0].item() == pytest.approx(expected, abs=1e-5)
    with run.model(model, 0.28) as averaged:
        assert averaged["body"].weight[0, 0].item() == pytest.approx(expected, abs=1e-5)
    # Before the change, the run had the head only.
    assert set(run.synthesize([0.28], step=30)[0]) == {"head.weight", "head.bias"}


def test_grown_embedding_begins_again_and_the_rest_goes_on(tmp_path: Path) -> None:
    def build(rows: int) -> nn.ModuleDict:
        return nn.ModuleDict({"embedding": nn.Embedding(rows, 2), "out": nn.Linear(2, 2)})

    torch.manual_seed(0)
    small = build(4)
    with PostHocEMA.from_model(small, tmp_path / "run", **OPTIONS) as ema:
        train(ema, small, 40)
    large = build(6)
    large["out"].load_state_dict(small["out"].state_dict())
    with PostHocEMA.from_model(large, tmp_path / "run", resume=True, extend=True) as ema:
        train(ema, large, 40)
        live = ema.synthesize([0.1])[0]
    run = PostHocEMA.from_path(tmp_path / "run")
    average = run.synthesize([0.1])[0]
    assert average["embedding.weight"].shape == (6, 2)
    for name in average:
        torch.testing.assert_close(average[name], live[name], rtol=1e-6, atol=1e-6)
    assert run.synthesize([0.1], step=40)[0]["embedding.weight"].shape == (4, 2)
    # `out` moved by 0.1 a step without a break: its average is that of 80 steps.
    gamma = run.plan([0.1])[0].profile.to_dict()["gamma"]
    end = large["out"].bias[0].item()
    expected = exact([end - 0.1 * (80 - k) for k in range(1, 81)], 1, 80, gamma)
    assert average["out.bias"][0].item() == pytest.approx(expected, abs=0.02)


def test_bfloat16_in_mid_training(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with PostHocEMA.from_model(model, tmp_path, **OPTIONS) as ema:
        train(ema, model, 20)
    model.bfloat16()
    with pytest.raises(ValueError, match="dtype"):
        PostHocEMA.from_model(model, tmp_path, resume=True)
    with PostHocEMA.from_model(model, tmp_path, resume=True, extend=True) as ema:
        train(ema, model, 20)
    (plan,) = PostHocEMA.from_path(tmp_path).plan([0.28])
    assert plan.later == () and plan.relative_error < 1e-6
    assert PostHocEMA.from_path(tmp_path).synthesize([0.28])[0]["weight"].dtype == torch.bfloat16
