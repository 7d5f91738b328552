"""Lightning's ModelParallelStrategy: the callback tracks the shards of each rank, and continues from a checkpoint."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import Group, sized_group
from sharded_models import whole

from posthoc_ema import PostHocEMA

pytest.importorskip("lightning")
OPTIONS: dict[str, Any] = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 2}


def _module() -> Any:
    import lightning
    from torch.distributed.fsdp import fully_shard

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3))
            self.looked: list[dict[str, torch.Tensor]] = []

        def configure_model(self) -> None:
            if not hasattr(self.net[0], "reshard"):
                for part in (self.net[0], self.net[2], self.net):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def validation_step(self, batch: torch.Tensor, _: int) -> None:
            self.net(batch)
            self.looked.append(whole(self.net))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(12, 5), batch_size=2)

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(2, 5), batch_size=2)

    return Module()


def _fit(rank: int, folder: str, steps: int, ckpt_path: str | None) -> Any:
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    from posthoc_ema.integrations.lightning import PostHocEMACallback

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "1"})
    warnings.simplefilter("ignore")
    try:
        callback = PostHocEMACallback(f"{folder}/ema", evaluate_with=0.28, **OPTIONS)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=3,
            strategy=ModelParallelStrategy(data_parallel_size=3, tensor_parallel_size=1, process_group_backend="gloo"),
            max_steps=steps,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        model = _module()
        trainer.fit(model, ckpt_path=ckpt_path)
        trainer.save_checkpoint(f"{folder}/{steps}.ckpt")
    finally:
        for name in (*place, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)
    assert callback.ema is not None
    return callback.ema.step, model.looked[-1], whole(model.net)


def test_callback_tracks_shards(groups: list[Group], tmp_path: Path) -> None:
    group = sized_group(groups, 3)
    group(_fit, str(tmp_path), 6, None)
    results = group(_fit, str(tmp_path), 12, str(tmp_path / "6.ckpt"))
    for step, looked, own in results:
        assert step == 12
        (average,) = PostHocEMA.from_path(tmp_path / "ema").synthesize([0.28])
        assert all(torch.equal(average[f"net.{name}"], looked[name]) for name in looked)
        assert not torch.equal(own["0.weight"], looked["0.weight"])
