"""Checkpoints of other tools, made right."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import _native
from ._profiles import Profile
from ._progress import Progress, following

__all__ = ["Imported", "import_run"]


@dataclass(frozen=True)
class Imported:
    """What was imported."""

    snapshots: int
    """How many snapshots were written."""
    steps: tuple[int, ...]
    """Their steps: the time of the last update that each contains, often before the step in the old file's name."""
    bytes: int
    """The size of all files written."""
    warnings: tuple[str, ...]
    """What is worth knowing about the files, in words; each is a :class:`UserWarning`, too."""


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
    """Makes a run of the checkpoints that another tool wrote, with the decays that it really applied.

    Those tools apply the decay of one step once every `update_every` steps, and synthesize as if they had applied it at
    every step. What they stored is a sound average all the same, of a profile that follows from their decays; synthesized
    from the run, it gives the averages that are asked for. The source is only read. No code that a pickle names is ever run,
    and an entry that is an object is refused. The run appears whole: after an error nothing is left behind.

    Args:
        source: the folder with the ``.pt`` files.
        run: the directory of the new run, which is empty or missing.
        tool: "pytorch-posthoc-ema", "ema-pytorch" or "nitrous-ema".
        sigma_rels: the profiles that were tracked, in the order of the files' first number.
        gammas: the same by exponent, instead.
        update_every: steps between updates of that training: 10 by default in pytorch-posthoc-ema, 100 in the others.
        update_after_step: of pytorch-posthoc-ema: the step before which there was no update; 100 for files of version
            1.0.8 and later where it is not given.
        step_size_correction: of nitrous-ema: whether that option was on.
        progress: a function of the bytes read so far and in all, or whether to draw a bar; None draws one on a terminal.

    Raises:
        ValueError: for files that contradict the options or each other, are damaged or hold objects, naming the file; where
            `run` holds other files.
        FileExistsError: where `run` holds a run.
        OSError: where something cannot be read or written.
    """
    tracked = [*map(Profile.sigma_rel, sigma_rels), *map(Profile.gamma, gammas)]
    folder = Path(source)

    def total() -> int | None:
        return sum(map(_size, folder.glob("*.pt"))) if folder.is_dir() else None

    with following(progress, total, "importing") as told:
        snapshots, steps, written, notes = _native.import_run(
            folder,
            Path(run),
            tool,
            [profile._json for profile in tracked],
            update_every,
            update_after_step,
            step_size_correction,
            told,
        )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Imported(snapshots, tuple(steps), written, tuple(notes))


def _size(path: Path) -> int:
    """The size of a file; where it cannot be told, as with a link to nothing, the import says why."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
