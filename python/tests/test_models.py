"""Tracked tensors of a model, their names, and the errors of models that cannot be tracked."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DlpackOnly, shake, train
from torch.testing._internal.two_tensor import TwoTensor

from posthoc_ema import PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 10}


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def names(ema: PostHocEMA) -> set[str]:
    with ema.state_dict(0.15) as state_dict:
        return set(state_dict)


def test_only_save_diff_tracks_trained_parameters_and_batch_statistics(run_dir: Path) -> None:
    model = net()
    model.register_buffer("scale", torch.ones(3))
    model[0].requires_grad_(False)
    ema = PostHocEMA.from_model(model, run_dir, only_save_diff=True, **OPTIONS)
    train(ema, model, 10)
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert names(ema) == {"1.weight", "1.bias", "2.weight", "2.bias"} | statistics
    frozen = model[0].weight.detach().clone()
    with ema.model(model, 0.15):
        assert torch.equal(model[0].weight, frozen)
    # A parameter that is frozen later stays tracked; one that is unfrozen cannot be added.
    model[2].requires_grad_(False)
    train(ema, model, 1)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="tensor `0.weight`: the tensor is new, but was missing when the run began"):
        train(ema, model, 1)


def test_integers_and_booleans_are_copied(run_dir: Path) -> None:
    model = net()
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("cache", torch.ones(3), persistent=False)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    for i in range(20):
        model(torch.randn(8, 4))
        model.mask[i % 2] = not model.mask[i % 2]
        shake(model)
        ema.update_(model)
    with ema.state_dict(0.1) as state_dict:
        assert state_dict["1.num_batches_tracked"].item() == 20
        assert torch.equal(state_dict["mask"], model.mask)
        assert "cache" not in state_dict
        assert not torch.equal(state_dict["1.running_var"], model[1].running_var)


def test_options_select_tensors_by_name(run_dir: Path) -> None:
    model = net()
    ema = PostHocEMA.from_model(model, run_dir, copy=["1.*"], leave_out=["2.bias"], **OPTIONS)
    train(ema, model, 15)
    with ema.state_dict(0.1) as state_dict:
        assert "2.bias" not in state_dict
        assert torch.equal(state_dict["1.weight"], model[1].weight)
        assert not torch.equal(state_dict["0.weight"], model[0].weight)
    with pytest.raises(ValueError, match="`3.*` matches no tensor"):
        PostHocEMA.from_model(model, run_dir.parent / "other", copy=["3.*"])


class Sharded(torch.nn.Module):
    """Wrapper that holds its module under the name that FSDP uses."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self._fsdp_wrapped_module = module


@pytest.fixture
def process_group(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_names_in_files_are_without_wrappers_and_keys_are_the_models(tmp_path: Path, process_group: None) -> None:
    plain = set(net().state_dict())
    inner = net()
    inner[2] = Sharded(inner[2])
    named_module = torch.nn.Module()
    named_module.module = net()
    for i, (model, expected) in enumerate(
        [
            (torch.compile(net()), plain),
            (torch.nn.parallel.DistributedDataParallel(net()), plain),
            (torch.nn.parallel.DistributedDataParallel(torch.compile(net())), plain),
            (torch.nn.DataParallel(net()), plain),
            (inner, plain),
            # A submodule named `module` is not a wrapper.
            (named_module, {f"module.{name}" for name in plain}),
        ]
    ):
        ema = PostHocEMA.from_model(model, tmp_path / str(i), **OPTIONS)
        train(ema, model, 10)
        ema.finish()
        assert names(PostHocEMA.from_path(tmp_path / str(i))) == expected
        with ema.state_dict(0.1) as state_dict, ema.model(model, 0.1) as averaged:
            assert averaged is model
            assert all(torch.equal(tensor, state_dict[key]) for key, tensor in model.state_dict().items())
        assert names(ema) == set(model.state_dict()) == names(PostHocEMA.from_path(tmp_path / str(i), model))
        model.load_state_dict(state_dict)


def test_changed_model_is_refused_with_the_tensor_name(run_dir: Path) -> None:
    model = net()
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 3)

    def attempt(expected: str) -> None:
        with pytest.raises(ValueError, match=expected):
            ema.update_(model)

    weight = model[0].weight
    model[0].weight = torch.nn.Parameter(torch.zeros(4, 5))
    attempt(r"tensor `0.weight`: its shape is \[4, 5\], but was \[4, 4\]")
    model[0].weight = torch.nn.Parameter(torch.zeros(4, 4))
    ema.update_(model)
    model[0].weight = weight
    model.add_module("3", torch.nn.Linear(2, 2))
    attempt("tensor `3.weight`: the tensor is new, but was missing when the run began")
    del model[3]
    model[2].bias = None
    attempt("tensor `2.bias`: the tensor is missing, but was present")
    model[2].bias = torch.nn.Parameter(torch.zeros(2))
    model[1].register_buffer("extra", torch.zeros(1))
    attempt("tensor `1.extra`: the tensor is new")
    del model[1].extra
    model.half()
    attempt("tensor `0.weight`: its dtype is F16, but was F32")
    model.float()
    model[0].weight.data = model[0].weight.data[:2]
    attempt(r"tensor `0.weight`: its shape is \[2, 4\]")
    model[0].weight.data = torch.arange(16.0).reshape(4, 4)
    ema.update_(model)
    step, before = ema.step, ema.ema_models[0].ema_model[0].weight.detach().clone()
    model[0].weight.data = model[0].weight.data.t()
    ema.update_(model)
    after = ema.ema_models[0].ema_model[0].weight
    # Elements are read in the order of the shape, not of the memory.
    aim = torch.arange(16.0).reshape(4, 4).t()
    weight = (after[3, 3] - before[3, 3]) / (aim[3, 3] - before[3, 3])
    assert torch.allclose(after, before + weight * (aim - before), rtol=0, atol=1e-4)
    assert ema.step == step + 1


def test_failed_update_does_not_count_the_step(run_dir: Path) -> None:
    model = net()
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, 5)
    with pytest.raises(ValueError):
        ema.update_(torch.nn.Linear(1, 1))
    assert ema.step == 5
    train(ema, model, 1)
    assert ema.step == 6


def unfit_models() -> dict[str, tuple[torch.nn.Module, str]]:
    zero = torch.nn.Linear(2, 2)
    for parameter in zero.parameters():
        parameter.ds_id, parameter.ds_numel = 1, parameter.numel()
        parameter.data = torch.empty(0)
    freed = torch.nn.Linear(2, 2)
    freed.weight.untyped_storage().resize_(0)
    sparse = torch.nn.Module()
    sparse.register_buffer("values", torch.eye(3).to_sparse())
    with torch.device("meta"):
        meta = torch.nn.Linear(2, 2)
    small = torch.nn.Linear(2, 2)
    small.scale = torch.nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn))
    strange = torch.nn.Linear(2, 2)
    strange.register_buffer("codes", torch.zeros(2, dtype=torch.bits8))
    two = torch.nn.Linear(2, 2)
    two.weight = torch.nn.Parameter(TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))
    return {
        "meta": (meta, "`weight`: it is on the meta device"),
        "lazy": (torch.nn.LazyLinear(3), "`weight`: it has no shape yet"),
        "ZeRO-3": (zero, "`weight`: ZeRO-3 .*GatheredParameters"),
        "freed": (freed, "`weight`: its storage has been freed"),
        "sparse": (sparse, "`values`: its layout is torch.sparse_coo"),
        "bits": (strange, "`codes`: torch.bits8 cannot be stored"),
        "made of others": (two, "`weight`: TwoTensor computes its elements from other tensors: name it in `leave_out`"),
        "float8": (small, "`scale`: F8_E4M3 cannot be averaged: track its master weights in f32 or bf16"),
        "nothing": (torch.nn.ReLU(), "no floating-point tensor to average"),
    }


@pytest.mark.parametrize("case", list(unfit_models()))
def test_unfit_tensors_are_refused_with_their_name(run_dir: Path, case: str) -> None:
    model, expected = unfit_models()[case]
    with pytest.raises((ValueError, RuntimeError), match=expected):
        PostHocEMA.from_model(model, run_dir)
    assert not list(run_dir.glob("*.safetensors"))


def test_tensors_that_cannot_be_averaged_can_be_copied(run_dir: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(2).to(torch.float8_e4m3fn))
    model.phase = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    ema = PostHocEMA.from_model(model, run_dir, copy=["scale"], leave_out=["phase"], **OPTIONS)
    train(ema, model, 10, lambda _: None)
    with ema.state_dict(0.1) as state_dict:
        assert torch.equal(state_dict["scale"].float(), torch.ones(2))
        assert "phase" not in state_dict


def test_dtensors_of_one_process_are_tracked_as_whole_tensors(run_dir: Path, process_group: None) -> None:
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    model = distribute_module(
        torch.nn.Linear(4, 4),
        mesh,
        lambda _, module, mesh: module.register_parameter(
            "weight", torch.nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))
        ),
    )
    with pytest.raises(ValueError, match="`weight`: it is a DTensor.*leave `rank_zero_only` out"):
        PostHocEMA.from_model(model, run_dir, rank_zero_only=True)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)

    def step(_: int) -> None:
        with torch.no_grad():
            model.weight.mul_(0.9)

    train(ema, model, 20, step)
    with ema.state_dict(0.28) as average, ema.model(model, 0.28):
        assert torch.equal(model.weight.full_tensor(), average["weight"].full_tensor())
    ema.close()
    (stored,) = PostHocEMA.from_path(run_dir).synthesize([0.28])
    assert stored["weight"].shape == (4, 4) and ema.ema_models is None


def test_mapping_of_arrays_is_averaged(run_dir: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {"a": generator.standard_normal((3, 4)), "b": generator.standard_normal(8)[::2].astype(np.float32)}
    arrays["steps"] = np.array(0)
    ema = PostHocEMA.from_model(arrays, run_dir, **OPTIONS)
    seen = []
    for step in range(1, 21):
        arrays["a"] += generator.standard_normal((3, 4))
        # As libraries with immutable arrays do, each step replaces the array.
        arrays["b"] = (arrays["b"] + 1)[::1]
        arrays["steps"] = np.array(step)
        ema.update_(arrays)
        seen.append(arrays["a"].copy())
    with ema.state_dict(0.28) as average:
        assert {type(array) for array in average.values()} == {np.ndarray}
        assert average["a"].dtype == np.float64 and average["steps"] == 20
        shares = np.diff(ema.profiles[1].cumulative(range(0, 21), 20.0))
        assert np.allclose(average["a"], np.tensordot(shares, np.stack(seen), axes=1), rtol=0, atol=1e-6)
    before = {name: array.copy() for name, array in arrays.items()}
    with ema.model(arrays, 0.28):
        assert all(np.array_equal(arrays[name], average[name]) for name in arrays)
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)
    arrays["b"].flags.writeable = False
    with pytest.raises(ValueError, match="`b`: the array is read-only"):
        with ema.model(arrays, 0.28):
            pytest.fail("the block must not run")
    with pytest.raises(TypeError, match="`a`: list is not a tensor"):
        ema.update_({**arrays, "a": [1.0]})


def test_arrays_with_dlpack_are_averaged(run_dir: Path) -> None:
    array = np.zeros(5, dtype=np.float32)
    ema = PostHocEMA.from_model({"w": DlpackOnly(array)}, run_dir, **OPTIONS)
    for _ in range(4):
        array += 1
        ema.update_({"w": DlpackOnly(array)})
    with ema.state_dict(0.28) as average:
        assert 1 < float(average["w"][0]) < 4


def test_package_works_without_pytorch(run_dir: Path) -> None:
    program = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from posthoc_ema import PostHocEMA, plan
weights = {{"w": np.zeros(4, dtype=np.float32)}}
ema = PostHocEMA.from_model(weights, {str(run_dir)!r}, update_every=1, update_after_step=0, checkpoint_every=5)
for step in range(20):
    weights["w"] += 1
    ema.update_(weights)
ema.finish()
with PostHocEMA.from_path({str(run_dir)!r}).state_dict(0.1) as average:
    assert isinstance(average["w"], np.ndarray) and 15 < average["w"][0] < 20
assert plan([0.1], steps=20000)[0].relative_error < 0.01
"""
    import subprocess

    subprocess.run([sys.executable, "-c", program], check=True)
