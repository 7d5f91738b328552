#!/usr/bin/env python3
"""Packs a program for `cargo binstall`: a .tar.gz with its licences, and the archive's SHA-256 beside it.

python3 scripts/pack_program.py target/x86_64-unknown-linux-musl/release/posthoc-ema \
    --name posthoc-ema-x86_64-unknown-linux-musl --out dist
"""

from __future__ import annotations

import argparse
import hashlib
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("--name", required=True, help="name of the archive without its ending, and of its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the archive")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    archive = arguments.out / f"{arguments.name}.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        for path in (arguments.program, ROOT / "LICENSE-MIT", ROOT / "LICENSE-APACHE"):
            packed.add(path, f"{arguments.name}/{path.name}")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    Path(f"{archive}.sha256").write_text(f"{digest}  {archive.name}\n")


if __name__ == "__main__":
    main()
