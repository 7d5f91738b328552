#!/usr/bin/env python3
"""Measures updates of several kinds on a device, each in a process of its own. Prints a line of JSON for each.

    sweep.py PROGRAM DEVICE      # the binary gpu-check-run; size from SWEEP_PARAMETERS

Kinds: 1, 4 and 8 profiles, f16 and bf16, tensors at odd addresses, a tenth of the parameters, and chunk sizes; the
first ones also by binaries PROGRAM-unroll-N, whose kernels keep at most N loads in flight.
"""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
from collections.abc import Iterator

CHUNKS = (8192, 16384, 32768, 65536)


def kinds(parameters: int) -> list[tuple[dict[str, str], list[str]]]:
    """Returns the variables and arguments of each kind: profiles, dtype, parameters, bytes off the alignment."""
    whole, tenth = str(parameters), str(max(1, parameters // 10))
    found: list[tuple[dict[str, str], list[str]]] = []
    for profiles in ("2", "1", "4", "8"):
        for dtype in ("f32", "bf16", "f16"):
            found.append(({}, [profiles, dtype, whole, "0"]))
    found += [({}, ["2", dtype, tenth, "0"]) for dtype in ("f32", "bf16")]
    found += [({}, ["2", dtype, whole, off]) for dtype, off in (("f32", "4"), ("bf16", "2"), ("f16", "2"))]
    for chunk in CHUNKS:
        for size in (whole, tenth):
            found.append(({"POSTHOC_EMA_CUDA_CHUNK": str(chunk)}, ["2", "f32", size, "0"]))
    return found


def programs(program: str, parameters: int) -> Iterator[tuple[str, str, dict[str, str], list[str]]]:
    """Yields each program with its limit of loads and a kind."""
    for variables, arguments in kinds(parameters):
        yield program, "", variables, arguments
    for other in sorted(glob.glob(f"{program}-unroll-*")):
        for variables, arguments in kinds(parameters)[:3]:
            yield other, other.rpartition("-")[2], variables, arguments


def main() -> None:
    program, device = sys.argv[1:3]
    failures = 0
    for each, unroll, variables, arguments in programs(program, int(os.environ["SWEEP_PARAMETERS"])):
        command = [each, "update", device, *arguments, os.environ["REPEATS"]]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
        named = dict(zip(("profiles", "dtype", "parameters", "off"), arguments))
        named |= {"unroll": unroll} if unroll else {}
        if done.returncode == 0:
            print(json.dumps({**named, **variables, **json.loads(done.stdout)}), flush=True)
        else:
            failures += 1
            reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
            print(json.dumps({**named, **variables, "error": reason}), flush=True)
    raise SystemExit(min(failures, 1))


if __name__ == "__main__":
    main()
