"""Folders of `torch.distributed.checkpoint`, written by real processes, are averaged without PyTorch."""

from __future__ import annotations

import io
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from posthoc_ema import Profile, average

EVEN = Profile.uniform(fraction=1.0)
RANKS = 3


def model(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "rows": torch.randn(7, 5, generator=generator),
        "columns": torch.randn(4, 8, 3, generator=generator).bfloat16(),
        "both": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "small": torch.randn(2, generator=generator).half(),
        "whole": torch.randn(3, generator=generator),
        "count": torch.tensor(step),
    }


def _megatron(tensors: dict[str, Any], rank: int) -> dict[str, Any]:
    """Returns the entries of a checkpoint in Megatron's layout `torch_dist`, without the number of a step."""
    entries: dict[str, Any] = {f"decoder.layers.{name}": tensor for name, tensor in tensors.items()}
    entries |= {f"decoder.layers.mlp._extra_state/shard_{i}_2": io.BytesIO(b"scales") for i in range(2)}
    entries["optimizer.state.exp_avg.decoder.layers.rows"] = torch.ones(3)
    entries["chained_0.optimizer.state.exp_avg.decoder.layers.whole"] = torch.ones(3)
    entries["rng_state/shard_0_1"] = io.BytesIO(b"state of rank %d" % rank)
    return entries


def _save(rank: int, port: int, folder: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))
    for step in (10, 20):
        tensors: dict[str, Any] = model(step)
        for name, dimension in [("rows", 0), ("columns", 1), ("both", 1), ("small", 0)]:
            tensors[name] = distribute_tensor(tensors[name], mesh, [Shard(dimension)])
        moments = {"state": {"rows": {"exp_avg": torch.ones(2)}}, "lr": 0.1}
        dcp.save({"model": tensors, "optim": moments, "epoch": step}, checkpoint_id=f"{folder}/step-{step}")
        dcp.save(tensors, checkpoint_id=f"{folder}/flat-{step}")
        writer = dcp.HuggingFaceStorageWriter(path=f"{folder}/shards-{step}", save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        # The consolidation of PyTorch fails for integers.
        floats = {name: tensor for name, tensor in tensors.items() if name != "count"}
        path = f"{folder}/both-{step}"
        writer = dcp.HuggingFaceStorageWriter(path=path, save_distributed=True, enable_consolidation=True)
        dcp.save(floats, storage_writer=writer)
        dcp.save(_megatron(tensors, rank), checkpoint_id=f"{folder}/megatron/iter_{step:07}")
        if rank == 0:
            torch.save({"args": None, "iteration": step}, f"{folder}/megatron/iter_{step:07}/common.pt")
            Path(f"{folder}/megatron/iter_{step:07}/metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        accelerate = f"{folder}/accelerate/checkpoint_{step}"
        dcp.save({"model": tensors}, checkpoint_id=f"{accelerate}/pytorch_model_fsdp_0")
        dcp.save({"optimizer": moments}, checkpoint_id=f"{accelerate}/optimizer_0")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_save, args=(port, str(folder)), nprocs=RANKS)  # type: ignore[attr-defined,no-untyped-call]
    return folder


def assert_is_mean(found: dict[str, torch.Tensor]) -> None:
    states = [model(10), model(20)]
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        exact = sum(state[name].double() for state in states) / 2 if tensor.is_floating_point() else states[1][name]
        assert isinstance(exact, torch.Tensor) and tensor.shape == exact.shape
        assert torch.equal(tensor, exact.to(tensor.dtype)), name


@pytest.mark.parametrize(("pattern", "key"), [("step", None), ("step", "model"), ("flat", None)])
def test_tensors_are_assembled_from_their_parts(run: Path, pattern: str, key: str | None) -> None:
    (found,) = average([run / f"{pattern}-10", run / f"{pattern}-20"], EVEN, key=key)
    assert [weight.step for weight in found.weights] == [10, 20]
    assert found.state_dict is not None
    assert_is_mean(found.state_dict)


def test_average_of_folders_is_a_file(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    average([run / "step-10", run / "step-20"], EVEN, tmp_path / "mean.safetensors")
    assert_is_mean(load_file(tmp_path / "mean.safetensors"))


def test_shards_of_safetensors_are_assembled(run: Path) -> None:
    (found,) = average([run / "shards-10", run / "shards-20"], EVEN)
    assert [weight.step for weight in found.weights] == [10, 20]
    assert found.state_dict is not None
    assert_is_mean(found.state_dict)
    shards = sorted(run.glob("shards-*/*.safetensors"))
    assert len(shards) == 2 * RANKS
    message = "a shard of a distributed checkpoint, which holds parts of tensors: name the folder of all shards"
    with pytest.raises(ValueError, match=message):
        average(shards[:2], EVEN, steps=[10, 20])
    with pytest.raises(ValueError, match="shards-10: a safetensors file has no entry `model`"):
        average([run / "shards-10", run / "shards-20"], EVEN, key="model")


def test_whole_files_of_the_same_writer_are_read(run: Path, tmp_path: Path) -> None:
    (found,) = average([run / "both-10", run / "both-20"], EVEN)
    assert found.state_dict is not None
    assert_is_mean({**found.state_dict, "count": torch.tensor(20)})
    for step in (10, 20):
        writer = dcp.HuggingFaceStorageWriter(path=str(tmp_path / f"whole-{step}"))
        with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
            dcp.save(model(step), storage_writer=writer, no_dist=True)
    (found,) = average([tmp_path / "whole-10", tmp_path / "whole-20"], EVEN)
    assert found.state_dict is not None
    assert_is_mean(found.state_dict)


def test_incomplete_shards_are_named(run: Path, tmp_path: Path) -> None:
    import shutil

    paths = [Path(shutil.copytree(run / f"shards-{step}", tmp_path / f"shards-{step}")) for step in (10, 20)]
    last = paths[0] / "shard-00003-model-00001-of-00001.safetensors"
    content = last.read_bytes()
    last.unlink()
    # The files do not say how many they are, but the shapes are smaller than those of the other checkpoint.
    with pytest.raises(ValueError, match=r"`both`"):
        average(paths, EVEN)
    last.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="shard-00003-model-00001-of-00001.safetensors: "):
        average(paths, EVEN)
    last.write_bytes(content)
    (paths[1] / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shards-20: `shard-00002-\*\.safetensors` is missing"):
        average(paths, EVEN)
    # A set with consecutive numbers can have holes, too.
    (paths[1] / last.name).rename(paths[1] / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match=r"the parts of tensor `both` hold 20 of its 35 elements"):
        average(paths, EVEN)


def test_checkpoints_of_megatron_are_read(run: Path) -> None:
    with pytest.warns(UserWarning, match=r"left out: .*_extra_state/shard_0_2` and .*_extra_state/shard_1_2`"):
        (found,) = average([run / "megatron"], EVEN)
    assert [weight.step for weight in found.weights] == [10, 20]
    assert found.state_dict is not None
    assert_is_mean({name.removeprefix("decoder.layers."): tensor for name, tensor in found.state_dict.items()})


def save_alone(state: dict[str, Any], path: Path, **options: Any) -> None:
    """Saves by one process; PyTorch warns that it is alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, no_dist=True, **options)


def test_a_tensor_that_megatron_reshaped_is_refused(tmp_path: Path) -> None:
    class Described(dcp.DefaultSavePlanner):
        """Adds to the contents what Megatron's planner does for a tensor that it stores in another shape."""

        def create_global_plan(self, all_plans: list[Any]) -> Any:
            plan, metadata = super().create_global_plan(all_plans)
            cut = {"nd_reformulated_orig_global_shape": (4, 6), "prepend_axis_num": 0}
            vars(metadata)["mcore_data"] = {"experts.weight": cut}
            return plan, metadata

    paths = [tmp_path / f"iter_{step:07}" for step in (10, 20)]
    for step, path in zip((10, 20), paths):
        tensors = {"experts.weight": torch.ones(2, 2, 6) * step, "norm.weight": torch.ones(3) * step}
        save_alone(tensors, path, planner=Described())
    with pytest.raises(ValueError, match=r"`experts.weight` is stored in another shape by Megatron: leave it out"):
        average(paths, EVEN)
    with pytest.warns(UserWarning, match="left out: `experts.weight`"):
        (found,) = average(paths, EVEN, leave_out=["experts.weight"])
    assert found.state_dict is not None and found.state_dict.keys() == {"norm.weight"}
    assert torch.equal(found.state_dict["norm.weight"], torch.full((3,), 15.0))


class Trained:
    """State of a training that is not a tensor."""

    def __init__(self, step: int) -> None:
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step, dtype=torch.int32), "ntokens_seen": torch.tensor(8 * self.step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def test_checkpoints_of_torchtitan_are_read(tmp_path: Path) -> None:
    """Entries as torchtitan's `CheckpointManager` flattens them: the model's names beside the state of the training."""
    models = {}
    for step in (10, 20):
        torch.manual_seed(step)
        layer = {"attention.wq.weight": torch.randn(4, 4), "attention_norm.weight": torch.randn(4)}
        tensors = {"tok_embeddings.weight": torch.randn(8, 4), "output.weight": torch.randn(8, 4)}
        tensors |= {f"layers.0.{name}": tensor for name, tensor in layer.items()}
        models[step] = {name: tensor.clone() for name, tensor in tensors.items()}
        optimizer = {f"state.{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in tensors.items()}
        optimizer |= {f"param_groups.{name}.lr": 0.1 for name in tensors}
        state = {
            "optimizer": optimizer,
            "lr_scheduler": {"last_epoch": step},
            "dataloader": {"dp_rank_0": b"position", "world_size": 1},
            "train_state": Trained(step),
        }
        save_alone(tensors | state, tmp_path / "checkpoint" / f"step-{step}")
    (found,) = average([tmp_path / "checkpoint"], EVEN)
    assert [weight.step for weight in found.weights] == [10, 20]
    assert found.state_dict is not None and found.state_dict.keys() == models[10].keys()
    for name, tensor in found.state_dict.items():
        assert torch.equal(tensor, ((models[10][name].double() + models[20][name].double()) / 2).float()), name


def test_folders_of_accelerate_are_looked_into(run: Path) -> None:
    folder = run / "accelerate"
    for paths in ([folder], [folder / "checkpoint_10", folder / "checkpoint_20"]):
        (found,) = average(paths, EVEN)
        assert [weight.step for weight in found.weights] == [10, 20]
        assert found.state_dict is not None
        assert_is_mean(found.state_dict)
    with pytest.raises(ValueError, match="this is one checkpoint, with nothing to average it with"):
        average([folder / "checkpoint_10"], EVEN)


def test_incomplete_folders_name_what_is_missing(run: Path, tmp_path: Path) -> None:
    import pickle
    import shutil

    folder = shutil.copytree(run / "step-10", tmp_path / "gone-10")
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(FileNotFoundError, match=r"__1_0\.distcp"):
        average([folder, run / "step-20"], EVEN)
    folder = shutil.copytree(run / "step-10", tmp_path / "short-10")
    content = (folder / "__2_0.distcp").read_bytes()
    (folder / "__2_0.distcp").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"__2_0\.distcp: .*ends after it: the file is incomplete"):
        average([folder, run / "step-20"], EVEN)
    folder = shutil.copytree(run / "step-10", tmp_path / "hole-10")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.rows"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"the parts of tensor `model\.rows` hold 30 of its 35 elements"):
        average([folder, run / "step-20"], EVEN)
    with pytest.raises(ValueError, match=r"--key \(`key`\) may be one of `epoch`, `model` and `optim`"):
        average([run / "step-10", run / "step-20"], EVEN, key="net")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "columns",
            lambda entry: setattr(entry.properties, "dtype", torch.float32),
            r"__0_0\.distcp: a part of tensor `model\.columns` is bfloat16, but float32 in \.metadata: "
            "the files are of different saves; copy all files of one save, or save again$",
        ),
        (
            "rows",
            lambda entry: setattr(entry.properties, "dtype", torch.complex128),
            r"a part of tensor `model\.rows` is float32, but complex128 in \.metadata",
        ),
        (
            "rows",
            lambda entry: setattr(entry.chunks[0], "sizes", torch.Size([3, 4])),
            r"a part of tensor `model\.rows` is of shape \[3, 5\], but of shape \[3, 4\] in \.metadata",
        ),
        (
            "rows",
            lambda entry: setattr(entry, "size", torch.Size([8, 5])),
            r"the parts of tensor `model\.rows` hold 35 of its 40 elements",
        ),
    ],
)
def test_contents_that_differ_from_the_list_are_refused(
    run: Path, tmp_path: Path, name: str, change: Callable[[Any], None], message: str
) -> None:
    import pickle
    import shutil

    folder = shutil.copytree(run / "step-10", tmp_path / "other-10")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata.state_dict_metadata[f"model.{name}"])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=message):
        average([folder, run / "step-20"], EVEN)


def test_shards_of_two_dtypes_are_refused(run: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    folder = shutil.copytree(run / "shards-10", tmp_path / "mixed-10")
    path = folder / "shard-00002-model-00001-of-00001.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors | {"rows": tensors["rows"].half()}, path, metadata)
    with pytest.raises(ValueError, match=r"the parts of tensor `rows` have different dtypes \(F32 and F16\)"):
        average([folder, run / "shards-20"], EVEN)
