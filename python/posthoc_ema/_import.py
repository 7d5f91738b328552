"""Runs made of the checkpoints of other tools."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import _native
from ._profiles import Profile, to_json
from ._progress import Progress, byte_progress

__all__ = ["Imported", "import_run"]


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    snapshots: int
    """Number of snapshots written."""
    steps: tuple[int, ...]
    """Their steps: the time of the last update that each contains, often before the step in the old file's name."""
    bytes: int
    """Size of all files written."""
    warnings: tuple[str, ...]
    """Remarks on the files; each is raised as a `UserWarning`, too."""
    notes: tuple[str, ...] = ()
    """How the files were read, for averages that a training kept."""


def import_run(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    tool: str = "pytorch-posthoc-ema",
    *,
    sigma_rels: Iterable[float] = (),
    gammas: Iterable[float] = (),
    update_every: int,
    update_after_step: int | None = None,
    step_size_correction: bool = False,
    progress: Progress = None,
) -> Imported:
    """Makes a run of the checkpoints of another tool, with the decays that it really applied.

    These tools apply the decay of one step once every `update_every` steps, and synthesize as if they had applied it at
    every step. Their checkpoints are sound averages of another profile, which follows from the decays. A synthesis from
    the imported run gives the averages that were meant.

    The source is only read. No code that a pickle names is run; an entry that is an object is refused. After an error
    no part of the run is left behind.

    Args:
        source: Folder with the `.pt` files.
        run: Directory of the new run, empty or missing.
        tool: "pytorch-posthoc-ema", "ema-pytorch" or "nitrous-ema".
        sigma_rels: Tracked profiles, in the order of the files' first number.
        gammas: Tracked profiles by exponent, instead.
        update_every: Steps between updates of that training. The default is 10 in pytorch-posthoc-ema and 100 in the
            others.
        update_after_step: First step with an update, for pytorch-posthoc-ema; default 100 for files of version 1.0.8
            and later.
        step_size_correction: Value of this option of nitrous-ema.
        progress: Function of the bytes read so far and in total, True for a bar, or False for none; default a bar
            on a terminal.

    Returns:
        Number, steps and size of the snapshots.

    Warns:
        UserWarning: For each remark on the files.

    Raises:
        ValueError: If files contradict the options or each other, are damaged or hold objects, or if `run` holds other
            files. The message names the file.
        FileExistsError: If `run` holds a run already.
        OSError: If a file cannot be read or written.
    """
    tracked = [*map(Profile.sigma_rel, sigma_rels), *map(Profile.gamma, gammas)]
    folder = Path(source)

    def total() -> int | None:
        return sum(map(_size, folder.glob("*.pt"))) if folder.is_dir() else None

    with byte_progress(progress, total, "importing") as report:
        snapshots, steps, written, notes = _native.import_run(
            folder,
            Path(run),
            tool,
            to_json(tracked),
            update_every,
            update_after_step,
            step_size_correction,
            report,
        )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Imported(snapshots, tuple(steps), written, tuple(notes))


def _size(path: Path) -> int:
    """Returns the size of a file, or 0 for a broken link: the import reports the error."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
