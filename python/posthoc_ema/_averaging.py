"""Averages of checkpoints, of trainings in which nothing was tracked."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import _native
from ._dtypes import stored_name
from ._outputs import Fresh
from ._profiles import Profile, Target, to_json
from ._progress import Progress, following

__all__ = ["Average", "CheckpointWeight", "average"]


@dataclass(frozen=True)
class CheckpointWeight:
    """The weight of one checkpoint in an average."""

    path: Path
    """Its file or folder."""
    step: int
    weight: float
    """One of 0 is not read."""


@dataclass(frozen=True)
class Average:
    """An average of checkpoints, and what it costs that there are no more of them."""

    profile: Profile
    at: int
    """The step of the average."""
    relative_error: float
    """How far the profile that the weights stand for is from the one asked for, relative to its norm, over single steps."""
    lag_steps: float
    """By how many steps the average is later than the one asked for: a checkpoint is the end of the time it stands for."""
    effective_checkpoints: float
    """So many equally weighted checkpoints would average noise as well."""
    weights: tuple[CheckpointWeight, ...]
    """Of all checkpoints at or before `at`, in order of their steps; their sum is 1."""
    path: Path | None = None
    """Where it was written."""
    state_dict: dict[str, Any] | None = None
    """The average itself, where it was not written."""


def average(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    targets: Target | Iterable[Target],
    out: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
    *,
    steps: Iterable[int] | None = None,
    at: int | None = None,
    dtype: Any = None,
    device: str = "auto",
    progress: Progress = None,
) -> list[Average]:
    """Averages the checkpoints of a training in which nothing was tracked, in one pass for all targets.

    Each checkpoint gets the target's mass on the time since the one before it. Floating-point tensors are summed in
    float64; all others, and the `alpha` of LoRA files, which must be the same in all, are copied from the newest checkpoint.
    The factors of a LoRA are averaged each for itself, which is not the average of their products.

    Args:
        paths: checkpoints, or a single folder of them. Each is a safetensors file, an index of shards, a folder as Hugging
            Face's tools write them, or a file of PyTorch, of which no code is ever run.
        targets: profiles, or numbers as sigma_rel; or a single one.
        out: where each average goes: one path for each target. Where the checkpoints are folders, so is an average, with the
            same shards and the files of configuration and tokenizer, unless its path ends in ``.safetensors``. Where it is not
            given, the averages come as state dicts in memory: of PyTorch's tensors, or numpy's arrays where PyTorch is not
            installed.
        steps: the steps of the checkpoints, in the order of `paths`, or of the names in a folder, where ``epoch2`` is before
            ``epoch10``; from metadata, ``trainer_state.json`` or names where they are not given.
        at: the step of the averages, the newest checkpoint where it is not given.
        dtype: of averaged tensors; each its own where it is not given.
        device: where averages that are written are blended: "auto" tries, "cpu", "cuda:N". The bits are the same.
        progress: a function of the bytes read so far and in all, or whether to draw a bar; None draws one on a terminal.

    Warns:
        UserWarning: for an average of hardly more than one checkpoint.

    Raises:
        ValueError: for checkpoints of different models, steps that cannot be read, windows longer than the training and
            such, naming the file.
        OSError: where something cannot be read or written.
    """
    jsons = to_json([targets] if isinstance(targets, (int, float, Profile)) else targets)
    checkpoints = _native.Checkpoints(_paths(paths), None if steps is None else [int(step) for step in steps])
    outputs = None if out is None else _paths(out)
    if outputs is not None and len(outputs) != len(jsons):
        raise ValueError(f"out names {len(outputs)} paths for {len(jsons)} targets: give one for each")
    text, notes = checkpoints.plans(jsons, at)
    stored = stored_name(dtype)

    def total() -> int:
        return checkpoints.bytes_to_read(jsons, at)

    with following(progress, total, "averaging") as told:
        if outputs is None:
            of_torch = find_spec("torch") is not None
            fresh = Fresh(checkpoints.tensors(), len(jsons), stored, of_torch, checkpoints.averaged())
            checkpoints.load_into(jsons, at, fresh.layout, fresh.addresses(), told)
            results: list[dict[str, Any]] = [{"state_dict": target} for target in fresh.targets]
        else:
            checkpoints.write(jsons, at, outputs, stored, device, told)
            results = [{"path": path} for path in outputs]
    for note in filter(None, notes):
        warnings.warn(note, stacklevel=2)
    return [_average(plan, result) for plan, result in zip(json.loads(text), results)]


def _paths(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]


def _average(plan: dict[str, Any], result: dict[str, Any]) -> Average:
    weights = tuple(CheckpointWeight(Path(w["path"]), w["step"], w["weight"]) for w in plan.pop("weights"))
    return Average(profile=Profile(plan.pop("profile")), weights=weights, **plan, **result)
