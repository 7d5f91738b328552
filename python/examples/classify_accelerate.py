"""Averages in a training loop with accelerate: one line in the loop's preparation, every length afterwards.

Trains a small network that reads handwritten digits; examples/digits.py says where they come from. The same command
continues a training that was interrupted.

pip install accelerate
python python/examples/classify_accelerate.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from posthoc_ema import PostHocEMA
from posthoc_ema.integrations.accelerate import attach

DATA = Path(__file__).resolve().parents[2] / "candle" / "examples" / "digits" / "digits.csv.gz"


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Returns the digits to train with, and those to evaluate with."""
    rows = torch.from_numpy(np.loadtxt(DATA, delimiter=",", dtype=np.int64))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    images, labels = rows[:, :64].float() / 8 - 1, rows[:, 64]
    # Noise keeps a small network from learning them by heart.
    images += 0.7 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images[:1000], labels[:1000]), TensorDataset(images[1000:], labels[1000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("classify-accelerate"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, held_out = digits()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    batches = DataLoader(train, batch_size=4, shuffle=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    ema = PostHocEMA.from_model(
        model,
        arguments.out / "ema",
        update_every=5,
        checkpoint_every=arguments.steps // 20,
        rank_zero_only=True,
        resume=True,
    )
    # From here on, optimizer steps update the averages, and save_state and load_state take them along.
    attach(accelerator, ema, model, optimizer)
    state = arguments.out / "state"
    if state.exists():
        accelerator.load_state(state)
    while ema.step < arguments.steps:
        for images, labels in batches:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(images), labels))
                optimizer.step()
                optimizer.zero_grad()
            if ema.step >= arguments.steps:
                break
        accelerator.save_state(state)
    ema.finish()

    def loss(network: torch.nn.Module) -> float:
        images, labels = held_out.tensors
        with torch.no_grad():
            return float(cross_entropy(network(images), labels))

    if accelerator.is_main_process:
        network = accelerator.unwrap_model(model)
        print(f"last weights: {loss(network):.4f}")
        swept = PostHocEMA.from_path(arguments.out / "ema").sweep(
            loss, sigma_rels=[0.02, 0.05, 0.1, 0.15, 0.2, 0.25], model=network, progress=False
        )
        print(f"best average, {swept.best.profile}: {swept.best.score:.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
