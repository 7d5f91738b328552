"""Trains a classifier of digits with the classes of ema-pytorch, and chooses the length of the average afterwards.

    python python/examples/ema_pytorch_digits.py --out classifier

All calls are those of ema-pytorch, which need not be installed; only the import is of this package. A second call with
the same folder continues the training. The digits are the test set of "Optical Recognition of Handwritten Digits"
(E. Alpaydin, C. Kaynak, 1998, UCI, doi:10.24432/C50P49, CC BY 4.0).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from posthoc_ema.integrations.ema_pytorch import PostHocEMA

DATA = Path(__file__).resolve().parents[2] / "candle" / "examples" / "digits" / "digits.csv.gz"
SIGMA_RELS = (0.05, 0.10, 0.15, 0.20, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and the snapshots")
    parser.add_argument("--steps", type=int, default=2000, help="steps of this call")
    args = parser.parse_args()

    torch.manual_seed(0)
    rows = torch.from_numpy(np.loadtxt(DATA, delimiter=",", dtype=np.int64))
    images, digits = rows[:, :64].float() / 8.0 - 1.0, rows[:, 64]
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    emas = PostHocEMA(
        net,
        sigma_rels=(0.05, 0.28),
        update_every=10,
        checkpoint_every_num_steps=100,
        checkpoint_dtype=torch.float32,
        checkpoint_folder=str(args.out / "post-hoc-ema-checkpoints"),
    )
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        emas.load_state_dict(state["emas"])

    first = int(emas.step)
    for step in range(first, first + args.steps):
        # A batch depends on its number only.
        chosen = torch.randint(1400, (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        functional.cross_entropy(net(images[chosen]), digits[chosen]).backward()
        optimizer.step()
        emas.update()
    torch.save({"net": net.state_dict(), "emas": emas.state_dict()}, checkpoint)

    def loss_of(module: nn.Module) -> float:
        with torch.no_grad():
            return functional.cross_entropy(module(images[1400:]), digits[1400:]).item()

    print(f"step {int(emas.step)}, loss of the last weights: {loss_of(net):.5f}")
    for sigma_rel in SIGMA_RELS:
        synthesized = emas.synthesize_ema_model(sigma_rel=sigma_rel)
        print(f"loss of the average with sigma_rel {sigma_rel}: {loss_of(synthesized):.5f}")


if __name__ == "__main__":
    main()
