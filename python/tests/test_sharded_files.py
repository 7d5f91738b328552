"""Files of a sharded run, which PyTorch's own tools read as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from process_group import Group, sized_group
from safetensors.torch import load_file
from sharded_models import LAYOUTS
from test_sharded import _track, twin_of
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

SIZE = 3
NAMES = ("fsdp2", "fsdp2_columns", "fsdp2_mixed", "tensor_parallel")


def _linked(run: Path, snapshot: str, folder: Path) -> Path:
    """Links the files of one snapshot into a folder of their own."""
    folder.mkdir()
    files = sorted(run.glob(f"{snapshot}-part-*.safetensors"))
    assert len(files) > 1
    for file in files:
        (folder / file.name).symlink_to(file)
    return folder


def _check_loaded(files: Path, stored: dict[str, torch.Tensor]) -> None:
    """Compares what `dcp.load` reads with the tensors of an unsharded snapshot."""
    loaded = {name: torch.full_like(tensor, 7) for name, tensor in stored.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(files)), no_dist=True)
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor), name


def _check_consolidated(files: Path, folder: Path, stored: dict[str, torch.Tensor]) -> None:
    """Compares what `consolidate_safetensors_files` writes. It writes zeros for scalars, and refuses integers."""
    wanted = [name for name, tensor in stored.items() if tensor.is_floating_point() and tensor.ndim > 0]
    folder.mkdir()
    consolidate_safetensors_files(str(files), str(folder), dict.fromkeys(wanted, 1))
    written = load_file(folder / "model-00001-of-00001.safetensors")
    for name in wanted:
        assert torch.equal(written[name], stored[name]), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_files_of_a_snapshot(groups: list[Group], tmp_path: Path) -> None:
    results: Any = sized_group(groups, SIZE)(_track, str(tmp_path), list(NAMES), SIZE)
    for name in NAMES:
        assert SIZE in LAYOUTS[name][1]
        _, seen, _ = results[0][name]
        twin_of(name, seen, tmp_path / f"twin-{name}")
        for whole in sorted((tmp_path / f"twin-{name}").glob("[01].*.safetensors")):
            stored = load_file(whole)
            files = _linked(tmp_path / name, whole.stem, tmp_path / f"{name}-{whole.stem}")
            _check_loaded(files, stored)
            _check_consolidated(files, tmp_path / f"{name}-{whole.stem}-whole", stored)
