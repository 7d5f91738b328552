#!/usr/bin/env python3
"""Compares posthoc-ema with other packages and with the limits of this machine.

    python3 benches/peers/run.py --record benches/record/DATE-peers.json

Makes a virtual environment, and installs the others from PyPI and ours from this checkout. All get the same data and
run in processes of their own, in turns. Checks the results, and prints time, rate, share of the limit and memory.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Modules with a function `measure(environment)`, which returns their cases.
WORKS = ("updates", "synthesis", "targets", "cold", "folders", "formats", "adapters", "writing", "start")


def main() -> None:
    options = parse()
    import environment as setup

    if options.python is None and Path(sys.executable) != setup.venv_python():
        setup.install()
        # Everything from here on needs numpy and PyTorch.
        os.execv(setup.venv_python(), [str(setup.venv_python()), *sys.argv])
    found = prepare(options, setup)
    import table

    cases: list[dict[str, Any]] = []
    begun = time.monotonic()
    try:
        for work in options.only:
            print(f"{work} (at {time.monotonic() - begun:.0f} s)", file=sys.stderr)
            for case in importlib.import_module(work).measure(found):
                print(table.text(case), flush=True)
                cases.append(case)
    finally:
        shutil.rmtree(found.folder, ignore_errors=True)
        # Keeps the measurements before a failure, too.
        write(options, found, cases, time.monotonic() - begun, setup)
    ours = failures(cases)
    if ours:
        raise SystemExit("\n".join(ours))


def failures(cases: list[dict[str, Any]]) -> list[str]:
    """Lists the failures of posthoc-ema itself, without work that was left out on purpose."""
    rows = [(case["title"], row) for case in cases for row in case["rows"] if row["name"].startswith("posthoc-ema")]
    failed = [(title, row) for title, row in rows if not row.get("error", "left out").startswith("left out")]
    return [f"{title}: {row['name']}: {row['error']}" for title, row in failed]


def write(options: argparse.Namespace, found: Any, cases: list[dict[str, Any]], seconds: float, setup: Any) -> None:
    record = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["benches/peers/run.py", *without_paths(sys.argv[1:])]),
        "size": found.size,
        "seconds": seconds,
        "load_average": found.load_average,
        **setup.about(found),
        "cases": cases,
    }
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="write all measurements there, as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, whose figures mean nothing, to see that everything runs"
    )
    parser.add_argument("--only", type=parse_works, default=WORKS, metavar="LIST", help=f"some of {','.join(WORKS)}")
    parser.add_argument("--device", default="cpu", help="device of the parameters of updates: cpu (default) or cuda")
    parser.add_argument("--folder", type=Path, help="for snapshots, on a disk (default: target/)")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="for files that no disk should slow")
    group = parser.add_argument_group("parts that exist already (by default everything is installed into target/)")
    group.add_argument("--python", type=Path, help="a Python with PyTorch, timm and posthoc_ema: nothing is installed")
    group.add_argument("--peers", type=Path, metavar="DIR", help="with pytorch-posthoc-ema and ema-pytorch")
    group.add_argument("--program", type=Path, help="the program posthoc-ema")
    group.add_argument("--mergekit", metavar="PROGRAM", help="mergekit-pytorch, or none")
    group.add_argument("--olmo", metavar="PYTHON", help="a Python with OLMo-core, or none")
    return parser.parse_args()


def parse_works(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for work in chosen:
        if work not in WORKS:
            raise argparse.ArgumentTypeError(f"{work}: choose among {', '.join(WORKS)}")
    return chosen


def prepare(options: argparse.Namespace, setup: Any) -> Any:
    """Builds or finds everything that takes part."""
    setup.TARGET.mkdir(parents=True, exist_ok=True)
    installing = options.python is None
    blending = set(options.only) - {"updates", "writing"}
    program = options.program.resolve() if options.program else "left out: no --program FILE"
    if installing and options.program is None and blending:
        program = setup.build_program()
    mergekit, olmo = (apart(given) for given in (options.mergekit, options.olmo))
    if installing and options.mergekit is None and {"synthesis", "folders"} & set(options.only):
        mergekit = setup.install_apart("mergekit", "mergekit-pytorch")
    if installing and options.olmo is None and "formats" in options.only:
        olmo = setup.install_apart("ai2-olmo-core", "python")
    peers = options.peers.resolve() if options.peers else setup.packages() if installing else None
    folder = tempfile.mkdtemp(prefix="data-", dir=options.folder or setup.TARGET)
    found = setup.Environment(
        python=Path(os.path.abspath(options.python)) if options.python else setup.venv_python(),
        program=program,
        peers=peers,
        mergekit=mergekit,
        olmo=olmo,
        folder=Path(folder),
        memory=options.memory if options.memory.is_dir() else Path(folder),
        size="quick" if options.quick else "full",
        device=options.device,
    )
    found.limits = setup.build_limits()
    return found


def apart(given: str | None) -> Path | str:
    """Returns the path of a program in another environment, or why there is none."""
    return "left out" if given in (None, "none") else Path(os.path.abspath(given))


def without_paths(arguments: list[str]) -> list[str]:
    """Returns the arguments without the paths of this machine."""
    kept = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument.split("=")[0] in (
            "--python",
            "--peers",
            "--program",
            "--mergekit",
            "--olmo",
            "--folder",
            "--record",
        ):
            skip = "=" not in argument
        else:
            kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
