"""Tests of the page for GPUs, with a record that is made up here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).with_name("page.py")


def line(what: str, value: float | None, ratio: float | None, unit: str = "GB/s") -> dict[str, Any]:
    beside = {"beside": "copy within the device", "limit": 4000.0} if value else {"beside": None, "limit": None}
    rest = {"target": 0.9, "at_most": False, "passed": None}
    return {"what": what, "value": value, "unit": unit, **beside, "ratio": ratio, **rest}


def record(**more: Any) -> dict[str, Any]:
    return {
        "date": "2000-01-02-0304",
        "finished": True,
        "interrupted": None,
        "full": True,
        "device": ["An Accelerator, 999.1, 80 GiB"],
        "host": {"machine": {"cpu": "a CPU"}, "system": "Linux", "cores": 16},
        "binaries": ["commit abc"],
        "versions": {"python": "3.12", "torch": None},
        "stages": [{"name": "tests", "outcome": "passed", "seconds": 12.0}],
        "clocks": {
            "samples": 9,
            "sm_mhz": [345.0, 1980.0],
            "temperature_c": 60.0,
            "power_w": 700.0,
            "throttled_s": 2,
        },
        "figures": [
            line("update, f32", 3600.0, 0.9),
            line("blend, f16", None, None),
            line("training step", 9, 1.05, "ms"),
        ],
        **more,
    }


@pytest.fixture
def records(tmp_path: Path) -> Path:
    made = tmp_path / "records"
    made.mkdir()
    return made


def page(records: Path, *more: str) -> str:
    docs = records.parent / "docs"
    command = [sys.executable, str(PAGE), "--records", str(records), "--docs", str(docs), *more]
    subprocess.run(command, check=True, capture_output=True)
    return (docs / "explanation" / "performance-gpu.md").read_text()


def test_without_a_record_nothing_is_claimed(records: Path) -> None:
    text = page(records)
    assert "Not measured yet." in text and "GB/s" not in text and "|" not in text


def test_figures_are_beside_the_measured_bandwidth(records: Path) -> None:
    (records / "2000-01-02-0304-gpu.json").write_text(json.dumps(record()))
    text = page(records)
    assert "Not measured yet" not in text and "ended early" not in text and "mean nothing" not in text
    assert "| update, f32 | 3600 GB/s | copy within the device | 4000 GB/s | 90% |" in text
    assert "| training step | 9.00 ms | copy within the device | 4000 ms | 1.05 |" in text
    assert "## Blends\n\nNot measured." in text
    assert "An Accelerator, 999.1" in text and "16 cores" in text and "python 3.12" in text and "torch" not in text
    assert "345 to 1980 MHz" in text and "slowed down in 2 of 9 samples" in text
    assert "| tests | passed | 12 s |" in text and "2000-01-02-0304-gpu.json" in text
    page(records, "--check")


def test_record_that_ended_early_or_is_small_says_so(records: Path) -> None:
    ended = record(finished=False, interrupted={"by": "SIGTERM", "during": "blend"}, full=False, clocks=None)
    (records / "2000-01-03-0000-gpu.json").write_text(json.dumps(ended))
    text = page(records)
    assert "ended early, by SIGTERM" in text and "mean nothing at these small sizes" in text
