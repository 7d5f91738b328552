"""Tables of measurements, for a terminal and for the page."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def seconds(value: float) -> str:
    """Formats a time with three digits, in s, ms or us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size or unit == "us":
            return f"{digits(value / size)} {unit}"
    raise AssertionError


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def span(row: Row) -> str:
    """Formats the median and the range of all times."""
    median = row["seconds_median"]
    all_ = row["seconds_all"]
    if len(all_) == 1:
        return f"{seconds(median)} (once)"
    unit = 1.0 if median >= 1 else 1e-3 if median >= 1e-3 else 1e-6
    return f"{seconds(median)} ({digits(min(all_) / unit)} to {digits(max(all_) / unit)})"


def memory(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.2f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.0f} MB"


def times_ours(row: Row, ours: Row | None) -> str:
    """Formats the time as a multiple of ours in the same rounds."""
    if "times_ours" in row:
        return f"{digits(row['times_ours'])}"
    if ours is None or "seconds_median" not in ours:
        return ""
    return digits(row["seconds_median"] / ours["seconds_median"])


def exponent(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


# Columns: their heads, and a function from a row to a cell. A column that is empty for all rows is left out.
COLUMNS = (
    ("time (median, range)", lambda row, ours: span(row)),
    ("CPU time", lambda row, ours: seconds(row["cpu_seconds_median"]) if "cpu_seconds_median" in row else ""),
    ("training waits", lambda row, ours: seconds(row["held_seconds_median"]) if "held_seconds_median" in row else ""),
    ("GB/s", lambda row, ours: digits(row["bytes_per_second"] / 1e9) if "bytes_per_second" in row else ""),
    ("of the limit", lambda row, ours: f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else ""),
    ("times ours", times_ours),
    ("memory", lambda row, ours: memory(row["peak_anonymous_bytes"]) if "peak_anonymous_bytes" in row else ""),
    ("off from f64", lambda row, ours: exponent(row["off_from_f64"]) if "off_from_f64" in row else ""),
    ("off from ours", lambda row, ours: exponent(row["off_from_ours"]) if "off_from_ours" in row else ""),
    ("largest error", lambda row, ours: exponent(row["largest_difference"]) if "largest_difference" in row else ""),
    ("averages in", lambda row, ours: row.get("dtype_of_averages", "").removeprefix("torch.")),
)


TIMES_OURS = [name for name, _ in COLUMNS].index("times ours")


def table(case: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns heads and cells: the limits first, then all rows."""
    rows = [*case["limits"], *case["rows"]]
    ours = next((row for row in case["rows"] if row["name"].startswith("posthoc-ema")), None)
    shown = [[show(row, ours) if "seconds_median" in row else "" for _, show in COLUMNS] for row in rows]
    # No ratio to ours for ours itself and for a limit.
    for row, cells in zip(rows, shown):
        if row is ours or row in case["limits"]:
            cells[TIMES_OURS] = ""
    used = [i for i in range(len(COLUMNS)) if any(cells[i] for cells in shown)]
    heads = ["", *(COLUMNS[i][0] for i in used)]
    body = []
    for row, cells in zip(rows, shown):
        line = [row["name"], *(cells[i] for i in used)]
        if "seconds_median" not in row and used:
            line[1] = f"not measured: {row.get('error', '?')}"
        body.append(line)
    return heads, body


def heading(case: dict[str, Any]) -> str:
    """Returns the title of a case, with the size of its model."""
    text = case["title"]
    if "parameters" in case and "tensors" in case:
        text += f": {case['parameters'] / 1e6:.1f} million parameters in {case['tensors']:,} tensors"
    return text


def text(case: dict[str, Any]) -> str:
    """Formats a table for a terminal."""
    heads, body = table(case)
    lines = [heads, *body]
    # A row without times has its reason in the second column; that may be long.
    widths = [max(len(line[i]) for line in lines if not line[1].startswith("not ")) for i in range(1, len(heads))]
    first = max(len(line[0]) for line in lines)
    shown = [
        f"  {line[0]:{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths))
        for line in lines
    ]
    return "\n".join([f"\n{heading(case)}", *shown, *([f"  {case['note']}"] if case["note"] else [])])


def markdown(case: dict[str, Any]) -> str:
    """Formats a table for the page."""
    heads, body = table(case)
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *body]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
