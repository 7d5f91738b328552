"""Page of the GPU check, made from its newest record; without one the page says that nothing was measured yet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import table  # noqa: E402

Record = dict[str, Any]
# Place of the page within the documentation.
PAGE = Path("explanation", "performance-gpu.md")
INTRODUCTION = (
    "`benches/gpu/check.py` runs the tests on a GPU and measures updates, blends, synthesis and a training beside the "
    "GPU's own limits, in one call of ten minutes. `benches/gpu/README.md` describes it."
)
# Titles of the tables, and the beginnings of the figures' names.
SECTIONS = (
    ("Updates", ("update,",)),
    ("Blends", ("blend,",)),
    ("Synthesis", ("synthesis",)),
    ("Copies to the host", ("f32 parameters", "bf16 parameters", "training stream")),
    ("Training", ("training step", ".item()")),
)


def page(record: Record | None) -> str:
    """Returns the page in Markdown."""
    parts = [
        "<!-- Made by benches/page.py from the records in benches/record: change those, not this. -->",
        "# Performance on GPUs",
        INTRODUCTION,
    ]
    if record is None:
        parts.append(
            "**Not measured yet.** The kernels are tested on a stand-in for the driver, with their machine code "
            "checked for each architecture. No figure is given here before a GPU has shown it."
        )
    else:
        parts += [*provenance(record), *sections(record), *outcomes(record)]
    return "\n\n".join(parts) + "\n"


def provenance(record: Record) -> list[str]:
    """Returns the device, driver, date, versions and clocks of a record."""
    host = record["host"]
    machine = host.get("machine") or {}
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    measured = f"{record['date']}: {'; '.join(record['device'])}. Host: {machine.get('cpu') or 'unknown CPU'}, "
    measured += f"{host['cores']} cores, {host['system']}; {versions}. All results are in `benches/record/"
    parts = [f"{measured}{record['file']}`."]
    if record["binaries"]:
        parts[0] += f" Build: {'; '.join(line for line in record['binaries'] if len(line) < 64)}."
    if not record["full"]:
        parts.append("**The figures mean nothing at these small sizes.**")
    if not record["finished"]:
        ended = record["interrupted"]
        parts.append(f"The check ended early{', by ' + ended['by'] if ended else ''}: some parts are missing.")
    clocks = record["clocks"]
    if clocks:
        low, high = clocks["sm_mhz"]
        parts.append(
            f"Clocks of the multiprocessors: {low:g} to {high:g} MHz; {clocks['temperature_c']:g} °C and "
            f"{clocks['power_w']:g} W at most; slowed down in {clocks['throttled_s']} of {clocks['samples']} samples."
        )
    return parts


def sections(record: Record) -> list[str]:
    parts = []
    for title, beginnings in SECTIONS:
        lines = [line for line in record["figures"] if line["what"].startswith(beginnings)]
        measured = [line for line in lines if line["value"] is not None]
        parts += [f"## {title}", figures(measured) if measured else "Not measured."]
    return parts


def figures(lines: list[dict[str, Any]]) -> str:
    """Returns a table of figures, each beside its limit."""
    rows = ["| | measured | beside | | ratio |", "| --- | ---: | --- | ---: | ---: |"]
    for line in lines:
        unit = line["unit"]
        limit = "" if line["limit"] is None else f"{table.digits(line['limit'])} {unit}"
        # A rate is a share of its limit, and a time a multiple of it.
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.0%}" if unit == "GB/s" else f"{line['ratio']:.2f}"
        value = f"{table.digits(line['value'])} {unit}"
        rows.append(f"| {line['what']} | {value} | {line['beside'] or ''} | {limit} | {ratio} |")
    return "\n".join(rows)


def outcomes(record: Record) -> list[str]:
    rows = ["| part | outcome | time |", "| --- | --- | ---: |"]
    rows += [f"| {stage['name']} | {stage['outcome']} | {stage['seconds']:.0f} s |" for stage in record["stages"]]
    return ["## Parts of the check", "\n".join(rows)]
