#!/usr/bin/env python3
"""Assembles the PTX that the build embeds for old drivers by the oldest assembler that it is promised for.

usage: check_ptx.py PTXAS FILE.ptx...

PTXAS is that of CUDA 12.0 (pip has it in nvidia-cuda-nvcc-cu12==12.0.*), the files are those of build.rs in
target/debug/build/posthoc-ema-*/out. Exits with 1 if a kernel is refused or spills registers.
"""

import re
import subprocess
import sys
from pathlib import Path

# Architectures that the assembler of CUDA 12.0 knows, from the one of the PTX on.
ARCHITECTURES = [75, 80, 86, 87, 89, 90]


def check(ptxas, path, arch):
    """Returns the problems of one file on one architecture, and the number of its kernels."""
    command = [ptxas, f"-arch=sm_{arch}", "-v", "-o", "/dev/null", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return [f"{path.name}, sm_{arch}: {done.stderr.strip()}"], 0
    reports = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    spills = [report for report in reports if set(report) != {"0"}]
    return [f"{path.name}, sm_{arch}: {spill} bytes of stack and spills" for spill in spills], len(reports)


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    ptxas, files = sys.argv[1], [Path(name) for name in sys.argv[2:]]
    problems, kernels = [], 0
    for path in files:
        target = re.search(r"^\.target sm_(\d+)", path.read_text(), re.MULTILINE)
        if target is None:
            sys.exit(f"{path}: no PTX: build with the feature cuda and without POSTHOC_EMA_CUDA_ARCHS")
        for arch in (arch for arch in ARCHITECTURES if arch >= int(target[1])):
            found, count = check(ptxas, path, arch)
            problems += found
            kernels += count
    print(f"{len(files)} files, {kernels} kernels assembled", *problems, sep="\n")
    if problems or not kernels:
        sys.exit(1)


if __name__ == "__main__":
    main()
