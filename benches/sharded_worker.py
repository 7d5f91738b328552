"""One rank of a sharded model: averages its shards, by requests on standard input."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from posthoc_ema import PostHocEMA


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--store", help="file by which the ranks meet")
    parser.add_argument("--dimension", type=int, help="dimension that FSDP2 cuts; default: no FSDP2")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--steps", type=int, default=0, help="snapshots to write before the first request")
    parser.add_argument("--run", required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = build(options)
    ema = PostHocEMA.from_model(
        model,
        options.run,
        update_every=1,
        update_after_step=0,
        checkpoint_every=1 if options.steps else 1 << 30,
        checkpoint_dtype=torch.float16,
        snapshot_growth=None,
    )
    for step in range(options.steps):
        for parameter in model.parameters():
            local_part(parameter).mul_(0.999).add_(0.001 * step)
        ema.update_(model)
    if options.steps:
        ema.finish()
    parameters = [local_part(p) for p in model.parameters()]
    averages = [torch.zeros_like(p) for p in parameters]
    work = {
        "update": lambda: ema.update_(model),
        "limit": lambda: torch._foreach_lerp_(averages, parameters, 0.1),
    }
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "hello":
            held = sum(p.numel() for p in parameters)
            print(json.dumps({"parameters": held, "averages": ema_bytes(held)}), flush=True)
            continue
        print(json.dumps(timed(work[request["do"]], request["times"])), flush=True)


def build(options: argparse.Namespace) -> torch.nn.Module:
    """Returns linear layers, whose parameters all ranks draw alike."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(options.width, options.width) for _ in range(options.layers)))
    if options.dimension is None:
        return model
    dist.init_process_group("gloo", init_method=f"file://{options.store}", rank=options.rank, world_size=options.ranks)
    mesh = init_device_mesh("cpu", (options.ranks,))
    return fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(options.dimension if p.ndim > 1 else 0))


def local_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Returns the elements that this rank holds."""
    data = parameter.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def ema_bytes(parameters: int) -> int:
    """Returns the bytes of two compensated averages."""
    return 2 * 6 * parameters


def timed(act: Any, times: int) -> dict[str, float]:
    """Returns seconds of this process's threads, and seconds, for each of several calls."""
    start, before = time.perf_counter(), cpu_seconds()
    for _ in range(times):
        act()
    return {"cpu": (cpu_seconds() - before) / times, "seconds": (time.perf_counter() - start) / times}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
