#!/usr/bin/env python3
"""Builds the documentation into target/site, and checks every link within the repository.

pip install -r docs/requirements.txt
python3 scripts/site.py

Exits with 1 for any of these: a warning of the build; a docstring that does not match its function; a page that is only
in docs/ or only in the navigation of zensical.toml; a dead link or anchor in any Markdown file of the repository.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli

ROOT = Path(__file__).resolve().parents[1]
# The programs of docs/requirements.txt, installed for this Python.
PROGRAMS = Path(sys.executable).parent


def main() -> None:
    failures = [*navigation(), *build(), *links()]
    if failures:
        raise SystemExit("\n".join(["", "the documentation is not in order:", *failures]))


def navigation() -> list[str]:
    """Compares the pages in the navigation with those in docs/."""
    listed = set(pages(tomli.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    found = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    missing = [f"zensical.toml: {page} is in the navigation, and not in docs/" for page in sorted(listed - found)]
    return missing + [
        f"docs/{page}: the page is not in the navigation of zensical.toml" for page in sorted(found - listed)
    ]


def pages(entry: Any) -> Iterator[str]:
    """Yields the pages of a part of the navigation."""
    if isinstance(entry, str):
        yield entry
        return
    for each in entry.values() if isinstance(entry, dict) else entry:
        yield from pages(each)


def build() -> list[str]:
    """Builds the site, and returns the failures."""
    done = run(PROGRAMS / "zensical", "build", "--clean", "--strict")
    failures = [] if done.returncode == 0 else ["zensical: the build failed"]
    # Docstrings are read by griffe, whose warnings do not fail the build.
    return failures + [line for line in done.stdout.splitlines() if line.startswith("griffe: ")]


def links() -> list[str]:
    """Checks all links, and returns the failures."""
    done = run(PROGRAMS / "md-dead-link-check", "--config", ROOT / "docs" / "links.toml")
    return [] if done.returncode == 0 else ["md-dead-link-check: there are dead links"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a program at the top of the repository, and prints its output."""
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout, end="", flush=True)
    return done


if __name__ == "__main__":
    main()
