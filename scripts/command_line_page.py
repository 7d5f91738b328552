#!/usr/bin/env python3
"""Makes docs/reference/command-line.md from the recorded help texts.

python3 scripts/command_line_page.py            # writes the page
python3 scripts/command_line_page.py --check    # exits with 1 if the page differs from the help texts
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HELP = ROOT / "cli" / "tests" / "help"
PAGE = ROOT / "docs" / "reference" / "command-line.md"
PROGRAM = "posthoc-ema"

INTRODUCTION = """\
<!-- Made by scripts/command_line_page.py from the recorded help texts: change those, not this. -->

# Command line

The program `posthoc-ema` comes with the Python package; `cargo install --path cli` installs it alone. These are
its help texts (`posthoc-ema COMMAND --help`).

All commands have in common:

* The exit status is 0 for success, 1 for failure, and 2 for bad usage.
* `--json`, where it is an option, prints one JSON document on the standard output and nothing else there.
* Messages and progress bars go to the standard error. No bar is drawn if that is not a terminal.
* Lists are separated by commas. `...` stands for an evenly spaced rest: `0.05,0.06,...,0.28`.
* Windows are steps or percent of the time: `5000`, `20%`.
* Counts may have units: `7B` elements, `100GB` or `64GiB` bytes.
* `--plot FILE` draws SVG or PNG, by the file's ending, also on machines without fonts.
* `RAYON_NUM_THREADS` limits the threads.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        raise SystemExit(f"{PAGE} is out of date: run python3 scripts/command_line_page.py")


def page() -> str:
    """Returns the whole page in Markdown."""
    names = commands((HELP / f"{PROGRAM}.txt").read_text())
    recorded = {path.stem for path in HELP.glob("*.txt")}
    if recorded != {PROGRAM, *names}:
        raise SystemExit(f"{HELP} has help texts of {sorted(recorded)}, the program has {sorted(names)}")
    return "\n".join([INTRODUCTION, section(PROGRAM), *map(section, names)])


def commands(text: str) -> list[str]:
    """Returns the names of the commands, in the order of the program's help text."""
    listed = text.split("\nCommands:\n")[1].split("\n\n")[0]
    return re.findall(r"^  (\S+)", listed, re.MULTILINE)


def section(name: str) -> str:
    """Returns the section of a command."""
    text = "\n".join(line.rstrip() for line in (HELP / f"{name}.txt").read_text().splitlines())
    return f"## {name}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    main()
