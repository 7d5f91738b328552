"""Compares averages of two equal checkpoints with PyTorch's reader, for the inputs of the fuzz targets."""

from __future__ import annotations

import argparse
import io
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

TARGETS = ("model_file", "distributed", "deepspeed")
MODULE = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def two_files(flag: int, first: bytes, second: bytes) -> bytes:
    return bytes([flag]) + len(first).to_bytes(4, "little") + first + second


def model() -> dict[str, torch.Tensor]:
    base = torch.arange(12.0).reshape(3, 4)
    return {"a": base, "b": base.t(), "c": base[1:, ::2].bfloat16(), "n": torch.tensor(3), "e": torch.zeros(0, 2)}


def deepspeed(stage: int) -> bytes:
    shapes = [OrderedDict(a=torch.Size([2, 3]), b=torch.Size([3])), OrderedDict(c=torch.Size([1]))]
    names = {"a": (2, 3), "b": (3,), "c": (1,), "t": (2, 3)}
    weights = {name: torch.zeros(0 if stage == 3 else shape).half() for name, shape in names.items()}
    state = {
        "module": OrderedDict(weights, count=torch.tensor(2)),
        "buffer_names": ["count"],
        "param_shapes": shapes,
        "shared_params": {"t": "a"},
        "global_steps": 5,
    }
    if stage == 3:
        state["frozen_param_shapes"] = OrderedDict(f=torch.Size([4]))
        state["frozen_param_fragments"] = OrderedDict(f=torch.arange(4).half())
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = [torch.arange(9.0), torch.ones(1)]
    optimizer = {"zero_stage": stage, "partition_count": 1 if stage == 3 else [1, 1], key: groups}
    return two_files(int(stage == 3), saved(state), b"" if stage == 0 else saved({"optimizer_state_dict": optimizer}))


def distributed(state: dict[str, Any]) -> bytes:
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder:
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        return two_files(0, Path(folder, ".metadata").read_bytes(), Path(folder, "__0_0.distcp").read_bytes())


def write_seeds(corpus: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    few = {"a": torch.ones(2, 2), "n": torch.tensor(1)}
    seeds = {
        "model_file": {
            "zip": saved(model()),
            "legacy": saved(model(), _use_new_zipfile_serialization=False),
            "nested": saved({"state_dict": few, "optimizer": {"lr": 0.1}, "step": 7, "tuple": (1, None, True)}),
            "module": saved(module),
            "legacy_module": saved(module, _use_new_zipfile_serialization=False),
            "objects": saved({"model": few, "args": argparse.Namespace(lr=0.1), "big": 2**70, "bytes": b"12"}),
            "negative": saved({"x": torch.complex(torch.ones(2), torch.ones(2)).conj().imag}),
            "protocol_5": saved(few, pickle_protocol=5),
        },
        "distributed": {
            "flat": distributed(few),
            "model": distributed({"model": few, "optim": {"lr": 0.1}}),
            "halves": distributed({"a": torch.ones(3).half(), "b": torch.ones(2, 2).bfloat16()}),
            "names": distributed({"module.x.y": torch.ones(1), "z": [torch.ones(1), "text"]}),
            "scalar": distributed({"s": torch.tensor(1.0)}),
            "empty": distributed({"s": torch.ones(2), "e": torch.zeros(0, 3)}),
        },
        "deepspeed": {f"stage{stage}": deepspeed(stage) for stage in range(4)},
    }
    seeds["deepspeed"]["alone"] = two_files(0, saved({"module": model(), "global_steps": 1}), b"")
    seeds["deepspeed"]["legacy"] = two_files(0, saved({"module": few}, _use_new_zipfile_serialization=False), b"")
    for target, inputs in seeds.items():
        (corpus / target).mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            (corpus / target / name).write_bytes(content)


def write_checkpoint(target: str, content: bytes, path: Path) -> None:
    if target == "model_file":
        path.write_bytes(content)
        return
    path.mkdir()
    length = int.from_bytes(content[1:5], "little")
    first, second = content[5 : 5 + length], content[5 + length :]
    names = (".metadata", "__0_0.distcp") if target == "distributed" else (MODULE[content[0] & 1], OPTIMIZER)
    (path / names[0]).write_bytes(first)
    if second:
        (path / names[1]).write_bytes(second)


def values(node: Any) -> list[torch.Tensor]:
    """Returns all tensors of a value, those of modules and their entries too."""
    if isinstance(node, torch.Tensor):
        return [node]
    if isinstance(node, torch.nn.Module):
        return values(node.state_dict())
    if isinstance(node, dict):
        return [tensor for value in node.values() for tensor in values(value)]
    return [tensor for value in node for tensor in values(value)] if isinstance(node, (list, tuple)) else []


def read_by_torch(target: str, path: Path) -> list[torch.Tensor]:
    """Returns all tensors that PyTorch finds in the files, lists of several parameters also cut."""
    if target == "distributed":
        import torch.distributed.checkpoint as dcp

        metadata = dcp.FileSystemReader(path).read_metadata()
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            if hasattr(entry, "chunks"):
                tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
        return list(tensors.values())
    files = [path] if path.is_file() else sorted(path.iterdir())
    found = [tensor for file in files for tensor in values(torch.load(file, weights_only=False))]
    return found


def holds(found: list[torch.Tensor], tensor: torch.Tensor) -> bool:
    """Returns true if a tensor is one that was found, or a stretch of one."""
    same = [other for other in found if other.dtype == tensor.dtype]
    if any(other.shape == tensor.shape and torch.equal(other.nan_to_num(), tensor.nan_to_num()) for other in same):
        return True
    flat = tensor.flatten()
    lists = [other.flatten().unfold(0, len(flat), 1) for other in same if 0 < len(flat) <= other.numel()]
    return len(flat) == 0 or any(bool((windows == flat).all(dim=1).any()) for windows in lists)


def compare(target: str, content: bytes) -> str:
    from posthoc_ema import Profile, average

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = [Path(folder, f"step-{step}{'.pt' if target == 'model_file' else ''}") for step in (1, 2)]
        for path in paths:
            write_checkpoint(target, content, path)
        try:
            (mean,) = average(paths, Profile.gamma(0), steps=[1, 2])
        except (ValueError, OSError):
            return "refused"
        try:
            found = read_by_torch(target, paths[0])
        except BaseException as error:  # An error of a distributed checkpoint is not an Exception.
            if isinstance(error, KeyboardInterrupt):
                raise
            return "refused by PyTorch alone"
        odd = [name for name, tensor in (mean.state_dict or {}).items() if not holds(found, tensor)]
        return f"DIFFERENT: {odd}" if odd else "same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--seeds", action="store_true", help="write seeds instead")
    arguments = parser.parse_args()
    if arguments.seeds:
        write_seeds(arguments.corpus)
        return
    different = False
    for target in TARGETS:
        counts: dict[str, int] = {}
        for path in sorted((arguments.corpus / target).iterdir()):
            outcome = compare(target, path.read_bytes())
            if outcome.startswith("DIFFERENT"):
                different = True
                print(path, outcome)
            counts[outcome.split(":")[0]] = counts.get(outcome.split(":")[0], 0) + 1
        print(target, counts)
    raise SystemExit(different)


if __name__ == "__main__":
    main()
