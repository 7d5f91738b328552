"""Averages of the checkpoints of a training in which nothing was tracked."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from . import _native
from ._dtypes import average_dtype_name
from ._form import output_form, part_text, patterns
from ._outputs import OutputBuffers
from ._profiles import Profile, Target, to_json
from ._progress import Progress, byte_progress

__all__ = ["Average", "CheckpointWeight", "ProductErrors", "average"]


@dataclass(frozen=True)
class CheckpointWeight:
    """Weight of one checkpoint in an average."""

    path: Path
    """File or folder of the checkpoint."""
    step: int
    """Step of the checkpoint."""
    weight: float
    """Factor of the checkpoint; one of weight 0 is not read."""


@dataclass(frozen=True)
class ProductErrors:
    """Errors of an average of low-rank adapters, in the Frobenius norm of all their products together."""

    pairs: int
    """Number of adapters: pairs of factors."""
    truncation_error: float
    """Distance of the products in the average from the averages of the products, relative to these: the cost of cutting
    them back to the rank of the factors."""
    factors_error: float
    """The same distance for averages of the factors."""


@dataclass(frozen=True)
class Average:
    """An average of checkpoints, and the errors that come from their number."""

    profile: Profile
    """Profile that was asked for."""
    at: int
    """Step of the average."""
    relative_error: float
    """Distance from the average asked for, if weights walked at random, relative to that of the newest weights.

    1 means that the average is not nearer than the newest checkpoint; 0 takes a checkpoint at each step."""
    lag_steps: float
    """Steps by which the average is later than the one asked for: a checkpoint is the end of its interval."""
    effective_checkpoints: float
    """Number of equally weighted checkpoints that would average noise as well."""
    weights: tuple[CheckpointWeight, ...]
    """Weights of all checkpoints at or before `at`, in the order of their steps; their sum is 1."""
    path: Path | None = None
    """File or folder of the average, if it was written."""
    state_dict: dict[str, Any] | None = None
    """Tensors of the average, if it was not written."""
    product: ProductErrors | None = None
    """Errors of the products of adapters, if these were averaged."""


def average(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    targets: Target | Iterable[Target],
    out: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
    *,
    steps: Iterable[int] | None = None,
    at: int | None = None,
    dtype: Any = None,
    device: str = "auto",
    key: str | None = None,
    copy: Iterable[str] = (),
    leave_out: Iterable[str] = (),
    product: Literal["factors", "svd"] = "factors",
    ignore_config: Iterable[str] = (),
    like: str | os.PathLike[str] | None = None,
    shard_size: int | str | None = None,
    rename: str | Iterable[str] = (),
    follow_links: bool = False,
    part: tuple[int, int] | None = None,
    progress: Progress = None,
) -> list[Average]:
    """Averages the checkpoints of a training in which nothing was tracked, in one pass for all targets.

    The weight of a checkpoint is the target's share of the time since the checkpoint before it. Floating-point tensors
    are summed in float64; all others are copied from the newest checkpoint. So is the `alpha` of LoRA files, which must
    be equal in all of them. The factors of a LoRA are averaged separately, which is not the average of their products:
    `product="svd"` averages these.

    Args:
        paths: Checkpoints, or a single folder of them. Each is a safetensors file, an index of shards, a folder in the
            form of Hugging Face's tools, or a file of PyTorch, from which no code is run.
        targets: One or several profiles, or numbers as sigma_rel.
        out: One path for each target. If the checkpoints are folders, an average is a folder, too, with the same shards
            and the files of configuration and tokenizer, unless its path ends in `.safetensors`. By default the
            averages are returned as state dicts: of PyTorch's tensors, or of NumPy's arrays if PyTorch is not
            installed.
        steps: Steps of the checkpoints, in the order of `paths` or of the names in a folder, where `epoch2` is before
            `epoch10`. By default they come from metadata, `trainer_state.json` or names.
        at: Step of the averages; default that of the newest checkpoint.
        dtype: Dtype of averaged tensors; default each tensor's own.
        device: Device on which written averages are blended: "auto", "cpu" or "cuda:N". The bits are the same on all.
        key: Entry that holds the model in training checkpoints of PyTorch: a key, or keys that lead to it, joined by
            dots. By default it is found by the names that trainers use.
        copy: Names or globs of tensors to copy from the newest checkpoint instead of averaging them.
        leave_out: Names or globs of tensors, or of other entries of the model, to leave out; with `like`, also of
            tensors that only this folder has.
        product: Average of low-rank adapters (LoRA). "factors" averages each factor. "svd" averages the products, each
            with its scale, and cuts them back to their rank.
        ignore_config: Settings of `config.json` and other configurations in which the checkpoints may differ: keys
            joined by dots, or globs.
        like: Folder of a model that averages are written like, as for `PostHocEMA.write`.
        shard_size: Largest size of a shard, as for `PostHocEMA.write`.
        rename: Rules that rename tensors, as for `PostHocEMA.write`.
        follow_links: If True, copies configuration, tokenizer and other small files even if they are links that lead
            out of the checkpoint's folder, which is otherwise an error. Hugging Face's cache does not need it.
        part: Part (K, N) of what is written, counted from 1, as for `PostHocEMA.write`.
        progress: Function of the bytes read so far and in total, True for a bar, or False for none; default a bar
            on a terminal.

    Returns:
        An average for each target, in their order.

    Warns:
        UserWarning: If an average contains hardly more than one checkpoint, and if the files leave a choice: with what
            was chosen and what else is in them.

    Raises:
        ValueError: If the checkpoints are of different models, a step cannot be read, or a window is longer than the
            training. The message names the file.
        OSError: If a file cannot be read or written.
    """
    jsons = to_json([targets] if isinstance(targets, (int, float, Profile)) else targets)
    given = None if steps is None else [int(step) for step in steps]
    copied, left_out = patterns("copy", copy), patterns("leave_out", leave_out)
    ignored = patterns("ignore_config", ignore_config)
    form = output_form(like, shard_size, rename, left_out if like is not None else (), follow_links)
    checkpoints = _native.Checkpoints(
        _paths(paths), given, key, copied, left_out, form.left_out(), ignored, product, follow_links
    )
    outputs = None if out is None else _paths(out)
    if outputs is not None and len(outputs) != len(jsons):
        raise ValueError(f"out names {len(outputs)} paths for {len(jsons)} targets: give one for each")
    if outputs is None and (like is not None or shard_size is not None or rename):
        raise ValueError("like, shard_size and rename are for averages that are written: name a path with out")
    if outputs is None and part is not None:
        raise ValueError("part is for averages that are written: name a path with out")
    text, notes = checkpoints.plans(jsons, at)
    notes += _native.check_form(checkpoints, jsons, at, form)
    stored = average_dtype_name(dtype)

    def total() -> int:
        return checkpoints.bytes_to_read(jsons, at)

    with byte_progress(progress, total, "averaging") as report:
        if outputs is None:
            of_torch = find_spec("torch") is not None
            buffers = OutputBuffers(checkpoints.tensors(), len(jsons), stored, of_torch, checkpoints.averaged())
            checkpoints.load_into(jsons, at, buffers.layout, buffers.addresses(), report)
            results: list[dict[str, Any]] = [{"state_dict": target} for target in buffers.targets]
        else:
            checkpoints.write(jsons, at, outputs, stored, device, form, part_text(part), report)
            results = [{"path": path} for path in outputs]
    for note in filter(None, [*checkpoints.notes(), *notes]):
        warnings.warn(note, stacklevel=2)
    for result, errors in zip(results, json.loads(checkpoints.product_errors(jsons, at))):
        result["product"] = errors and ProductErrors(**errors)
    return [_average(plan, result) for plan, result in zip(json.loads(text), results)]


def _paths(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]


def _average(plan: dict[str, Any], result: dict[str, Any]) -> Average:
    weights = tuple(CheckpointWeight(Path(w["path"]), w["step"], w["weight"]) for w in plan.pop("weights"))
    return Average(profile=Profile(plan.pop("profile")), weights=weights, **plan, **result)
