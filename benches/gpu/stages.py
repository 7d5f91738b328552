"""Parts of the GPU check: what each runs, for how long at most, and what it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Sizes, each a variable of the environment: a full check, whose figures count.
SIZES = {
    "PARAMETERS": 1_000_000_000,
    "FEW": 300,
    "MANY": 10_000,
    "REPEATS": 7,
    "SNAPSHOT_PARAMETERS": 250_000_000,
    "SNAPSHOTS": 40,
    "TARGETS": 8,
    "RUN_PARAMETERS": 100_000_000,
    "RUN_SNAPSHOTS": 20,
    "SWEEP_PARAMETERS": 100_000_000,
    "WIDTH": 4096,
    "LAYERS": 12,
    "STEPS": 40,
    "PIN_BYTES": 8 << 30,
}
# Tests that the sanitizers run, and the tests of the kernels that the driver compiles.
SANITIZED = (
    "update::aligned_and_unaligned_update",
    "blend::blend_of_every_length",
    "offload::copy_of_every_size",
    "reader::averages",
    "non_finite::look_passes",
)
COMPILED = ("update::", "blend::", "offload::")
NO_DEVICE = "skipped: no device"


@dataclass(frozen=True)
class Stage:
    """One part. Its standard output is the file `output` among the results."""

    name: str
    seconds: float
    command: list[str]
    output: str
    # Why it cannot run, if it cannot.
    skipped: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """Parts that exist on this machine."""

    binaries: Path
    work: Path
    device: str
    torch: str | None
    pytest: bool
    sanitizer: str | None
    profiler: str | None

    def binary(self, name: str) -> str:
        return str(self.binaries / name)


def find(binaries: Path, work: Path, device: str) -> Found:
    """Looks for everything that parts need. `torch` is the reason why PyTorch's parts are skipped, or None."""
    torch = probe("import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)")
    reason = {0: None, 3: NO_DEVICE}.get(torch, "skipped: python3 has no PyTorch")
    return Found(
        binaries=binaries,
        work=work,
        device=device,
        torch=reason,
        pytest=probe("import pytest") == 0,
        sanitizer=shutil.which("compute-sanitizer"),
        profiler=shutil.which("ncu"),
    )


def probe(script: str) -> int:
    try:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode
    except subprocess.TimeoutExpired:
        return -1


def size(name: str) -> int:
    return int(os.environ.get(name, SIZES[name]))


def all_stages(found: Found) -> list[Stage]:
    """Returns all parts in their order: correctness first."""
    return [*tests(found), *updates(found), *rest(found), *sanitizers(found), *profiles(found), *last(found)]


def tests(found: Found) -> list[Stage]:
    chosen = os.environ.get("TESTS", "").split()
    one = ["--test-threads", "1"]
    python = "skipped: build.sh made no wheel" if not list(found.binaries.glob("*.whl")) else found.torch
    if python is None and not found.pytest:
        python = "skipped: python3 has no pytest"
    pytest = ["-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "python/tests/test_cuda.py"]
    return [
        Stage("tests", 60, [found.binary("cuda-tests"), *one, *chosen], "tests.txt"),
        Stage("tests, the program", 20, [found.binary("program-cuda-tests"), *one, *chosen], "program-tests.txt"),
        Stage(
            "tests, kernels compiled by the driver",
            20,
            [found.binary("cuda-tests"), *one, *(chosen or COMPILED)],
            "compiled-tests.txt",
            environment={"POSTHOC_EMA_CUDA_PTX": "1"},
        ),
        Stage("tests, Python", 40, [sys.executable, *pytest], "python-tests.txt", python, package(found)),
    ]


def package(found: Found) -> dict[str, str]:
    return {"PYTHONPATH": str(found.work / "python")}


def updates(found: Found) -> list[Stage]:
    sweep = [sys.executable, str(HERE / "sweep.py"), found.binary("gpu-check-run"), found.device]
    parameters = size("PARAMETERS")
    stages = [
        bench(found, "update, few tensors", 45, "few.json", (parameters, size("FEW"), 1, 1)),
        bench(found, "update, many tensors", 45, "many.json", (parameters, size("MANY"), 1, 1)),
        Stage("update, sweep", 50, sweep, "sweep.jsonl"),
    ]
    sizes = (size("SNAPSHOT_PARAMETERS"), size("FEW"), size("SNAPSHOTS"), size("TARGETS"))
    stages.append(bench(found, "blend", 50, "blend.json", sizes))
    for path in sorted(found.binaries.glob("posthoc-ema-unroll-*")):
        most = path.name.rpartition("-")[2]
        name = f"blend, at most {most} loads in flight"
        stages.append(bench(found, name, 20, f"blend-unroll-{most}.json", sizes, path.name))
    return stages


def bench(
    found: Found, name: str, seconds: float, output: str, sizes: tuple[int, int, int, int], program: str = "posthoc-ema"
) -> Stage:
    """Returns `posthoc-ema bench` with parameters, tensors, snapshots and targets."""
    command = [found.binary(program), "bench", "--device", found.device, "--repeats", str(size("REPEATS")), "--json"]
    for option, value in zip(("parameters", "tensors", "snapshots", "targets"), sizes):
        command += [f"--{option}", str(value)]
    return Stage(name, seconds, command, output)


def rest(found: Found) -> list[Stage]:
    training = [sys.executable, str(HERE / "training.py")]
    wheel = None if list(found.binaries.glob("*.whl")) else "skipped: build.sh made no wheel"
    needs = wheel or found.torch
    # Without a device the loop still runs on the CPU, and says that it measured nothing.
    needed = {"loop": None if needs == NO_DEVICE else needs}
    parts = {"loop": 45, "latency": 15, "capture": 15, "full": 20}
    shell = [str(HERE / "synthesis.sh"), str(found.binaries), str(found.work), found.device]
    return [
        *[
            Stage(
                f"training, {part}",
                seconds,
                [*training, part],
                f"training-{part}.json",
                needed.get(part, needs),
                package(found),
            )
            for part, seconds in parts.items()
        ],
        Stage("synthesis", 80, ["bash", *shell], "synthesis.jsonl"),
        Stage("peers", 60, [sys.executable, str(HERE / "peers.py")], "peers.json", found.torch),
    ]


def sanitizers(found: Found) -> list[Stage]:
    missing = None if found.sanitizer else "skipped: compute-sanitizer was not found"
    stages = []
    for tool in ("memcheck", "initcheck"):
        command = [found.sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += [found.binary("cuda-tests"), "--test-threads", "1", *SANITIZED]
        stages.append(Stage(tool, 25, command, f"{tool}.txt", missing))
    return stages


def profiles(found: Found) -> list[Stage]:
    missing = None if found.profiler else "skipped: ncu was not found"
    command = [sys.executable, str(HERE / "profile_kernels.py"), found.binary("posthoc-ema"), found.device]
    return [Stage("profile", 30, command, "profile.json", missing)]


def last(found: Found) -> list[Stage]:
    """Returns the parts that run if time is left."""
    pin = [found.binary("gpu-check-run"), "pin", found.device, str(size("PIN_BYTES"))]
    fold = [found.binary("posthoc-ema"), "bench", "--device", "cpu", "--json", "--repeats", "3"]
    fold += ["--parameters", str(size("SWEEP_PARAMETERS")), "--tensors", str(size("FEW"))]
    compare = [sys.executable, str(ROOT / "benches" / "peers" / "run.py"), "--python", sys.executable]
    compare += ["--only", "updates", "--device", "cuda", "--folder", str(found.work)]
    wheel = found.torch if list(found.binaries.glob("*.whl")) else "skipped: build.sh made no wheel"
    record = ["--record", str(found.work / "results" / "python.json")]
    return [
        Stage("pinning", 20, pin, "pin.json"),
        Stage("fold on the host", 30, [*fold, "--snapshots", "1", "--targets", "1"], "fold.json"),
        Stage("updates of the package", 90, [*compare, *record], "python.txt", wheel, package(found)),
    ]
