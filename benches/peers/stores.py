"""Worker of `writing`: stores a snapshot of 200 MB.

    python stores.py KIND MODEL SIZE FOLDER

posthoc-ema   one profile, from the call that stores a snapshot until everything is on the disk
torch.save    the same average as a file of PyTorch, and fsync
copy          a copy of the parameters in memory that is allocated already
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

import models
import serve
import trackers


class Ours:
    def __init__(self, model: torch.nn.Module, folder: Path):
        import posthoc_ema

        self.of = posthoc_ema.PostHocEMA
        self.model = model
        self.folder = folder

    def once(self) -> dict[str, Any]:
        """Returns the seconds of all, the seconds that the caller waits in `update_`, and the bytes of all files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        every = {"update_every": 1, "checkpoint_every": 2, "update_after_step": 0}
        ema = self.of.from_model(self.model, self.folder, sigma_rels=(0.05,), compensated=False, **every)
        # The first update stores nothing.
        ema.update_(self.model)
        start = time.perf_counter()
        ema.update_(self.model)
        held = time.perf_counter() - start
        ema.close()
        seconds = time.perf_counter() - start
        files = list(self.folder.glob("*.safetensors"))
        if not any(path.name.startswith("0.2.") for path in files):
            raise ValueError(f"no snapshot of step 2 among {sorted(path.name for path in files)}")
        return {"seconds": seconds, "held": held, "bytes": sum(path.stat().st_size for path in files)}


class TorchSave:
    def __init__(self, model: torch.nn.Module, folder: Path):
        self.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.path = folder / "average.pt"
        folder.mkdir(parents=True)

    def once(self) -> dict[str, Any]:
        self.path.unlink(missing_ok=True)
        start = time.perf_counter()
        with self.path.open("wb") as file:
            torch.save(self.tensors, file)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "held": seconds, "bytes": self.path.stat().st_size}


class Copy:
    def __init__(self, model: torch.nn.Module, folder: Path):
        self.tensors = [parameter.detach() for parameter in model.parameters()]
        self.copies = [tensor.clone() for tensor in self.tensors]

    def once(self) -> dict[str, Any]:
        start = time.perf_counter()
        torch._foreach_copy_(self.copies, self.tensors)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "held": seconds, "bytes": sum(tensor.nbytes for tensor in self.tensors)}


KINDS = {"posthoc-ema": Ours, "torch.save": TorchSave, "copy": Copy}


def main() -> None:
    kind, model, size, folder = sys.argv[1:]
    module = trackers.model_of(models.MODELS[model][size], torch.float32, "cpu")
    store = KINDS[kind](module, Path(folder))
    serve.serve({"go": store.once})


if __name__ == "__main__":
    main()
