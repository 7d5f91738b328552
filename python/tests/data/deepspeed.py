"""Records `deepspeed.tar.xz`: checkpoints of DeepSpeed (0.19.8), and what its own script makes of them.

    pip install deepspeed ninja
    DS_ACCELERATOR=cpu python python/tests/data/deepspeed.py

Three processes train a small model in each stage of ZeRO and save it twice.
"""

from __future__ import annotations

import io
import os
import socket
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import nn

ARCHIVE = Path(__file__).parent / "deepspeed.tar.xz"
RANKS = 3
STEPS = (2, 4)
STAGES: dict[int, dict[str, Any]] = {
    0: {},
    1: {},
    2: {"round_robin_gradients": True},
    3: {"stage3_param_persistence_threshold": 0, "sub_group_size": 20},
}


class Net(nn.Module):
    """Has several groups, a tied and a frozen layer, buffers, and sizes that three does not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 3, bias=False)
        self.tied = nn.Linear(5, 3, bias=False)
        self.tied.weight = self.second.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x))
        output: torch.Tensor = self.frozen(self.second(hidden) + self.tied(hidden)) * self.scale
        return output


def train(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS))
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    for stage, options in STAGES.items():
        torch.manual_seed(stage)
        model = Net()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1]},
            {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(groups, lr=0.05),
            config={
                "train_micro_batch_size_per_gpu": 4,
                "zero_optimization": {"stage": stage, **options},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": True},
            },
        )
        generator = torch.Generator().manual_seed(rank)
        for step in range(1, max(STEPS) + 1):
            x = torch.randn(4, 7, generator=generator).bfloat16()
            engine.backward(engine(x).float().pow(2).mean())
            engine.step()
            if step in STEPS:
                engine.save_checkpoint(f"{folder}/stage{stage}")
    torch.distributed.destroy_process_group()


def main() -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(train, args=(port, folder), nprocs=RANKS)  # type: ignore[attr-defined,no-untyped-call]
        for stage in list(STAGES)[1:]:
            for step in STEPS:
                run = Path(folder, f"stage{stage}")
                state = get_fp32_state_dict_from_zero_checkpoint(str(run), f"global_step{step}")
                Path(folder, "expected").mkdir(exist_ok=True)
                path = Path(folder, f"expected/stage{stage}-{step}.safetensors")
                save_file({name: tensor.clone() for name, tensor in state.items()}, path)
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and path.suffix != ".py":
                    # Without times and names of users, so that nothing but the contents counts.
                    entry = tarfile.TarInfo(str(path.relative_to(folder)))
                    entry.size = path.stat().st_size
                    archive.addfile(entry, io.BytesIO(path.read_bytes()))


if __name__ == "__main__":
    main()
