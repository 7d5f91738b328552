"""Tests of the page with small, invented records, and of the helpers of benches/peers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).with_name("page.py")
sys.path.insert(0, str(PAGE.parent / "peers"))

import numpy as np  # noqa: E402

import answers  # noqa: E402
import run as peers  # noqa: E402
import table  # noqa: E402
import turns  # noqa: E402


def row(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "seconds_all": [seconds, 2 * seconds, seconds], "seconds_median": seconds, **more}


def case(work: str) -> dict[str, Any]:
    rows = [
        row("posthoc-ema", 0.025, bytes_per_second=40e9, share_of_limit=0.8, peak_anonymous_bytes=7_000_000),
        row("another", 0.1, bytes_per_second=10e9, share_of_limit=0.2),
        {"name": "a third", "seconds_all": [], "error": "it is not installed"},
    ]
    limits = [row("a loop in C", 0.02)]
    return {"work": work, "title": work, "bytes": 10**9, "limits": limits, "rows": rows, "note": "A note."}


def record(**more: Any) -> dict[str, Any]:
    machine = {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**34, "system": "Linux", "kernel": "6"}
    return {
        "date": "2000-01-02",
        "command": "a command",
        "size": "full",
        "seconds": 1.0,
        "machine": machine,
        "versions": {"posthoc-ema": "0.0"},
        **more,
    }


def points(x: str) -> dict[str, Any]:
    found = [{"x": 10**k, "bytes": 10**k, **row("", 10.0**-k)} for k in (1, 2)]
    return {"work": "update", "x": x, "title": "something", "points": [*found, {"x": 1000, "error": "no room"}]}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    records = tmp_path / "records"
    records.mkdir()
    older = record(cases=[{**case("update"), "title": "yesterday's"}])
    (records / "2000-01-01-peers.json").write_text(json.dumps(older))
    (records / "2000-01-02-peers.json").write_text(json.dumps(record(cases=[case("update"), case("start")])))
    (records / "2000-01-02-scaling.json").write_text(
        json.dumps(record(sweeps=[points("parameters"), points("threads")]))
    )
    return records, tmp_path / "docs"


def run(folders: tuple[Path, Path], *more: str) -> subprocess.CompletedProcess[str]:
    records, docs = folders
    command = [sys.executable, str(PAGE), "--records", str(records), "--docs", str(docs), *more]
    return subprocess.run(command, capture_output=True, text=True)


def test_figures_come_from_the_newest_records(folders: tuple[Path, Path]) -> None:
    assert run(folders).returncode == 0
    text = (folders[1] / "explanation" / "performance.md").read_text()
    assert "| posthoc-ema | 25.0 ms (25.0 to 50.0) | 40.0 | 80% |  | 7 MB |" in text
    assert "| another | 100 ms (100 to 200) | 10.0 | 20% | 4.00 |  |" in text
    assert "| a third | not measured: it is not installed |" in text
    assert "| 1,000 | not measured: no room |" in text
    assert "2000-01-02-peers.json" in text and "yesterday" not in text
    assert "the load average was" not in text
    busy = record(cases=[case("update")], load_average=7.2)
    (folders[0] / "2000-01-03-peers.json").write_text(json.dumps(busy))
    assert run(folders).returncode == 0
    text = (folders[1] / "explanation" / "performance.md").read_text()
    assert text.count("Other work ran beside it: the load average was 7.") == 1


def test_each_work_uses_its_newest_record(folders: tuple[Path, Path]) -> None:
    older = record(cases=[{**case("update"), "title": "yesterday's"}, case("writing")])
    (folders[0] / "2000-01-01-peers.json").write_text(json.dumps(older))
    assert run(folders).returncode == 0
    updates, rest = (folders[1] / "explanation" / "performance.md").read_text().split("## Storing")
    storing, start = rest.split("## Start")
    assert (
        "2000-01-02-peers.json" in updates and "2000-01-01-peers.json" in storing and "2000-01-02-peers.json" in start
    )
    assert "yesterday" not in updates


def test_case_of_another_work_is_shown_once(folders: tuple[Path, Path]) -> None:
    older = record(cases=[{**case("synthesis"), "title": "31 targets"}, case("synthesis")])
    (folders[0] / "2000-01-01-peers.json").write_text(json.dumps(older))
    newer = record(cases=[{**case("targets"), "title": "31 targets"}])
    (folders[0] / "2000-01-03-peers.json").write_text(json.dumps(newer))
    assert run(folders).returncode == 0
    text = (folders[1] / "explanation" / "performance.md").read_text()
    synthesis, targets = text.split("## Synthesis to many targets")
    assert "31 targets" in targets and "31 targets" not in synthesis and "## Synthesis" in synthesis


def test_check_passes_only_the_generated_page(folders: tuple[Path, Path]) -> None:
    assert run(folders, "--check").returncode == 1
    assert run(folders).returncode == 0
    assert run(folders, "--check").returncode == 0
    page = folders[1] / "explanation" / "performance.md"
    page.write_text(page.read_text().replace("40.0", "41.0"))
    changed = run(folders, "--check")
    assert changed.returncode == 1 and "differs from the records" in changed.stderr
    assert run(folders).returncode == 0
    (folders[1] / "pictures" / "performance-scaling.svg").unlink()
    assert "performance-scaling.svg is missing" in run(folders, "--check").stderr


def test_pictures_have_the_same_bytes_each_time(folders: tuple[Path, Path]) -> None:
    made = []
    for _ in range(2):
        assert run(folders).returncode == 0
        made.append({path.name: path.read_bytes() for path in (folders[1] / "pictures").iterdir()})
    assert made[0] == made[1]
    assert sorted(made[0]) == ["performance-scaling.svg", "performance-update.svg"]
    assert all(b"<dc:date>" not in picture for picture in made[0].values())


def test_without_records_only_the_page_of_gpus_is_made(tmp_path: Path) -> None:
    folders = (tmp_path / "records", tmp_path / "docs")
    folders[0].mkdir()
    done = run(folders)
    assert done.returncode == 0 and "no record" in done.stdout
    assert [path.name for path in (folders[1] / "explanation").iterdir()] == ["performance-gpu.md"]
    assert run(folders, "--check").returncode == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (123.4, "123 s"),
        (12.34, "12.3 s"),
        (1.234, "1.23 s"),
        (0.9996, "1000 ms"),
        (0.0123, "12.3 ms"),
        (1.5e-7, "0.15 us"),
    ],
)
def test_times_have_three_digits(value: float, text: str) -> None:
    assert table.seconds(value) == text


def test_nan_and_missing_tensors_are_infinitely_far_off() -> None:
    right = {"a": np.array([1.0, -1.0])}
    assert answers.difference(right, right) == 0.0
    assert answers.difference({"a": np.array([1.5, -1.0])}, right) == 0.5
    assert answers.difference({"a": np.array([np.nan, -1.0])}, right) == float("inf")
    assert answers.difference({}, right) == float("inf")


class Contender:
    """Contender that counts its calls, and fails if `fails` is set."""

    def __init__(self, name: str, first: float = 1.0, fails: bool = False):
        self.name = name
        self.seconds = first
        self.fails = fails
        self.calls = 0

    def first(self) -> turns.Row:
        if self.fails:
            raise turns.Failed("it cannot")
        return {"seconds": self.seconds, "more": 1}

    def once(self) -> float:
        self.calls += 1
        return float(self.calls)

    def close(self) -> None:
        pass


def test_turns_are_counted_and_failures_reported() -> None:
    quick = Contender("quick")
    slow = Contender("slow", first=11.0)
    broken = Contender("broken", fails=True)
    rows = turns.in_turns([quick, slow, broken], 3)
    assert rows[0] == {"name": "quick", "seconds_all": [1.0, 2.0, 3.0], "more": 1, "seconds_median": 2.0}
    assert rows[1]["seconds_all"] == [11.0] and slow.calls == 0
    assert rows[2] == {"name": "broken", "seconds_all": [], "error": "it cannot"} and broken.calls == 0


def test_worker_that_ends_or_is_silent_gives_the_reason(tmp_path: Path) -> None:
    dies = turns.Worker("dies", [sys.executable, "-c", "raise SystemExit('no data')"])
    with pytest.raises(turns.Failed, match="no data"):
        dies.ask("go")
    dies.close()
    silent = turns.Worker("silent", [sys.executable, "-c", "import time; time.sleep(600)"])
    with pytest.raises(turns.Failed, match="stopped after 0 s"):
        silent.ask("go", patience=0.1)
    with pytest.raises(turns.Failed, match="stopped before"):
        silent.ask("go")


def test_first_round_counts_without_a_warm_up() -> None:
    contender = Contender("cold", first=5.0)
    order = []
    (row,) = turns.in_turns([contender], 2, lambda: order.append(contender.calls), warm_up=False)
    assert row["seconds_all"] == [5.0, 1.0, 2.0] and order == [0, 0, 1]


def test_only_failures_of_ours_are_failures() -> None:
    def one(name: str, error: str) -> list[dict[str, Any]]:
        return [{"title": "Update", "rows": [row("posthoc-ema", 1.0), {"name": name, "error": error}]}]

    assert peers.failures(one("another", "no such package")) == []
    assert peers.failures(one("posthoc-ema, the program", "left out: no --program FILE")) == []
    assert peers.failures(one("posthoc-ema, compensated", "wrong")) == ["Update: posthoc-ema, compensated: wrong"]
