#!/usr/bin/env python3
"""Compares the tag of a release with the version of the packages, and with the changelog.

python3 scripts/check_version.py v0.1.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    version = sys.argv[1].removeprefix("v")
    failures = [
        f"{path}: version {found}, not {version} as the tag says"
        for path in ("Cargo.toml", "cli/Cargo.toml", "candle/Cargo.toml", "python/Cargo.toml")
        for found in versions(ROOT / path)
        if found != version
    ]
    if not re.search(rf"^## \[?{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
        failures.append(f"CHANGELOG.md: no section for {version}")
    if failures:
        raise SystemExit("\n".join(failures))


def versions(manifest: Path) -> list[str]:
    """Returns the version of the packages, and those asked of the packages of this workspace."""
    pattern = r'^(?:version = |posthoc-ema[a-z-]* = \{.*version = )"([^"]+)"'
    return re.findall(pattern, manifest.read_text(), re.MULTILINE)


if __name__ == "__main__":
    main()
