#!/usr/bin/env python3
"""Measures the same update by PyTorch on a device: seconds of the device's clock, as one JSON document.

For each number of tensors and each dtype of the parameters, with two profiles and averages in f32:

foreach     torch._foreach_lerp_ for each profile, after torch._foreach_copy_ to f32 for bf16 parameters; also replayed
            as one CUDA graph
compile     torch.compile of the update of all profiles of one tensor, for each tensor, replayed as one CUDA graph
compile, 1  the same on all parameters as one tensor; no model is one, but it is the best case for a compiler
copy        Tensor.copy_ within the device: bytes read and bytes written both count
"""

# Each function is called before the loop goes on.
# ruff: noqa: B023, E731

import json
import os
import statistics
import sys

import torch

WEIGHTS = [0.3, 0.05]  # those of `posthoc-ema bench`
ALIGNMENT = 128


def timed(work, repeats):
    """Measures `work`, queued twice so that the host queues the timed round while the first one runs."""
    seconds = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        work()
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return {"seconds_median": statistics.median(seconds), "seconds_all": seconds}


def split(flat, parameters, tensors):
    """Returns views of a flat tensor of nearly equal sizes, aligned as an allocator would align them."""
    views, at = [], 0
    for i in range(tensors):
        n = parameters // tensors + (i < parameters % tensors)
        views.append(flat[at : at + n])
        at += -(-n // ALIGNMENT) * ALIGNMENT
    return views


def foreach(averages, parameters, converted):
    if converted is not None:
        torch._foreach_copy_(converted, parameters)
    for average, weight in zip(averages, WEIGHTS):
        torch._foreach_lerp_(average, parameters if converted is None else converted, weight)


def both(first, second, parameter):
    p = parameter.float()
    first.lerp_(p, WEIGHTS[0])
    second.lerp_(p, WEIGHTS[1])


def graphed(work):
    """Captures `work` in a CUDA graph, which runs without Python."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def check(name, averages, parameters):
    """Checks that two updates from zeros leave 1 - (1 - w)^2 of a parameter."""
    for average, weight in zip(averages, WEIGHTS):
        for e, p in list(zip(average, parameters))[:: max(1, len(parameters) // 20)]:
            expected = p[:1000].double() * (1 - (1 - weight) ** 2)
            if not torch.allclose(e[:1000].double(), expected, rtol=1e-5, atol=1e-6):
                sys.exit(f"{name}: the averages are wrong")


def measure(name, work, averages, parameters, bytes_, repeats):
    for average in averages:
        torch._foreach_zero_(average)
    work()
    work()
    check(name, averages, parameters)
    row = {"name": name, "bytes": bytes_, **timed(work, repeats)}
    print(f"{name}: {1e3 * row['seconds_median']:.3f} ms", file=sys.stderr)
    return row


def attempt(name, work, averages, parameters, bytes_, repeats):
    """Measures work that a compiler or a graph may refuse. Wrong averages still end the program."""
    try:
        return measure(name, graphed(work), averages, parameters, bytes_, repeats)
    except Exception as error:
        print(f"{name}: {error}", file=sys.stderr)
        return {"name": name, "bytes": bytes_, "error": str(error)}


def main():
    size, few, many, repeats = (int(os.environ[k]) for k in ("PARAMETERS", "FEW", "MANY", "REPEATS"))
    device = torch.device(os.environ.get("DEVICE", "cuda:0"))
    torch.cuda.set_device(device)
    room = size + ALIGNMENT * max(few, many)
    flats = [torch.zeros(room, device=device) for _ in WEIGHTS]
    values = torch.arange(room, device=device) % 251 / 128 - 1
    rows = [{"name": "copy", "bytes": 8 * room, **timed(lambda: flats[0].copy_(values), repeats)}]
    compiled = torch.compile(both)
    for dtype in (torch.float32, torch.bfloat16):
        short = "f32" if dtype == torch.float32 else "bf16"
        given = values.to(dtype)
        bytes_ = size * (given.element_size() + 8 * len(WEIGHTS))
        scratch = torch.empty(room, device=device) if dtype == torch.bfloat16 else None
        for tensors in (few, many):
            averages, parameters = [split(flat, size, tensors) for flat in flats], split(given, size, tensors)
            converted = None if scratch is None else split(scratch, size, tensors)
            work = lambda: foreach(averages, parameters, converted)
            rows.append(measure(f"foreach, {short}, {tensors}", work, averages, parameters, bytes_, repeats))
            # Thousands of launches may take longer in Python than on the device: measures them without Python, too.
            name = f"foreach, graph, {short}, {tensors}"
            rows.append(attempt(name, work, averages, parameters, bytes_, repeats))
        averages, parameters = [split(flat, size, few) for flat in flats], split(given, size, few)
        work = lambda: [compiled(*each) for each in zip(*averages, parameters)]
        rows.append(attempt(f"compile, {short}, {few}", work, averages, parameters, bytes_, repeats))
        # Without a reset, torch.compile would compile the next shape for any size.
        torch._dynamo.reset()
        whole = [[flat[:size]] for flat in flats]
        work = lambda: compiled(whole[0][0], whole[1][0], given[:size])
        rows.append(attempt(f"compile, {short}, 1", work, whole, [given[:size]], bytes_, repeats))
    about = {"torch": torch.__version__, "device": torch.cuda.get_device_name(device)}
    print(json.dumps({**about, "measurements": rows}))


if __name__ == "__main__":
    main()
