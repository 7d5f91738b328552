"""Buffers that are copied, spectral norms that fit the average, complex numbers, and tensors made of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bits, exact, shake, train
from torch.nn.utils import parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from posthoc_ema import KarrasEMA, PostHocEMA
from posthoc_ema._dtypes import PAIRS
from posthoc_ema.utils import refresh_spectral_norms

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 20}
OLD = torch.nn.utils.spectral_norm
NEW = torch.nn.utils.parametrizations.spectral_norm


def deep(norm: object, layers: int = 12) -> torch.nn.Sequential:
    return torch.nn.Sequential(*[norm(torch.nn.Linear(16, 16)) for _ in range(layers)])


def largest_singular_values(model: torch.nn.Module) -> list[float]:
    return [torch.linalg.matrix_norm(part.weight.detach(), 2).item() for part in model if hasattr(part, "weight")]


def trained_deep(norm: object, run_dir: Path) -> tuple[PostHocEMA, torch.nn.Sequential]:
    model = deep(norm)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    inputs = torch.randn(64, 16)

    def step(_: int) -> None:
        model(inputs)
        shake(model)

    train(ema, model, 200, step)
    return ema, model


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated")
@pytest.mark.parametrize("norm", [OLD, NEW])
def test_spectral_norms_fit_the_average_and_are_given_back(norm: object, run_dir: Path) -> None:
    ema, model = trained_deep(norm, run_dir)
    inputs = torch.randn(64, 16)
    before, own = bits(model), model.eval()(inputs)
    held = None if norm is NEW else [part.weight for part in model]
    with ema.model(model, 0.28) as averaged:
        for value in largest_singular_values(averaged):
            assert abs(value - 1.0) < 1e-3
        output = averaged(inputs)
        # Each layer is 1-Lipschitz, and adds a bias of the average's size.
        assert 0.01 < output.std() < 10, output.std()
    assert bits(model) == before
    assert torch.equal(model(inputs), own)
    if held is not None:
        with ema.model(model, 0.1):
            model(inputs)
        assert all(part.weight.shape == weight.shape for part, weight in zip(model, held))
    for module in (ema.ema_models[1].ema_model,):
        module.eval()(inputs)
        assert all(abs(value - 1.0) < 1e-3 for value in largest_singular_values(module))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated")
@pytest.mark.parametrize("norm", [OLD, NEW])
def test_spectral_norms_of_a_loaded_file_are_refreshed(norm: object, run_dir: Path) -> None:
    ema, model = trained_deep(norm, run_dir)
    newest = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (state_dict,) = ema.synthesize([0.28])
    copied = [name for name in newest if name.endswith(("_u", "_v"))]
    assert copied and all(torch.equal(state_dict[name], newest[name]) for name in copied)
    fresh = deep(norm)
    fresh.load_state_dict(state_dict)
    inputs = torch.randn(4, 16)
    fresh.eval()(inputs)
    assert max(largest_singular_values(fresh)) > 1.05
    assert refresh_spectral_norms(fresh) == 12
    fresh(inputs)
    assert all(abs(value - 1.0) < 1e-3 for value in largest_singular_values(fresh))
    with ema.model(model, 0.28) as averaged:
        assert torch.allclose(averaged(inputs), fresh(inputs), rtol=0, atol=1e-3)
    with pytest.raises(TypeError, match="dict is not a module"):
        refresh_spectral_norms(state_dict)
    assert refresh_spectral_norms(torch.nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("build", ["convolution", "bfloat16", "chain", "vector", "complex", "narrow", "zeros"])
def test_power_iteration_finds_the_largest_singular_value(build: str) -> None:
    if build == "convolution":
        model = torch.nn.Sequential(NEW(torch.nn.ConvTranspose2d(3, 8, 5)))
    elif build == "bfloat16":
        model = torch.nn.Sequential(NEW(torch.nn.Linear(32, 48).bfloat16()))
    elif build == "chain":
        layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 6))
        model = torch.nn.Sequential(NEW(layer))
    elif build == "vector":
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.randn(7))
        model = torch.nn.Sequential(NEW(layer))
    elif build == "complex":
        model = torch.nn.Sequential(NEW(torch.nn.Linear(7, 6, dtype=torch.complex64)))
    elif build == "narrow":
        # The largest singular values are close to each other.
        model = torch.nn.Sequential(NEW(torch.nn.Linear(400, 400)))
    else:
        model = torch.nn.Sequential(NEW(torch.nn.Linear(5, 5)))
        for name, buffer in model.named_buffers():
            if name.endswith("_u"):
                buffer.zero_()
    shake(model, 1.0)
    model.eval()
    assert refresh_spectral_norms(model) == (build != "vector")
    weight = model[0].weight.detach()
    weight = weight if build == "complex" else weight.float()
    if build == "convolution":
        weight = weight.transpose(0, 1).flatten(1)
    elif build == "vector":
        weight = weight[None]
    assert abs(torch.linalg.matrix_norm(weight, 2).item() - 1.0) < (2e-2 if build == "bfloat16" else 1e-3)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated")
def test_switch_and_karras_ema_refresh_spectral_norms(run_dir: Path) -> None:
    ema, model = trained_deep(NEW, run_dir)
    single = KarrasEMA(model, sigma_rel=0.28, update_every=1)
    for _ in range(50):
        shake(model)
        single.update()
        ema.update_(model)
    assert all(abs(value - 1.0) < 1e-3 for value in largest_singular_values(single.ema_model.eval()))
    ema.switch_(model, 0.28)
    assert all(abs(value - 1.0) < 1e-3 for value in largest_singular_values(model.eval()))


def test_pruning_masks_are_copied(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)

    def step(number: int) -> None:
        shake(model)
        if number == 100:
            model[0].weight_mask.copy_(torch.eye(8))

    train(ema, model, 120, step)
    inputs = torch.randn(3, 8)
    own, weight = model(inputs), model[0].weight
    with ema.model(model, 0.28) as averaged:
        assert torch.equal(averaged[0].weight_mask, torch.eye(8))
        # The hook's result follows before the first forward pass.
        assert torch.equal(averaged[0].weight, averaged[0].weight_orig * torch.eye(8))
        assert not torch.equal(averaged(inputs), own)
    assert model[0].weight is weight and torch.equal(model(inputs), own)
    assert torch.equal(ema.synthesize([0.1])[0]["0.weight_mask"], torch.eye(8))


def test_batch_statistics_are_averaged_and_other_buffers_are_not(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.InstanceNorm1d(3, track_running_stats=True))
    model.register_buffer("table", torch.zeros(3))
    model.register_buffer("center", torch.zeros(3))
    model.register_buffer("scale", torch.ones(3).to(torch.float8_e4m3fn))
    model.register_buffer("phase", torch.ones(3, dtype=torch.complex64))

    def step(number: int) -> None:
        for buffer in model.buffers():
            if buffer.dtype == torch.float32:
                buffer.fill_(float(number))
        model.phase.fill_(number * 1j)
        shake(model)

    def mean(ema: PostHocEMA, name: str) -> float:
        return ema.synthesize([0.28])[0][name][0].item()

    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 40, step)
    statistics = [f"{i}.{name}" for i in range(2) for name in ("running_mean", "running_var")]
    assert all(15 < mean(ema, name) < 30 for name in statistics)
    assert mean(ema, "table") == mean(ema, "center") == 40
    assert mean(ema, "phase") == 40j
    ema.close()
    # A name of a buffer is an exception from the rule; a name of a parameter leaves out all others.
    ema = PostHocEMA.from_model(model, run_dir.parent / "center", average=["cen*"], **OPTIONS)
    train(ema, model, 40, step)
    assert 15 < mean(ema, "center") < 30 and 15 < mean(ema, "0.running_var") < 30 and mean(ema, "table") == 40
    assert not torch.equal(ema.synthesize([0.28])[0]["0.weight"], model[0].weight)
    ema = PostHocEMA.from_model(model, run_dir.parent / "only", average=["center", "0.weight"], **OPTIONS)
    train(ema, model, 40, step)
    assert 15 < mean(ema, "center") < 30 and mean(ema, "0.running_var") == 40
    assert torch.equal(ema.synthesize([0.28])[0]["0.bias"], model[0].bias)


def complex_model() -> torch.nn.Module:
    model = torch.nn.Linear(2, 2)
    model.phase = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.complex64).t())
    model.wide = torch.nn.Parameter(torch.randn(5, dtype=torch.complex128))
    model.point = torch.nn.Parameter(torch.tensor(1 + 2j))
    model.register_buffer("table", torch.randn(4, dtype=torch.complex64).conj())
    model.register_buffer("wide_table", torch.randn(4, dtype=torch.complex128))
    return model


def test_complex_parameters_are_averaged_as_pairs_of_reals(run_dir: Path) -> None:
    model = complex_model()
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    seen = {name: [] for name in ("phase", "wide", "point")}

    def step(_: int) -> None:
        shake(model, 1.0)
        for name, values in seen.items():
            values.append(getattr(model, name).detach().numpy().copy())

    train(ema, model, 60, step)
    times = np.arange(1, 61)
    (state_dict,) = ema.synthesize([0.28])
    for name, values in seen.items():
        stacked = np.stack(values)
        wanted = exact(ema.profiles[1], times, stacked.real) + 1j * exact(ema.profiles[1], times, stacked.imag)
        assert state_dict[name].dtype == getattr(model, name).dtype
        assert np.abs(state_dict[name].numpy() - wanted).max() < 1e-5, name
    assert torch.equal(state_dict["table"], model.table) and torch.equal(state_dict["wide_table"], model.wide_table)
    held = ema.ema_models[1].ema_model
    assert torch.allclose(held.phase, state_dict["phase"]) and torch.allclose(held.wide, state_dict["wide"])
    before = bits(model)
    with ema.model(model, 0.28):
        assert all(torch.equal(value, state_dict[name]) for name, value in model.state_dict().items())
    assert bits(model) == before
    fresh = complex_model()
    fresh.load_state_dict(state_dict)
    half = ema.synthesize([0.28], dtype=torch.bfloat16)[0]
    assert half["phase"].dtype == torch.complex64 and half["weight"].dtype == torch.bfloat16
    ema.finish()
    ema.close()
    # A file has pairs along a last dimension of size 2; with a model they are complex again.
    pairs = PostHocEMA.from_path(run_dir).synthesize([0.28])[0]["phase"]
    assert pairs.shape == (4, 3, 2) and torch.allclose(torch.view_as_complex(pairs), state_dict["phase"], atol=1e-5)
    opened = PostHocEMA.from_path(run_dir, fresh).synthesize([0.28])[0]
    assert opened["phase"].dtype == torch.complex64
    resumed = PostHocEMA.from_model(model, run_dir, resume=True)
    assert torch.equal(resumed.synthesize([0.28])[0]["phase"], state_dict["phase"])
    resumed.switch_(model, 0.28)
    assert torch.equal(model.phase, state_dict["phase"])


def test_complex_arrays_are_averaged_as_pairs_of_reals(run_dir: Path) -> None:
    arrays = {
        "w": np.zeros((2, 3), np.complex64),
        "point": np.array(0j),
        "strided": np.zeros((4, 4), np.complex64)[::2],
    }
    ema = PostHocEMA.from_model(arrays, run_dir, **OPTIONS)
    for _ in range(20):
        for array in arrays.values():
            array += 1 - 2j
        ema.update_(arrays)
    (average,) = ema.synthesize([0.28])
    assert average["w"].dtype == np.complex64 and average["point"].dtype == np.complex128
    assert average["w"].shape == (2, 3) and np.allclose(average["w"].imag, -2 * average["w"].real)
    before = {name: array.copy() for name, array in arrays.items()}
    with ema.model(arrays, 0.28):
        assert all(np.array_equal(array, average[name]) for name, array in arrays.items())
    assert all(np.array_equal(array, before[name]) for name, array in arrays.items())


def test_runs_that_store_complex_numbers_are_resumed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    model.phase = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with monkeypatch.context() as older:
        # Older versions copied complex numbers as such, where the user asked for it.
        older.delitem(PAIRS, "complex64")
        ema = PostHocEMA.from_model(model, run_dir, copy=["phase"], **OPTIONS)
        train(ema, model, 20)
        ema.finish()
        ema.close()
    assert PostHocEMA.from_path(run_dir).synthesize([0.1])[0]["phase"].dtype == torch.complex64
    ema = PostHocEMA.from_model(model, run_dir, resume=True)
    train(ema, model, 20)
    assert torch.equal(ema.synthesize([0.1])[0]["phase"], model.phase)
    before = bits(model)
    with PostHocEMA.from_path(run_dir).model(model, 0.1, step=20):
        assert bits(model) != before
    assert bits(model) == before


def test_tensors_made_of_others_can_be_left_out(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    inner = torch.randn(4, 4)
    model[0].weight = torch.nn.Parameter(TwoTensor(inner, inner.clone()), requires_grad=False)
    with pytest.raises(ValueError, match="`0.weight`: TwoTensor computes its elements from other tensors"):
        PostHocEMA.from_model(model, run_dir, **OPTIONS)
    ema = PostHocEMA.from_model(model, run_dir, leave_out=["0.weight"], **OPTIONS)

    def step(_: int) -> None:
        shake(model[1])

    train(ema, model, 30, step)
    own = model(torch.ones(1, 4))
    with ema.model(model, 0.28):
        assert not torch.equal(model(torch.ones(1, 4)), own)
    assert torch.equal(model(torch.ones(1, 4)), own)
    assert set(ema.synthesize([0.1])[0]) == {"0.bias", "1.weight", "1.bias"}
    assert type(ema.ema_models[0].ema_model[0].weight.data) is TwoTensor


def test_parametrizations_cached_from_own_weights_are_computed_anew(run_dir: Path) -> None:
    model = torch.nn.Sequential(NEW(torch.nn.Linear(4, 4)))
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 30)
    model.eval()
    inputs = torch.randn(2, 4)
    with ema.model(model, 0.28):
        wanted = model(inputs)
    with parametrize.cached():
        own, weight = model(inputs), model[0].weight
        with ema.model(model, 0.28):
            assert torch.equal(model(inputs), wanted)
        assert model[0].weight is weight and torch.equal(model(inputs), own)


def test_resumed_run_averages_the_buffers_that_it_averaged(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    model.register_buffer("table", torch.zeros(2))

    def step(number: int) -> None:
        model.table.fill_(float(number))
        shake(model)

    # A mapping has no buffers, as if an older version had begun the run.
    ema = PostHocEMA.from_model(model.state_dict(), run_dir, **OPTIONS)
    for number in range(1, 21):
        step(number)
        ema.update_(model.state_dict())
    ema.finish()
    ema.close()
    ema = PostHocEMA.from_model(model, run_dir, resume=True)
    train(ema, model, 20, lambda number: step(20 + number))
    assert 15 < ema.synthesize([0.28])[0]["table"][0] < 30
    ema.finish()
    assert 15 < PostHocEMA.from_path(run_dir, model).synthesize([0.28])[0]["table"][0] < 30
