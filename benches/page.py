#!/usr/bin/env python3
"""Makes the pages of performance and their pictures from the newest records; no figure is typed in.

python3 benches/page.py             # needs matplotlib, for the pictures
python3 benches/page.py --check     # fails if the page differs from the records, or a picture is missing
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "benches" / "peers")]

import gpu_page  # noqa: E402

import table  # noqa: E402

Record = dict[str, Any]
KINDS = ("peers", "scaling")
# Place of the page within the documentation.
PAGE = Path("explanation", "performance.md")
# Title and introduction of each kind of work, in the order of the page.
WORKS = {
    "update": (
        "Updates",
        "One call that updates two running averages from a model's parameters. The limit is a loop in C that reads and "
        "writes as many bytes, with as many threads. GB/s count the bytes that the averages need: each parameter is "
        "read once, each average is read and written once. Memory is that of the averages and of their update. Ours "
        "is twice as much, because checkpoints are written from a copy of the averages. Between checkpoints the system "
        "may reclaim that copy's memory (`checkpoint_in_background=False` needs no copy). The largest error is against "
        "a recurrence in f64 with the tracker's own decays, on parameters in [-1, 1).",
    ),
    "not due": ("Calls at which nothing is due", "The cost of most training steps."),
    "synthesis": (
        "Synthesis",
        "One state dict or file from 40 snapshots in the page cache. The limit is a loop in C that maps the same files "
        "and adds their 64-bit words up, with as many threads. GB/s are of snapshots read. Programs are timed as whole "
        "processes, Python after its imports. Memory is anonymous: it includes results, but not mapped files. Off from "
        "f64 is the largest difference, in a sample of elements, from a sum in f64 with the weights of our plan, "
        "relative to the RMS. Packages that solve for their own weights differ by those, too.",
    ),
    "targets": (
        "Synthesis to many targets",
        "All averages from one pass over 40 snapshots in the page cache. The program's limit is a loop in C that does "
        "the same sums in f64 and writes as many results to fresh files in memory, with as many threads. The other "
        "limits are parts of it: reading the mapped files, and the multiply-adds alone.",
    ),
    "cold": (
        "Synthesis with a cold page cache",
        "The same, with the snapshots dropped from the page cache before each round (`posix_fadvise`, checked with "
        "`mincore`). The limit reads the same files directly from the disk.",
    ),
    "folders": (
        "Averages of folders",
        "The mean of three folders of one model, each of two shards, into a folder of the same kind, with the files in "
        "the page cache. All are timed as whole processes. The limit is that of a synthesis.",
    ),
    "formats": (
        "Averages of other libraries' checkpoints",
        "The mean of two checkpoints of one model, stored as safetensors, by `torch.save`, by "
        "`torch.distributed.checkpoint` from two processes, and as the f32 weights of DeepSpeed's optimizer in two "
        "processes. All files are in the page cache, and results go into files in memory. Programs are timed as whole "
        "processes, Python after its imports. The limit is a loop in C that maps the safetensors files, adds them up "
        "in f64 and writes the mean into a fresh file, with as many threads. Each row of ours is compared with ours on "
        "safetensors files, each other row with ours on the same kind of files. All results are "
        "equal in all bits. CPU time is that of all threads: other work on the machine changes it less.",
    ),
    "adapters": (
        "Averages of the products of adapters",
        "`average --product svd`: the average of the products of low-rank adapters, cut back to their rank, with the "
        "files in the page cache. The program is timed as a whole process, numpy after its import. One row of numpy "
        "takes the QR decompositions of the stacked factors and the SVD of the small core, as ours does. The other one "
        "takes the SVD of a whole product. The limit adds up the mapped files, as that of a synthesis. Off from f64 is "
        "the largest distance of a product from the best of its rank, relative to its norm.",
    ),
    "writing": (
        "Storing",
        "Time from the call that stores a snapshot until it is on the disk, and the part of it for which the training "
        "waits. Each rate is of the bytes that are written, ours with the live state. The limit writes as many bytes "
        "as the snapshot has into the same folder.",
    ),
    "start": (
        "Start",
        "Time until a plan on 40 snapshots is printed, beside the time to start the program and do nothing.",
    ),
}
# Notes that replace those of earlier records, by the title of the case.
NOTES = {
    "Update, f32 parameters, compensated averages": (
        "None of the other packages measured here has compensated averages."
    ),
    "Update, bf16 parameters, plain f32 averages": (
        "The last column shows averages of bf16: they take half the memory, and lose late updates."
    ),
}
AXES = {
    "parameters": "parameters",
    "snapshots": "snapshots",
    "targets": "targets in one pass",
    "threads": "threads",
}
# Kinds of work with a picture of bars.
PICTURED = ("update", "synthesis")
INK, OURS, THEIRS, LIMIT = "#333333", "#1f6f8b", "#b9b9b9", "#c0392b"


def main() -> None:
    options = parse()
    records: dict[str, Record | None] = {
        "peers": newest_cases(options.records),
        "scaling": newest(options.records, "scaling"),
    }
    pages = {gpu_page.PAGE: gpu_page.page(newest(options.records, "gpu"))}
    if any(records.values()):
        pages[PAGE] = page(records)
    else:
        print(f"{options.records} holds no record of {' or '.join(KINDS)}: their page is not made")
    if options.check:
        check(options, pages, records)
        return
    for path, text in pages.items():
        (options.docs / path).parent.mkdir(parents=True, exist_ok=True)
        (options.docs / path).write_text(text)
    (options.docs / "pictures").mkdir(parents=True, exist_ok=True)
    for name, draw in pictures(records).items():
        draw(options.docs / "pictures" / name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    parser.add_argument("--records", type=Path, default=ROOT / "benches" / "record")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    return parser.parse_args()


def newest(folder: Path, kind: str) -> Record | None:
    """Returns the record of a kind with the last date in its name."""
    found = records_of(folder, kind)
    return found[-1] if found else None


def records_of(folder: Path, kind: str) -> list[Record]:
    """Returns all records of a kind, the oldest first."""
    return [{**json.loads(path.read_text()), "file": path.name} for path in sorted(folder.glob(f"*-{kind}.json"))]


def newest_cases(folder: Path) -> Record | None:
    """Returns the newest cases of each kind of work, each with its record."""
    cases: dict[str, list[Record]] = {}
    for record in records_of(folder, "peers"):
        own: dict[str, list[Record]] = {}
        for case in record["cases"]:
            own.setdefault(case["work"], []).append({**case, "record": record})
        # A case may have moved to another kind of work.
        titles = {table.heading(case) for case in record["cases"]}
        for work, older in cases.items():
            cases[work] = [case for case in older if table.heading(case) not in titles]
        cases |= own
    return {"cases": [case for work in cases.values() for case in work]} if cases else None


def check(options: argparse.Namespace, pages: dict[Path, str], records: dict[str, Record | None]) -> None:
    wrong = []
    for path, text in pages.items():
        made = options.docs / path
        if not made.exists() or made.read_text() != text:
            wrong.append(f"{made} differs from the records")
    missing = [name for name in pictures(records) if not (options.docs / "pictures" / name).exists()]
    wrong += [f"{options.docs / 'pictures' / name} is missing" for name in missing]
    if wrong:
        raise SystemExit("\n".join([*wrong, "make them with: python3 benches/page.py"]))


# Text


def page(records: dict[str, Record | None]) -> str:
    """Returns the whole page in Markdown."""
    peers = records["peers"]
    scaling = records["scaling"]
    parts = [
        "<!-- Made by benches/page.py from the records in benches/record: change those, not this. -->",
        "# Performance",
        "`benches/peers/run.py` and `benches/scaling.py` measure everything here, and anyone can repeat it. Each "
        "section names its command and its record. Other packages and the limits of the machine are measured in turns "
        "with ours, so ratios hold on other machines; seconds do not. `benches/peers/README.md` describes the method.",
    ]
    parts += sections(peers) if peers else []
    parts += scaling_sections(scaling) if scaling else []
    return "\n\n".join(parts) + "\n"


def provenance(record: Record) -> str:
    """Returns the command, date, machine and versions of a record."""
    machine = record["machine"]
    versions = record["versions"]
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if machine["memory_bytes"] else ""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    load = record.get("load_average", 0.0)
    busy = f" Other work ran beside it: the load average was {load:.0f}." if load > machine["cores"] else ""
    warning = " **The figures mean nothing at these small sizes.**" if record["size"] != "full" else ""
    return (
        f"`{record['command']}`, {record['date']}: {machine['cpu']}, {machine['cores']} cores{memory}, "
        f"{machine['system']} {machine['kernel']}; {named}. All times are in "
        f"`benches/record/{record['file']}`.{busy}{warning}"
    )


def sections(record: Record) -> list[str]:
    parts: list[str] = []
    last = ""
    for work, (title, introduction) in WORKS.items():
        cases = [case for case in record["cases"] if case["work"] == work]
        if not cases:
            continue
        source = cases[0]["record"]
        parts += [f"## {title}", *([provenance(source)] if source["file"] != last else []), introduction]
        last = source["file"]
        if work in PICTURED:
            parts.append(f"![{title}: rates beside the limit](../pictures/performance-{work}.svg)")
        for case in cases:
            if len(cases) > 1 or table.heading(case) != title:
                parts.append(f"**{table.heading(case)}**")
            parts += [table.markdown(case), *([NOTES.get(case["title"], case["note"])] if case["note"] else [])]
    return parts


def scaling_sections(record: Record) -> list[str]:
    parts = [
        "## Scaling",
        provenance(record),
        "Updates are those of `posthoc-ema bench`. Each synthesis is a process of its own, with its results in memory.",
        "![Time over parameters, snapshots, targets and threads](../pictures/performance-scaling.svg)",
    ]
    for sweep in record["sweeps"]:
        parts += [f"**{sweep['work'].capitalize()}, {sweep['title']}**", sweep_table(sweep)]
    return parts


def sweep_table(sweep: dict[str, Any]) -> str:
    """Returns a table of times, rates, and the cost of one unit."""
    x = sweep["x"]
    lines = [
        f"| {x} | time (median, range) | GB/s | a {x.removesuffix('s')} | memory |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for point in sweep["points"]:
        if "seconds_median" not in point:
            lines.append(f"| {point['x']:,} | not measured: {point.get('error', '?')} | | | |")
            continue
        seconds = point["seconds_median"]
        each = "" if x == "threads" else unit_cost(seconds / point["x"])
        memory = table.memory(point["peak_anonymous_bytes"]) if "peak_anonymous_bytes" in point else ""
        rate = table.digits(point["bytes"] / seconds / 1e9)
        lines.append(f"| {point['x']:,} | {table.span(point)} | {rate} | {each} | {memory} |")
    return "\n".join(lines)


def unit_cost(seconds: float) -> str:
    """Formats the time of one unit, down to nanoseconds."""
    return table.seconds(seconds) if seconds >= 1e-6 else f"{table.digits(seconds * 1e9)} ns"


# Pictures


def pictures(records: dict[str, Record | None]) -> dict[str, Any]:
    """Returns the names of the picture files, each with the function that draws it."""
    peers = records["peers"]
    scaling = records["scaling"]
    drawn: dict[str, Any] = {}
    for work in PICTURED if peers else ():
        cases = [case for case in peers["cases"] if case["work"] == work]
        if cases:
            drawn[f"performance-{work}.svg"] = lambda path, cases=cases: draw_bars(path, cases)
    if scaling:
        drawn["performance-scaling.svg"] = lambda path: draw_scaling(path, scaling["sweeps"])
    return drawn


def plotting() -> Any:
    """Imports matplotlib with settings that give the same bytes each time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "posthoc-ema",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.edgecolor": INK,
            "text.color": INK,
        }
    )
    import matplotlib.pyplot as plt

    return plt


def save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    plt.close(figure)


def draw_bars(path: Path, cases: list[dict[str, Any]]) -> None:
    """Draws rates as bars, with the limit as a line through all bars of a case."""
    plt = plotting()
    shown = [[row for row in case["rows"] if "bytes_per_second" in row] for case in cases]
    heights = [max(1, len(rows)) for rows in shown]
    figure, axes = plt.subplots(
        len(cases),
        1,
        figsize=(8, 0.6 * len(cases) + 0.24 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, case, rows in zip(axes[:, 0], cases, shown):
        names = [row["name"] for row in rows]
        rates = [row["bytes_per_second"] / 1e9 for row in rows]
        colours = [OURS if name.startswith("posthoc-ema") else THEIRS for name in names]
        axis.barh(range(len(names)), rates, color=colours, height=0.7)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        for limit in case["limits"]:
            if "seconds_median" in limit:
                axis.axvline(case["bytes"] / limit["seconds_median"] / 1e9, color=LIMIT, linewidth=1.2)
        axis.set_title(table.heading(case), fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("GB/s; the red line is the limit")
    save(plt, figure, path)


def draw_scaling(path: Path, sweeps: list[dict[str, Any]]) -> None:
    """Draws seconds over each axis, logarithmic except for threads, with a dotted line of proportional growth."""
    plt = plotting()
    from matplotlib import ticker

    axes_of = [(work, x) for work, x in dict.fromkeys((sweep["work"], sweep["x"]) for sweep in sweeps)]
    figure, axes = plt.subplots(
        -(-len(axes_of) // 2), 2, figsize=(9, 3.2 * -(-len(axes_of) // 2)), layout="constrained", squeeze=False
    )
    for axis, (work, x) in zip(axes.flat, axes_of):
        for sweep in sweeps:
            points = [point for point in sweep["points"] if "seconds_median" in point]
            if (sweep["work"], sweep["x"]) == (work, x) and points:
                draw_sweep(axis, points, sweep)
        if x != "threads":
            axis.set_xscale("log")
            axis.set_yscale("log")
        counts = sorted({point["x"] for sweep in sweeps if sweep["x"] == x for point in sweep["points"]})
        axis.set_xticks(counts, [short_count(count) for count in counts])
        axis.yaxis.set_major_formatter(ticker.EngFormatter("s"))
        for each in (axis.xaxis, axis.yaxis):
            each.set_minor_formatter(ticker.NullFormatter())
            each.set_minor_locator(ticker.NullLocator())
        if x == "threads":
            axis.set_ylim(bottom=0)
        axis.set_xlabel(AXES[x])
        axis.set_ylabel("seconds")
        axis.set_title(f"{work}, {AXES[x]}", fontsize=9, loc="left")
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(axes_of) :]:
        axis.set_visible(False)
    save(plt, figure, path)


def short_count(count: int) -> str:
    """Formats a count with a unit, such as 1M for a million."""
    for letter, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size and count % (size // 10) == 0:
            return f"{count / size:g}{letter}"
    return str(count)


def draw_sweep(axis: Any, points: list[dict[str, Any]], sweep: dict[str, Any]) -> None:
    xs = [point["x"] for point in points]
    ys = [point["seconds_median"] for point in points]
    (line,) = axis.plot(xs, ys, "o-", markersize=3, linewidth=1, label=sweep["title"])
    # Time should fall with threads and grow with everything else.
    power = -1 if sweep["x"] == "threads" else 1
    x0, y0 = (xs[0], ys[0]) if power < 0 else (xs[-1], ys[-1])
    axis.plot(xs, [y0 * (x / x0) ** power for x in xs], ":", color=line.get_color(), linewidth=0.8)


if __name__ == "__main__":
    main()
