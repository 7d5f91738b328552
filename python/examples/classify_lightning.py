"""Averages in a training with Lightning: one callback in the training, every length afterwards.

Trains a small network that reads handwritten digits; examples/digits.py says where they come from.

pip install lightning
python python/examples/classify_lightning.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from posthoc_ema import PostHocEMA
from posthoc_ema.integrations.lightning import PostHocEMACallback

DATA = Path(__file__).resolve().parents[2] / "candle" / "examples" / "digits" / "digits.csv.gz"


class Reader(pl.LightningModule):
    """Reads digits, with a learning rate that never settles."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, digits = batch
        return cross_entropy(self.net(images), digits)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, digits = batch
        self.log("loss", cross_entropy(self.net(images), digits))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Returns the digits to train with, and those to validate with."""
    rows = torch.from_numpy(np.loadtxt(DATA, delimiter=",", dtype=np.int64))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    images, labels = rows[:, :64].float() / 8 - 1, rows[:, 64]
    # Noise keeps a small network from learning them by heart.
    images += 0.7 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images[:1000], labels[:1000]), TensorDataset(images[1000:], labels[1000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("classify-lightning"), help="folder of the run; must be new")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    arguments = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    train, held_out = digits()
    module = Reader()

    # The validations are made with the average of length 0.1; the checkpoints hold the module's own weights, and all
    # that the averages need to continue from them: trainer.fit(..., ckpt_path="last").
    averages = PostHocEMACallback(
        arguments.out / "ema", evaluate_with=0.1, update_every=5, checkpoint_every=arguments.steps // 20
    )
    checkpoints = ModelCheckpoint(arguments.out / "checkpoints", monitor="loss", save_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_steps=arguments.steps, accelerator="cpu", callbacks=[averages, checkpoints], max_epochs=-1, **quiet
    )
    trainer.fit(module, DataLoader(train, batch_size=8, shuffle=True), DataLoader(held_out, batch_size=1000))

    def loss(model: Reader) -> float:
        images, labels = held_out.tensors
        with torch.no_grad():
            return float(cross_entropy(model.net(images), labels))

    print(f"last weights: {loss(module):.4f}")
    swept = PostHocEMA.from_path(arguments.out / "ema").sweep(
        loss, sigma_rels=[0.02, 0.05, 0.1, 0.15, 0.2, 0.25], model=module, progress=False
    )
    print(f"best average, {swept.best.profile}: {swept.best.score:.4f}")


if __name__ == "__main__":
    main()
