"""Worker of `formats`: writes one model as four libraries do, and averages by PyTorch and OLMo-core.

make FOLDER MODEL SIZE STEP...          files and folders KIND-STEP, but none of torch.distributed.checkpoint
distribute FOLDER MODEL SIZE STEP...    folders FOLDER-STEP of torch.distributed.checkpoint
KIND OUT INPUT...                       the mean by hand, again for each request: `pt` files, `dcp` or `olmo` folders
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import models
import serve

RANKS = 2
Tensors = dict[str, torch.Tensor]


def weights(model: str, size: str, step: int) -> Tensors:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in models.MODELS[model][size].items()}


def make(folder: Path, model: str, size: str, steps: list[int]) -> None:
    folder.mkdir(parents=True)
    for step in steps:
        tensors = weights(model, size, step)
        save_file(tensors, folder / f"safetensors-{step}.safetensors", {"format": "pt"})
        torch.save(tensors, folder / f"pt-{step}.pt")
        for stage in (2, 3):
            deepspeed(folder / f"zero{stage}-{step}", tensors, stage, step)


def distribute(folder: Path, model: str, size: str, steps: list[int]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, folder, model, size, steps)
    torch.multiprocessing.spawn(distributed, args=arguments, nprocs=RANKS)  # type: ignore[attr-defined,no-untyped-call]


def distributed(rank: int, port: int, folder: Path, model: str, size: str, steps: list[int]) -> None:
    """Writes folders of torch.distributed.checkpoint; each process has half the rows of every tensor."""
    import torch.distributed as dist
    from torch.distributed import checkpoint
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,))
    for step in steps:
        tensors = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in weights(model, size, step).items()}
        checkpoint.save({"model": tensors}, checkpoint_id=folder.with_name(f"{folder.name}-{step}"))
    dist.destroy_process_group()


def deepspeed(folder: Path, tensors: Tensors, stage: int, step: int) -> None:
    """Writes a checkpoint with the entries that DeepSpeed's own script reads: f32 weights in parts of two processes."""
    folder.mkdir()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    flat = [tensor.flatten() for tensor in tensors.values()]
    whole = torch.cat(flat)
    half = -(-whole.numel() // RANKS)
    for rank in range(RANKS):
        if stage == 3:
            sizes = [-(-each.numel() // RANKS) for each in flat]
            parts = [each[rank * n : (rank + 1) * n] for each, n in zip(flat, sizes)]
            own = torch.cat([torch.nn.functional.pad(part, (0, n - part.numel())) for part, n in zip(parts, sizes)])
        else:
            own = whole[rank * half : (rank + 1) * half].clone()
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        optimizer = {"zero_stage": stage, "partition_count": [RANKS], key: [own]}
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        states = {"module": {}, "param_shapes": [shapes], "global_steps": step}
        if stage == 3 or rank == 0:
            prefix = f"zero_pp_rank_{rank}_" if stage == 3 else ""
            torch.save(states, folder / f"{prefix}mp_rank_00_model_states.pt")


def mean(out: Path, inputs: list[Path], read: Callable[[Path], Tensors]) -> None:
    """Reads all inputs, adds them up in f32, and saves the mean."""
    total: Tensors = {}
    for path in inputs:
        for name, tensor in read(path).items():
            total[name] = total[name].add_(tensor) if name in total else tensor.clone()
    save_file({name: tensor.div_(len(inputs)) for name, tensor in total.items()}, out, {"format": "pt"})


def read_pt(path: Path) -> Tensors:
    loaded: Tensors = torch.load(path, mmap=True, weights_only=True)
    return loaded


def read_dcp(path: Path) -> Tensors:
    """Converts a folder to a file by PyTorch's own function, beside the input's memory, and loads that."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    converted = Path(sys.argv[2]).parent / "converted.pt"
    dcp_to_torch_save(path, converted)
    loaded: dict[str, Any] = torch.load(converted, mmap=True, weights_only=True)
    converted.unlink()
    tensors: Tensors = loaded["model"]
    return tensors


def read_olmo(path: Path) -> Tensors:
    """Converts a folder to a safetensors file by OLMo-core, and loads that."""
    from olmo_core.distributed.checkpoint import unshard_checkpoint

    converted = Path(sys.argv[2]).parent / "converted"
    model, _ = unshard_checkpoint(str(path), str(converted), optim=False, use_safetensors=True, quiet=True)
    tensors = load_file(model)
    shutil.rmtree(converted)
    return tensors


READERS = {"pt": read_pt, "dcp": read_dcp, "olmo": read_olmo}
# Modules that are imported before the first request.
IMPORTS = {
    "pt": "torch",
    "dcp": "torch.distributed.checkpoint.format_utils",
    "olmo": "olmo_core.distributed.checkpoint",
}


if __name__ == "__main__":
    if sys.argv[1] in ("make", "distribute"):
        {"make": make, "distribute": distribute}[sys.argv[1]](
            Path(sys.argv[2]), sys.argv[3], sys.argv[4], [int(step) for step in sys.argv[5:]]
        )
    else:
        kind, result, *given = sys.argv[1:]
        Path(result).parent.mkdir(parents=True, exist_ok=True)
        importlib.import_module(IMPORTS[kind])
        work = lambda: mean(Path(result), [Path(path) for path in given], READERS[kind])  # noqa: E731
        with torch.no_grad():
            serve.serve({"go": lambda: {"seconds": serve.seconds_of(work)[0]}})
