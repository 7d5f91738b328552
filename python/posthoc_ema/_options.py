"""What is checked before a run is opened, and what stands in the place of updates where there are none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import _native
from ._dtypes import stored_name
from ._lend import torch_module

STATE = "state.safetensors"
"""The live state within a run."""

DEFAULTS = {"update_every": 10, "update_after_step": 100, "checkpoint_every": 1000, "max_checkpoints": 20}
"""Of a new run, as pytorch-posthoc-ema has them."""


class Counter:
    """In the place of updates on a process that is switched off: counts steps."""

    def __init__(self, steps: int = 0):
        self.steps = steps

    def __call__(self) -> bool:
        self.steps += 1
        return True


def refuse(directory: Path) -> bool:
    """In the place of updates of a run that was opened by path."""
    raise RuntimeError(
        f"{directory} was opened to synthesize from: to go on training, open it with "
        f"PostHocEMA.from_model(model, {str(directory)!r}, resume=True)"
    )


def count(name: str, value: Any) -> int | None:
    """A whole number, where one is given."""
    if value is None:
        return None
    if isinstance(value, bool) or int(value) != value or value < 0:
        raise ValueError(f"{name} = {value!r}: must be a whole number, 0 or more")
    return int(value)


def check_calculation_dtype(dtype: Any) -> None:
    """Sums are in f64; what is no floating-point dtype is a slip all the same."""
    if dtype is not None:
        stored_name(dtype)


def check_old_checkpoints(directory: Path, what: str) -> None:
    old = next(directory.glob("*.*.pt"), None) if directory.is_dir() else None
    if old is not None and old.stem.replace(".", "").isdigit():
        raise ValueError(
            f"{directory} {what} ({old.name}), which pytorch-posthoc-ema or ema-pytorch wrote: make a run of them with "
            f"`posthoc_ema.import_run` (or `posthoc-ema import`), and use another directory for new ones"
        )


def check_device(device: str) -> None:
    """Says in Python's terms why averages cannot be kept on a device."""
    if not str(device).startswith("cuda"):
        return
    if not _native.CUDA:
        raise RuntimeError(
            f"device={device!r}: this build of posthoc_ema has no CUDA kernels: install it anew where nvcc is found, with "
            f"POSTHOC_EMA_CUDA=1, or keep the averages on the host with device='cpu'"
        )
    devices, why = _native.cuda_devices()
    if devices == 0:
        raise RuntimeError(f"device={device!r}: {why}: keep the averages on the host with device='cpu'")


def rank() -> int:
    """This process's rank in ``torch.distributed``; 0 where there is none."""
    torch = torch_module()
    distributed = getattr(torch, "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", "0"))
