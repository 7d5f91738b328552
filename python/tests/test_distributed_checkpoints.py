"""Folders of `torch.distributed.checkpoint`, written by real processes, are averaged without PyTorch."""

from __future__ import annotations

import os
import socket
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
        dcp.save({name: tensor for name, tensor in tensors.items() if name != "count"}, storage_writer=writer)
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


def test_safetensors_with_parts_of_tensors_are_refused(run: Path) -> None:
    shards = sorted(run.glob("shards-*/*.safetensors"))
    assert len(shards) == 2 * RANKS
    with pytest.raises(ValueError, match="a shard of a distributed checkpoint, which holds parts of tensors"):
        average(shards[:2], EVEN, steps=[10, 20])


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
