"""Runs made of averages that a training kept itself."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from . import _native
from ._import import Imported
from ._profiles import Profile, to_json
from ._progress import Progress, byte_progress

__all__ = ["import_averages"]


def import_averages(
    source: str | os.PathLike[str],
    run: str | os.PathLike[str],
    *,
    beta: float | Iterable[float] = (),
    ramp: str | None = None,
    sigma_rel: float | Iterable[float] = (),
    gamma: float | Iterable[float] = (),
    key: str | Iterable[str] = (),
    raw: str | None = None,
    update_every: int | None = None,
    update_after_step: int | None = None,
    steps: Iterable[int] | None = None,
    copy: Iterable[str] = (),
    leave_out: Iterable[str] = (),
    ignore_config: Iterable[str] = (),
    progress: Progress = None,
) -> Imported:
    """Makes a run of the averages that a training kept itself, so that any length can be chosen afterwards.

    The source is any series of checkpoints that hold an EMA of a known decay: files of PyTorch, safetensors, folders,
    or distributed checkpoints. Raw weights in the same checkpoints join as averages of their own step. The entries of
    timm, torchvision, Lightning, ultralytics, diffusers, OpenAI and EDM2 are found. The source is only read, and no
    code in it is run. After an error no part of the run is left behind.

    Args:
        source: Folder of the checkpoints. Files without a number in their name are left out if others have one.
        run: Directory of the new run, empty or missing.
        beta: Decay per update of each average, in the order of `key`. The files of diffusers record theirs, as do those
            of trainings that store their arguments, such as timm's and torchvision's, and names of files.
        ramp: Growth of the decay at the start: "ratio[:OFFSET]", "inverse-gamma[:GAMMA[:POWER]]" or "exponential:TAU".
        sigma_rel: Averages by power functions instead, after those of `beta`.
        gamma: Averages by power functions, by exponent.
        key: Entry of each checkpoint that holds an average, or folder of this name in each checkpoint's folder.
        raw: Entry, or folder, of the raw weights; found for timm, torchvision, Lightning, OpenAI and diffusers if `key`
            is not given.
        update_every: Steps between updates; default 1 for files of a known tool.
        update_after_step: Last step before the average began, as a copy of the weights one step later. By default it
            began with the initial weights, or as the tool has it.
        steps: Steps of the checkpoints, in the order of their names; default from metadata or names.
        copy: Names or globs of tensors that the training copied instead of averaging.
        leave_out: Names or globs of tensors to leave out.
        ignore_config: Settings of config.json in which the checkpoints may differ: keys, joined by dots, or globs.
        progress: Function of the bytes written so far and in total, True for a bar, or False for none; default a bar
            on a terminal.

    Returns:
        Number, steps and size of the snapshots, with notes on how the files were read.

    Warns:
        UserWarning: For files and tensors that are not treated as the others.

    Raises:
        ValueError: If an option is missing or contradicts the files, if files contradict each other, or if `run` holds
            other files. The message names the file or the option.
        FileExistsError: If `run` holds a run already.
        OSError: If a file cannot be read or written.
    """
    tracked = [*map(Profile.sigma_rel, _numbers(sigma_rel)), *map(Profile.gamma, _numbers(gamma))]
    found = _native.FoundAverages(
        Path(source),
        [key] if isinstance(key, str) else list(key),
        _numbers(beta),
        ramp,
        to_json(tracked),
        raw,
        update_every,
        update_after_step,
        None if steps is None else [int(step) for step in steps],
        [copy] if isinstance(copy, str) else list(copy),
        [leave_out] if isinstance(leave_out, str) else list(leave_out),
        [ignore_config] if isinstance(ignore_config, str) else list(ignore_config),
    )
    with byte_progress(progress, found.bytes, "importing") as report:
        snapshots, written_steps, written, notes = found.write(Path(run), report)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return Imported(snapshots, tuple(written_steps), written, tuple(notes), tuple(found.notes()))


def _numbers(numbers: float | Iterable[float]) -> list[float]:
    return [float(numbers)] if isinstance(numbers, (int, float)) else [float(number) for number in numbers]
