#!/usr/bin/env python3
"""Makes docs/explanation/predictions.md: predicted over measured errors of 40 kinds of movement.

python3 scripts/predictions_page.py              # runs the trial, for some minutes, and writes the page
python3 scripts/predictions_page.py --from LOG   # from what the trial printed
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "explanation" / "predictions.md"
TRIAL = ["cargo", "test", "-p", "posthoc-ema", "--test", "library", "predictions", "--", "--nocapture"]
MARK = "prediction | "
DTYPES = ("F32", "F16", "BF16")
LIMITS = (0.1, 0.5, 1 / 1.5, 1 / 1.1, 1.1, 1.5, 2, 10, 100)

INTRODUCTION = """\
<!-- Made by scripts/predictions_page.py: change that, not this. -->

# Predicted and measured errors

Plans of stored runs [predict the error](noise.md) of each average. This page compares predictions with measurements:
40 kinds of movement, snapshots in three dtypes, averages of 14 lengths from 0.01 to 0.26. Each training has 20,000
steps, an update every 10, and snapshots of `sigma_rel` 0.05 and 0.28 every 1,000. Some kinds are as trainings are,
others are meant to be hard. A swing of a spacing, for example, looks alike at each snapshot.

`python3 scripts/predictions_page.py` runs `tests/library/predictions.rs` and writes this page. The test fails if fewer
than 95% of the predictions for f32 are right to a factor of 2 (16 bits: 99%), or more than 1% are below a half.

## Distribution of predicted over measured error

"""

HARDEST = """
A prediction that is far too large belongs to an event between two snapshots. Its time within the interval is not known,
and the average happens to be exact there. Such plans also have a [range](noise.md), which has the error.

## Each kind

Smallest and largest ratio over the 14 lengths.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="log", type=Path, help="file with the output of the trial")
    options = parser.parse_args()
    if options.log is not None:
        text = options.log.read_text()
    else:
        text = subprocess.run(TRIAL, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    PAGE.write_text(page(ratios(text)))


def ratios(text: str) -> dict[str, dict[str, list[float]]]:
    """Returns the ratios of each kind and dtype, from the printed lines."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in text.splitlines():
        if MARK not in line:
            continue
        name, dtype, *numbers = line.split(MARK, 1)[1].split(" | ")
        found.setdefault(name, {})[dtype] = [float(number) for number in numbers]
    if len(found) != 40 or any(set(of_kind) != set(DTYPES) for of_kind in found.values()):
        raise SystemExit(f"the trial printed {len(found)} kinds of movement, not 40 in three dtypes each")
    return dict(sorted(found.items()))


def page(found: dict[str, dict[str, list[float]]]) -> str:
    """Returns the whole page in Markdown."""
    return INTRODUCTION + distribution(found) + HARDEST + kinds(found)


def distribution(found: dict[str, dict[str, list[float]]]) -> str:
    """Returns the table of the share of ratios between each two limits."""
    rows = ["| ratio | f32 | f16 | bf16 |", "| --- | ---: | ---: | ---: |"]
    columns = [[ratio for of_kind in found.values() for ratio in of_kind[dtype]] for dtype in DTYPES]
    for least, most in zip((0.0, *LIMITS), (*LIMITS, float("inf"))):
        shares = [sum(least <= ratio < most for ratio in column) / len(column) for column in columns]
        rows.append(f"| {between(least, most)} | " + " | ".join(f"{100 * share:.1f}%" for share in shares) + " |")
    within = [sum(0.5 <= ratio <= 2 for ratio in column) / len(column) for column in columns]
    rows.append("| **within a factor of 2** | " + " | ".join(f"**{100 * share:.1f}%**" for share in within) + " |")
    return "\n".join(rows) + "\n"


def between(least: float, most: float) -> str:
    """Returns the name of a range of ratios."""
    if least == 0:
        return f"below {most:.2g}"
    return f"above {least:.3g}" if most == float("inf") else f"{least:.2g} to {most:.3g}"


def kinds(found: dict[str, dict[str, list[float]]]) -> str:
    """Returns the table of the range of ratios of each kind."""
    rows = ["| movement | f32 | f16 | bf16 |", "| --- | ---: | ---: | ---: |"]
    for name, of_kind in found.items():
        ranges = (f"{min(of_kind[dtype]):.2f} to {max(of_kind[dtype]):.2f}" for dtype in DTYPES)
        rows.append(f"| {name} | " + " | ".join(ranges) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
