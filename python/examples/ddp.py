"""Averages of a data-parallel training: several processes train, evaluate an average together, and resume.

    torchrun --standalone --nproc_per_node 2 python/examples/ddp.py --steps 300
    torchrun --standalone --nproc_per_node 2 python/examples/ddp.py --steps 600     # goes on

A small network learns a noisy function, on the CPU with gloo, within seconds. On GPUs the backend is nccl, and the
model is moved to the device of LOCAL_RANK.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from posthoc_ema import PostHocEMA

LENGTHS = (0.05, 0.10, 0.20)
BATCH = 32
EVALUATE_EVERY = 100


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    # Before the averages, so that they know the ranks.
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.BatchNorm1d(64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    # All ranks call it; rank 0 tracks and writes.
    ema = PostHocEMA.from_model(
        model,
        options.out / "ema",
        update_every=5,
        update_after_step=0,
        checkpoint_every=25,
        resume=checkpoint.exists(),
        rank_zero_only=True,
    )
    say(f"{dist.get_world_size()} processes, from step {ema.step}")
    for step in range(ema.step + 1, options.steps + 1):
        x, y = batch(seed=step * dist.get_world_size() + dist.get_rank())
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        ema.update_(model)
        if step % EVALUATE_EVERY == 0:
            # All ranks call it: each gets the same average, and evaluates its share of the data.
            with ema.model(model, LENGTHS[1]):
                averaged = evaluate(net)
            say(f"step {step}: loss {evaluate(net):.5f}, of the average {averaged:.5f}")
            save(ema, model, optimizer, checkpoint)
    averages = ema.synthesize(LENGTHS)
    for length, average in zip(LENGTHS, averages):
        model.load_state_dict(average)
        say(f"sigma_rel {length:.2f}: loss {evaluate(net):.5f}")
    ema.finish()
    ema.close()
    dist.destroy_process_group()


def save(ema: PostHocEMA, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Stores the training's checkpoint, and the averages of the same step."""
    if dist.get_rank() == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    ema.save()


def evaluate(net: torch.nn.Module) -> float:
    """Returns the loss over the test data of all ranks."""
    training = net.training
    net.eval()
    with torch.no_grad():
        x, y = batch(seed=10**6 + dist.get_rank(), noise=0.0, size=1024)
        loss = torch.nn.functional.mse_loss(net(x), y)
    net.train(training)
    # Every rank made the same number of calls, on the module inside: DistributedDataParallel would communicate.
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def batch(seed: int, noise: float = 0.5, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns inputs and noisy targets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    y = (x[:, :4] * x[:, 4:]).sum(1, keepdim=True).sin()
    return x, y + noise * torch.randn(size, 1, generator=generator)


def say(text: str) -> None:
    """Prints a line once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="train until this step")
    parser.add_argument("--out", type=Path, default=Path("ddp"), help="folder of the checkpoint and the run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
    # Leaves out the end of the interpreter, in which a thread of gloo sometimes aborts the process (torch 2.15).
    sys.stdout.flush()
    os._exit(0)
