"""Record of the GPU check: one JSON document and one table, written again after every part."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import figures
import stages
from process import Done


class Record:
    """Record in a folder; `results` is the folder with the output of the parts."""

    def __init__(self, results: Path, folder: Path, clocks: Callable[[], dict[str, object] | None]):
        for each in (results, folder):
            each.mkdir(parents=True, exist_ok=True)
        self.results = results
        self.date = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M")
        self.path = folder / f"{self.date}-gpu.json"
        self.clocks = clocks
        self.stages: list[dict[str, Any]] = []
        # Part that runs now.
        self.running: str | None = None
        self.interrupted: str | None = None
        self.save(finished=False)

    def add(self, name: str, done: Done, limit: float) -> None:
        """Adds the outcome of a part, with the end of its output if it failed."""
        stage: dict[str, Any] = {"name": name, "outcome": done.outcome, "seconds": round(done.seconds, 1)}
        stage["limit_seconds"] = round(limit, 1)
        if done.outcome.startswith(("failed", "out of time")):
            stage["output"] = done.output
        self.stages.append(stage)
        print(f"{name}: {done.outcome}, {done.seconds:.0f} s", flush=True)
        self.save(finished=False)

    def save(self, finished: bool) -> None:
        """Writes the record beside its name, then gives it that name: a reader sees a whole record, old or new."""
        document = self.document(finished)
        for path, text in (
            (self.path, json.dumps(document, indent=1) + "\n"),
            (self.path.with_suffix(".md"), markdown(document)),
        ):
            beside = path.with_suffix(f"{path.suffix}.new")
            beside.write_text(text)
            os.replace(beside, path)

    def document(self, finished: bool) -> dict[str, Any]:
        results = figures.Results(self.results)
        bench = next((document for document in results.benches.values() if document), {})
        return {
            "date": self.date,
            "finished": finished,
            "interrupted": self.interrupted and {"by": self.interrupted, "during": self.running},
            "full": all(stages.size(name) == full for name, full in stages.SIZES.items()),
            "device": results.lines("device.txt"),
            "host": {"machine": bench.get("machine"), "system": platform.platform(), "cores": os.cpu_count()},
            "binaries": results.lines("manifest.txt"),
            "versions": {"python": platform.python_version(), "torch": (results.peers or {}).get("torch")},
            "sizes": {name.lower(): stages.size(name) for name in stages.SIZES},
            "stages": self.stages,
            "clocks": self.clocks(),
            "figures": figures.all_figures(results),
            "results": results.all(),
        }

    def verdict(self) -> str | int:
        """Returns 0, or a text with the parts that failed and the targets that are missed."""
        document = json.loads(self.path.read_text())
        print(self.path.with_suffix(".md").read_text())
        bad = [f"{s['name']}: {s['outcome']}" for s in self.stages if s["outcome"] != "passed" and not allowed(s)]
        # At small sizes no target can be met.
        missed = [line["what"] for line in document["figures"] if line["passed"] is False and document["full"]]
        bad += [f"missed: {what}" for what in missed]
        bad += [f"interrupted by {self.interrupted}"] if self.interrupted else []
        return "\n".join(["", *bad]) if bad else 0


def allowed(stage: dict[str, Any]) -> bool:
    """True if a part was left out because something is missing on the machine."""
    return stage["outcome"].startswith("skipped") and "no time" not in stage["outcome"]


def skipped_itself(output: Path, done: Done) -> Done:
    """Returns the outcome with the reason of a part that found nothing to measure."""
    try:
        document = json.loads(output.read_text())
    except (OSError, ValueError):
        return done
    reason = document.get("skipped") if isinstance(document, dict) else None
    return Done(f"skipped: {reason}", done.seconds, "") if reason and done.outcome == "passed" else done


def markdown(document: dict[str, Any]) -> str:
    listed = [*document["device"], *document["binaries"]]
    listed += [f"{stage['name']}: {stage['outcome']}, {stage['seconds']:g} s" for stage in document["stages"]]
    if document["interrupted"]:
        listed.append(f"interrupted by {document['interrupted']['by']} during {document['interrupted']['during']}")
    if not document["full"]:
        listed.append("**the sizes are not those of a full check: the figures mean nothing**")
    lines = [f"# {document['date']}, GPU", "", *(f"* {line}" for line in listed), "", table(document["figures"])]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def verdict_of(line: dict[str, Any]) -> str:
    if line["passed"] is None:
        return "" if line["target"] is None else "not measured"
    return "passes" if line["passed"] else "**fails**"


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the table of all figures in Markdown."""
    rows = [["what", "", "beside", "", "ratio", "target", ""], ["---", "---:", "---", "---:", "---:", "---:", "---"]]
    for line in lines:
        value, limit = (number(line[k]) and f"{number(line[k])} {line['unit']}" for k in ("value", "limit"))
        target = number(line["target"]) and f"{'≤' if line['at_most'] else '≥'} {number(line['target'])}"
        rows.append([line["what"], value, line["beside"] or "", limit, number(line["ratio"]), target, verdict_of(line)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
