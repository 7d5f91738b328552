"""Tests of the GPU check: at toy size on the stand-in driver, ended by a signal, and with parts that fail.

`POSTHOC_EMA_GPU_CHECK` names the folder of `PROFILE=dev benches/gpu/build.sh`, and `POSTHOC_EMA_STANDIN` the stand-in
driver. Without them only the tests with made-up binaries run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CHECK = HERE / "gpu" / "check.py"
BINARIES, STANDIN = os.environ.get("POSTHOC_EMA_GPU_CHECK"), os.environ.get("POSTHOC_EMA_STANDIN")
TOY = {
    "TESTS": "blend::blend_of_every_length update::aligned_and_unaligned_update",
    "PARAMETERS": "20000",
    "FEW": "30",
    "MANY": "200",
    "REPEATS": "2",
    "SNAPSHOT_PARAMETERS": "5000",
    "SNAPSHOTS": "4",
    "TARGETS": "3",
    "RUN_PARAMETERS": "20000",
    "RUN_SNAPSHOTS": "5",
    "SWEEP_PARAMETERS": "20000",
    "PIN_BYTES": "100000",
    "WIDTH": "16",
    "LAYERS": "2",
    "STEPS": "10",
}
needs_binaries = pytest.mark.skipif(not (BINARIES and STANDIN), reason="POSTHOC_EMA_GPU_CHECK is not set")


def start(tmp_path: Path, binaries: str | Path, **more: str) -> subprocess.Popen[str]:
    """Starts the check with its record in a folder of its own."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        **TOY,
        "OUT": str(tmp_path / "out"),
        "TMPDIR": str(work),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    environment.pop("POSTHOC_EMA_STANDIN", None)
    if STANDIN:
        environment["LD_LIBRARY_PATH"] = str(Path(STANDIN).resolve().parent)
    command = [sys.executable, str(CHECK), str(binaries)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def record(tmp_path: Path) -> dict[str, Any]:
    """Reads the record, which is whole at any time."""
    (path,) = (tmp_path / "out").glob("*-gpu.json")
    return json.loads(path.read_text())


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["outcome"] for stage in found["stages"]}


@needs_binaries
def test_whole_check_passes_on_the_stand_in(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for path in Path(BINARIES or "").resolve().iterdir():
        (binaries / path.name).symlink_to(path)
    # Stand for binaries whose kernels keep fewer loads in flight.
    for name in ("posthoc-ema", "gpu-check-run"):
        (binaries / f"{name}-unroll-2").symlink_to(binaries / name)
    output, _ = start(tmp_path, binaries).communicate(timeout=300)
    found = record(tmp_path)
    failed = [stage for stage in found["stages"] if not stage["outcome"].startswith(("passed", "skipped"))]
    assert found["finished"] and not failed, output
    passed = [name for name, outcome in outcomes(found).items() if outcome == "passed"]
    assert {"tests", "update, sweep", "blend", "synthesis", "pinning", "fold on the host"} <= set(passed)
    for tests in ("tests", "compiled-tests"):
        (counted,) = found["results"]["tests"][tests]
        assert counted.startswith("test result: ok. 2 passed"), counted
    assert outcomes(found)["peers"] in ("skipped: no device", "skipped: python3 has no PyTorch")
    if list(Path(BINARIES or "").glob("*.whl")):
        assert outcomes(found)["training, loop"] == outcomes(found)["training, full"] == "skipped: no device"
        (loop,) = [stage for stage in found["stages"] if stage["name"] == "training, loop"]
        assert loop["seconds"] > 0, "the loop did not run on the CPU"
    measured = {line["what"] for line in found["figures"] if line["value"] is not None}
    assert any(what.startswith("blend,") for what in measured)
    assert "blend, 4 f16 snapshots to 1 target, at most 2 loads in flight" in measured
    assert "update, 2 profiles, f16, 20,000 parameters, at most 2 loads in flight" in measured
    assert "update, 4 profiles, f16, 20,000 parameters" in measured
    assert "update, 2 profiles, bf16, 20,000 parameters, 2 bytes off" in measured
    assert not found["full"] and all("error" not in row for row in found["results"]["sweep"])
    docs = ["--records", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    subprocess.run([sys.executable, str(HERE / "page.py"), *docs], check=True)
    assert "mean nothing" in (tmp_path / "docs" / "explanation" / "performance-gpu.md").read_text()


@needs_binaries
def test_signal_in_the_middle_leaves_a_valid_record(tmp_path: Path) -> None:
    # The second part would take minutes.
    only = "tests, the program;update, few tensors;blend"
    huge = {"REPEATS": "100000000", "RUN_PARAMETERS": "100000000000"}
    process = start(tmp_path, BINARIES or "", ONLY=only, **huge)
    wait_for(process, tmp_path, "tests, the program")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    found = record(tmp_path)
    assert process.returncode == 1 and "interrupted by SIGTERM" in output
    assert found["interrupted"] == {"by": "SIGTERM", "during": "update, few tensors"} and not found["finished"]
    assert list(outcomes(found)) == ["tests, the program"]
    assert list((tmp_path / "work").iterdir()) == [], "the folder of results is left"


def wait_for(process: subprocess.Popen[str], tmp_path: Path, part: str) -> None:
    """Waits until a part is in the record, which every read must find whole."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if list((tmp_path / "out").glob("*-gpu.json")) and part in outcomes(record(tmp_path)):
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[0])


def made_up(folder: Path, **scripts: str) -> Path:
    """Writes binaries that are shell scripts."""
    folder.mkdir()
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return folder


def test_parts_that_fail_or_hang_do_not_stop_the_others(tmp_path: Path) -> None:
    binaries = made_up(
        tmp_path / "bin",
        cuda_tests="echo wrong bits >&2; exit 3",
        program_cuda_tests="exit 0",
        gpu_check_run='echo \'{"bytes": 5, "seconds": 1.0}\'',
        posthoc_ema="sleep 300 & sleep 300",
    )
    only = "tests;tests, the program;pinning;fold on the host;update, few tensors;peers"
    process = start(tmp_path, binaries, ONLY=only, LIMIT="4")
    output, _ = process.communicate(timeout=60)
    found = record(tmp_path)
    assert process.returncode == 1 and found["finished"]
    by_name = {stage["name"]: stage for stage in found["stages"]}
    assert by_name["tests"]["outcome"] == "failed (3)" and "wrong bits" in by_name["tests"]["output"]
    assert by_name["tests, the program"]["outcome"] == "passed"
    assert by_name["update, few tensors"]["outcome"] == "out of time"
    assert by_name["pinning"]["outcome"] == "skipped: no time is left"
    assert "tests: failed (3)" in output and "update, few tensors: out of time" in output


def test_samples_of_clocks_are_summed_up() -> None:
    sys.path.insert(0, str(HERE / "gpu"))
    import clocks

    sampled = clocks.Clocks("0")
    sampled.close()
    sampled.samples = [
        ["0", "1980", "3201", "40", "300.5", "0x0000000000000000"],
        ["1", "1500", "3201", "71", "699.0", "0x0000000000000004"],
        ["2", "[N/A]", "3201", "71", "699.0", "0x0000000000000004"],
    ]
    found = sampled.summary()
    assert found is not None and found["sm_mhz"] == [1500.0, 1980.0] and found["throttled_s"] == 1
    assert found["samples"] == 2 and found["power_w"] == 699.0
