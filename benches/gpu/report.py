#!/usr/bin/env python3
"""Reports the GPU check as one JSON document and one table, with each figure beside its limit and its target.

report.py RESULTS RECORD: reads the results of all stages, and writes DATE-gpu.json and DATE-gpu.md to folder RECORD.
Exits with 1 if a stage failed or a target is missed.
"""

import json
import os
import statistics
import sys
from datetime import datetime, timezone
from pathlib import Path

COPY = "copy within the device"


class Results:
    """Documents and lines that the stages left in a folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.benches = {name: self.document(f"{name}.json") for name in ("few", "many", "blend")}
        self.peers = self.document("peers.json")
        self.synthesis = self.document("synthesis.json")
        self.command = self.document("synthesize-command.json")
        self.python = self.document("python.json")

    def document(self, name):
        """Returns the document of a stage, or None if the stage did not finish."""
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.is_file() else []

    def row(self, bench, name):
        rows = (self.benches[bench] or {}).get("measurements", [])
        return next((row for row in rows if row["name"] == name), None)

    def peer(self, name):
        rows = (self.peers or {}).get("measurements", [])
        return next((row for row in rows if row["name"] == name and "error" not in row), None)


def figure(what, value, unit, beside, limit, ratio, target, at_most=False):
    """Returns a line of the table: a ratio that must reach its target, or stay below it if `at_most`."""
    passed = None if ratio is None or target is None else ratio <= target if at_most else ratio >= target
    keys = ("what", "value", "unit", "beside", "limit", "ratio", "target", "at_most", "passed")
    return dict(zip(keys, (what, value, unit, beside, limit, ratio, target, at_most, passed)))


def share(results, bench, name, target, what=None):
    """Compares a row of a bench with the limit that was measured with it."""
    row = results.row(bench, name)
    if row is None:
        return figure(what or name, None, "GB/s", None, None, None, target)
    limit = results.row(bench, row["limit"])
    rates = [r["bytes_per_second"] / 1e9 for r in (row, limit)]
    return figure(what or name, rates[0], "GB/s", row["limit"], rates[1], row["share_of_limit"], target)


def faster(results, bench, name, peer, target):
    """Compares a row with a peer: how many times as fast it is."""
    own, other = results.row(bench, name), results.peer(peer)
    how = peer.split(",")[0] + (" of one tensor" if peer.endswith(", 1") else " in a graph" if "graph" in peer else "")
    what = f"update, {name}: times as fast as torch {how}"
    if own is None or other is None:
        return figure(what, None, "ms", None, None, None, target)
    own, other = own["seconds_median"], other["seconds_median"]
    return figure(what, 1e3 * own, "ms", "torch", 1e3 * other, other / own, target)


def updates(results, few, many):
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


def peers(results, few, many):
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


def blends(results, snapshots, targets):
    lines = []
    for dtype in ("f16", "bf16", "f32"):
        for count, target in ((1, 0.85), (targets, 0.6)):
            name = f"{snapshots} {dtype} snapshots to {count} target{'' if count == 1 else 's'}"
            lines.append(share(results, "blend", name, target if dtype == "f16" else None, f"blend, {name}"))
    return lines


def offloads(results, few, many):
    lines = []
    for bench, tensors in (("few", few), ("many", many)):
        name = f"f32 parameters in {tensors} tensors to the host"
        lines.append(share(results, bench, name, 0.85))
        lines.append(share(results, bench, name.replace("f32", "bf16"), 0.85))
        lines.append(held_up(results, bench, name))
    return lines


def held_up(results, bench, name):
    """Compares the time that copies on the training stream lose during an offload with the offload's time."""
    what = f"training stream held up, {name}"
    beside, offload = results.row(bench, f"copies within the device, while {name} go"), results.row(bench, name)
    if beside is None or offload is None:
        return figure(what, None, "ms", None, None, None, 0.05, True)
    alone = beside["bytes"] / results.row(bench, beside["limit"])["bytes_per_second"]
    lost, lasted = beside["seconds_median"] - alone, offload["seconds_median"]
    return figure(what, 1e3 * lost, "ms", "the offload", 1e3 * lasted, lost / lasted, 0.05, True)


def synthesis(results):
    """Compares synthesis with the bus. The first time opens files and locks memory, so only the others count."""
    limit = results.row("few", "pinned host to device") or results.row("blend", "pinned host to device")
    lines = []
    for what, document, target in (
        ("synthesis into a file, from the page cache, again and again", results.synthesis, 0.8),
        ("synthesis into a file, the command once", results.command, None),
    ):
        if document is None or limit is None:
            lines.append(figure(what, None, "GB/s", "pinned host to device", None, None, target))
            continue
        seconds = document["seconds"]
        seconds = statistics.median(seconds[1:] or seconds) if isinstance(seconds, list) else seconds
        rates = [document["bytes_read"] / seconds, limit["bytes_per_second"]]
        rate, of = (r / 1e9 for r in rates)
        lines.append(figure(what, rate, "GB/s", "pinned host to device", of, rates[0] / rates[1], target))
    return lines


def number(value):
    return "" if value is None else f"{value:.4g}"


def verdict(line):
    return {None: "" if line["target"] is None else "not measured", True: "passes", False: "**fails**"}[line["passed"]]


def table(lines):
    rows = [["what", "", "beside", "", "ratio", "target", ""], ["---", "---:", "---", "---:", "---:", "---:", "---"]]
    for line in lines:
        unit = line["unit"]
        value, limit = (number(line[k]) and f"{number(line[k])} {unit}" for k in ("value", "limit"))
        target = number(line["target"]) and f"{'≤' if line['at_most'] else '≥'} {number(line['target'])}"
        rows.append([line["what"], value, line["beside"] or "", limit, number(line["ratio"]), target, verdict(line)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def about(results, date):
    bench = next((document for document in results.benches.values() if document), {})
    machine = bench.get("machine", {})
    return {
        "date": date,
        "device": results.lines("device.txt"),
        "host": [f"{machine.get('cpu')}, {machine.get('threads')} threads", machine.get("os")] if machine else [],
        "binaries": results.lines("manifest.txt"),
        "torch": (results.peers or {}).get("torch"),
        "stages": results.lines("stages.txt"),
    }


def main():
    folder, record = sys.argv[1:3]
    few, many, snapshots, targets = (os.environ[k] for k in ("FEW", "MANY", "SNAPSHOTS", "TARGETS"))
    names = ("PARAMETERS", "SNAPSHOT_PARAMETERS", "RUN_PARAMETERS", "RUN_SNAPSHOTS")
    sizes = {name.lower(): int(os.environ[name]) for name in names}
    results = Results(folder)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M")
    lines = updates(results, few, many) + peers(results, few, many) + blends(results, snapshots, int(targets))
    lines += synthesis(results) + offloads(results, few, many)
    facts = about(results, date)
    document = {**facts, "sizes": sizes, "figures": lines, "bench": results.benches, "peers": results.peers}
    document |= {"synthesis": results.synthesis, "command": results.command, "python": results.python}
    Path(record, f"{date}-gpu.json").write_text(json.dumps(document) + "\n")
    listed = [f"* {line}" for key in ("device", "host", "binaries", "stages") for line in facts[key]]
    torch = [f"* torch {facts['torch']}"] if facts["torch"] else []
    sized = "* " + ", ".join(f"{v:,} {k.replace('_', ' ')}" for k, v in sizes.items())
    text = "\n".join([f"# {date}, GPU", "", *listed, *torch, sized, "", table(lines)])
    Path(record, f"{date}-gpu.md").write_text(text + "\n")
    print(text)
    failed = [s for s in facts["stages"] if any(word in s for word in ("failed", "out of time", "no time is left"))]
    missed = [line["what"] for line in lines if line["passed"] is False]
    sys.exit("\n".join(["", *failed, *(f"missed: {what}" for what in missed)]) if failed or missed else 0)


if __name__ == "__main__":
    main()
