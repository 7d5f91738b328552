"""Figures of the GPU check: each result beside its limit and its target."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Line = dict[str, Any]
BUS = "pinned host to device"


class Results:
    """Documents and lines that the parts left in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.benches = {name: self.document(f"{name}.json") for name in ("few", "many", "blend")}
        self.unrolled = {path.stem: self.document(path.name) for path in sorted(folder.glob("blend-unroll-*.json"))}
        self.peers = self.document("peers.json")
        self.sweep = self.documents("sweep.jsonl")
        self.synthesis, self.command = [*self.documents("synthesis.jsonl"), None, None][:2]
        self.training = {
            part: self.document(f"training-{part}.json") for part in ("loop", "latency", "capture", "full")
        }
        self.tests = {name: self.counted(f"{name}.txt") for name in ("tests", "program-tests", "compiled-tests")}
        self.python = self.document("python.json")
        self.pin = self.document("pin.json")
        self.fold = self.document("fold.json")
        self.profile = self.document("profile.json")

    def document(self, name: str) -> Any:
        """Returns the document of a part, or None if the part did not finish."""
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def documents(self, name: str) -> list[Any]:
        """Returns the documents of all whole lines."""
        found = []
        for line in self.lines(name):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text(errors="replace").splitlines() if path.is_file() else []

    def counted(self, name: str) -> list[str]:
        """Returns the lines that count passed and failed tests."""
        return [line for line in self.lines(name) if line.startswith("test result: ")]

    def row(self, bench: str, name: str) -> Row | None:
        rows = (self.benches[bench] or {}).get("measurements", [])
        return next((row for row in rows if row["name"] == name), None)

    def peer(self, name: str) -> Row | None:
        rows = (self.peers or {}).get("measurements", [])
        return next((row for row in rows if row["name"] == name and "error" not in row), None)

    def all(self) -> dict[str, Any]:
        """Returns everything, for the record."""
        return {key: value for key, value in vars(self).items() if key != "folder"}


def figure(
    what: str,
    value: float | None,
    unit: str,
    beside: str | None,
    limit: float | None,
    ratio: float | None,
    target: float | None,
    at_most: bool = False,
) -> Line:
    """Returns a line of the table: a ratio that must reach its target, or stay below it if `at_most`."""
    passed = None if ratio is None or target is None else ratio <= target if at_most else ratio >= target
    keys = ("what", "value", "unit", "beside", "limit", "ratio", "target", "at_most", "passed")
    return dict(zip(keys, (what, value, unit, beside, limit, ratio, target, at_most, passed)))


def share(results: Results, bench: str, name: str, target: float | None, what: str | None = None) -> Line:
    """Compares a row of a bench with the limit that was measured with it."""
    row = results.row(bench, name)
    if row is None:
        return figure(what or name, None, "GB/s", None, None, None, target)
    limit = results.row(bench, row["limit"])
    rates = [r["bytes_per_second"] / 1e9 for r in (row, limit)]
    return figure(what or name, rates[0], "GB/s", row["limit"], rates[1], row["share_of_limit"], target)


def faster(results: Results, bench: str, name: str, peer: str, target: float | None) -> Line:
    """Compares a row with a peer: how many times as fast it is."""
    own, other = results.row(bench, name), results.peer(peer)
    how = peer.split(",")[0] + (" of one tensor" if peer.endswith(", 1") else " in a graph" if "graph" in peer else "")
    what = f"update, {name}: times as fast as torch {how}"
    if own is None or other is None:
        return figure(what, None, "ms", None, None, None, target)
    mine, theirs = own["seconds_median"], other["seconds_median"]
    return figure(what, 1e3 * mine, "ms", "torch", 1e3 * theirs, theirs / mine, target)


def updates(results: Results, few: str, many: str) -> list[Line]:
    lines = []
    for bench, tensors, target in (("few", few, 0.9), ("many", many, 0.8)):
        for dtype in ("f32", "bf16"):
            for precision in ("plain", "compensated"):
                name = f"{dtype}, {precision}, {tensors} tensors"
                lines.append(share(results, bench, name, target, f"update, {name}"))
                if precision == "compensated":
                    name += ", with a look"
                    lines.append(share(results, bench, name, None, f"update, {name}"))
    return lines


def peers(results: Results, few: str, many: str) -> list[Line]:
    lines = []
    for bench, tensors in (("few", few), ("many", many)):
        for dtype, target in (("f32", 1.15), ("bf16", 2.5)):
            name = f"{dtype}, plain, {tensors} tensors"
            lines.append(faster(results, bench, name, f"foreach, {dtype}, {tensors}", target))
            lines.append(faster(results, bench, name, f"foreach, graph, {dtype}, {tensors}", None))
    for dtype in ("f32", "bf16"):
        name = f"{dtype}, plain, {few} tensors"
        lines.append(faster(results, "few", name, f"compile, {dtype}, {few}", 1.0))
        lines.append(faster(results, "few", name, f"compile, {dtype}, 1", None))
    return lines


def blends(results: Results, snapshots: str, targets: int) -> list[Line]:
    lines = []
    for dtype in ("f16", "bf16", "f32"):
        for count, target in ((1, 0.85), (targets, 0.6)):
            name = f"{snapshots} {dtype} snapshots to {count} target{'' if count == 1 else 's'}"
            lines.append(share(results, "blend", name, target if dtype == "f16" else None, f"blend, {name}"))
    return lines


def offloads(results: Results, few: str, many: str) -> list[Line]:
    lines = []
    for bench, tensors in (("few", few), ("many", many)):
        name = f"f32 parameters in {tensors} tensors to the host"
        lines.append(share(results, bench, name, 0.85))
        lines.append(share(results, bench, name.replace("f32", "bf16"), 0.85))
        lines.append(held_up(results, bench, name))
    return lines


def held_up(results: Results, bench: str, name: str) -> Line:
    """Compares the time that copies on the training stream lose during an offload with the offload's time."""
    what = f"training stream held up, {name}"
    beside, offload = results.row(bench, f"copies within the device, while {name} go"), results.row(bench, name)
    if beside is None or offload is None:
        return figure(what, None, "ms", None, None, None, 0.05, True)
    alone = beside["bytes"] / results.row(bench, beside["limit"])["bytes_per_second"]
    lost, lasted = beside["seconds_median"] - alone, offload["seconds_median"]
    return figure(what, 1e3 * lost, "ms", "the offload", 1e3 * lasted, lost / lasted, 0.05, True)


def synthesis(results: Results) -> list[Line]:
    """Compares synthesis with the bus. The first time opens files and locks memory, so only the others count."""
    limit = results.row("few", BUS) or results.row("blend", BUS)
    lines = []
    for what, document, target in (
        ("synthesis into a file, from the page cache, again and again", results.synthesis, 0.8),
        ("synthesis into a file, the command once", results.command, None),
    ):
        if document is None or limit is None:
            lines.append(figure(what, None, "GB/s", BUS, None, None, target))
            continue
        seconds = document["seconds"]
        seconds = statistics.median(seconds[1:] or seconds) if isinstance(seconds, list) else seconds
        rates = [document["bytes_read"] / seconds, limit["bytes_per_second"]]
        rate, of = (r / 1e9 for r in rates)
        lines.append(figure(what, rate, "GB/s", BUS, of, rates[0] / rates[1], target))
    return lines


def all_figures(results: Results) -> list[Line]:
    """Returns all figures; the value is None for those of parts that did not finish."""
    few, many, snapshots = (os.environ[name] for name in ("FEW", "MANY", "SNAPSHOTS"))
    lines = updates(results, few, many) + peers(results, few, many)
    lines += blends(results, snapshots, int(os.environ["TARGETS"]))
    return (
        lines
        + unrolled(results)
        + sweep(results)
        + synthesis(results)
        + offloads(results, few, many)
        + training(results)
    )


def unrolled(results: Results) -> list[Line]:
    """Returns the blends of binaries whose kernels keep fewer or more loads in flight."""
    lines = []
    for name, document in results.unrolled.items():
        rows = {row["name"]: row for row in (document or {}).get("measurements", [])}
        for row in rows.values():
            limit = rows.get(row.get("limit", ""))
            if " snapshots to " not in row["name"] or limit is None:
                continue
            what = f"blend, {row['name']}, at most {name.rpartition('-')[2]} loads in flight"
            rates = [each["bytes_per_second"] / 1e9 for each in (row, limit)]
            lines.append(figure(what, rates[0], "GB/s", row["limit"], rates[1], row["share_of_limit"], None))
    return lines


def sweep(results: Results) -> list[Line]:
    lines = []
    for row in results.sweep:
        what = f"update, {row['profiles']} profiles, {row['dtype']}, {int(row['parameters']):,} parameters"
        what += f", {row['off']} bytes off" if row["off"] != "0" else ""
        chunk = row.get("POSTHOC_EMA_CUDA_CHUNK")
        what += f", chunks of {int(chunk):,}" if chunk else ""
        what += f", at most {row['unroll']} loads in flight" if "unroll" in row else ""
        if "error" in row:
            lines.append(figure(what, None, "GB/s", None, None, None, None))
            continue
        rates = [row["bytes"] / row["seconds_median"] / 1e9, row["copy_bytes_per_second"] / 1e9]
        lines.append(figure(what, rates[0], "GB/s", "copy within the device", rates[1], rates[0] / rates[1], None))
    return lines


def training(results: Results) -> list[Line]:
    """Compares each training's step with the same step without averages."""
    loop = results.training["loop"] or {}
    rows = {row["name"]: row for row in loop.get("rows", [])}
    alone = rows.pop("without averages", None)
    lines = []
    for name, row in rows.items():
        own, other = 1e3 * row["seconds_median"], 1e3 * alone["seconds_median"] if alone else None
        ratio = own / other if other else None
        # The cost of an update every ten steps should not show.
        target = 1.02 if "every 10" in name else None
        lines.append(figure(f"training step, {name}", own, "ms", "without averages", other, ratio, target, True))
    latency = results.training["latency"] or {}
    if "beside_s" in latency:
        own, other = 1e3 * latency["beside_s"], 1e3 * latency["alone_s"]
        lines.append(figure(".item() beside an offload", own, "ms", "alone", other, own / other, None, True))
    return lines
