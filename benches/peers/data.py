"""Makes the snapshots for synthesis: a run of ours, and the same values in the files of other packages.

    python data.py run FOLDER MODEL SIZE DTYPE STEPS         two profiles at STEPS steps, as a training leaves them
    python data.py FORMAT RUN FOLDER MODEL SIZE [PACKAGES]   the same snapshots, written by FORMAT's own functions

The weights move along a line during training, so the average of every length is known in closed form.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
import runs
import serve


def base_and_drift(shapes: models.Shapes) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights at the start of training, and their movement during it."""
    generator = torch.Generator().manual_seed(0)
    n = models.parameters(shapes)
    return 0.02 * torch.randn(n, generator=generator), 0.01 * torch.randn(n, generator=generator)


def write_run(folder: Path, shapes: models.Shapes, dtype: torch.dtype, steps: int) -> None:
    """Writes `INDEX.STEP.safetensors` files: the average of profile INDEX at STEP."""
    folder.mkdir(parents=True)
    base, drift = base_and_drift(shapes)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    stored_in_less = list(shapes) if dtype != torch.float32 else []
    for k in range(1, steps + 1):
        for index, sigma_rel in enumerate(runs.SIGMA_RELS):
            weight = k / steps * runs.mean_time(sigma_rel)
            values = torch.add(base, drift, alpha=weight).to(dtype)
            tensors = {name: v.reshape(shapes[name]) for name, v in zip(shapes, values.split(sizes))}
            step = k * runs.SPACING
            metadata = runs.metadata(sigma_rel, step, stored_in_less)
            save_file(tensors, folder / f"{index}.{step}.safetensors", metadata=metadata)


def snapshots(run: Path) -> list[tuple[int, int, Path]]:
    """Lists the snapshots as (step, profile, file), the oldest first."""
    stems = [(path.name.split("."), path) for path in run.glob("*.*.safetensors")]
    return sorted((int(parts[1]), int(parts[0]), path) for parts, path in stems)


def module_of(shapes: models.Shapes) -> nn.Module:
    return nn.ParameterDict({name: torch.zeros(shape) for name, shape in shapes.items()})


def write_pytorch_posthoc_ema(run: Path, folder: Path, shapes: models.Shapes) -> None:
    """Writes the package's own checkpoints, with our values for its averages."""
    ema = serve.import_peer("posthoc_ema").PostHocEMA.from_model(
        module_of(shapes), folder, sigma_rels=runs.SIGMA_RELS, checkpoint_dtype=torch.float16
    )
    for step, index, path in snapshots(run):
        for name, tensor in load_file(path).items():
            ema.ema_models[index].ema_params[name].copy_(tensor)
        if index == len(runs.SIGMA_RELS) - 1:
            ema.step = step
            ema._create_checkpoint()


def write_ema_pytorch(run: Path, folder: Path, shapes: models.Shapes) -> None:
    """Writes the package's own checkpoints, with our values for its averages."""
    ema = serve.import_peer("ema_pytorch").PostHocEMA(
        module_of(shapes), sigma_rels=runs.SIGMA_RELS, checkpoint_folder=str(folder), checkpoint_dtype=torch.float16
    )
    for step, index, path in snapshots(run):
        average = ema.ema_models[index]
        average.step.fill_(step)
        average.initted.fill_(True)
        average.ema_model.load_state_dict(load_file(path))
        if index == len(runs.SIGMA_RELS) - 1:
            ema.checkpoint()


def write_edm2(run: Path, folder: Path, _: models.Shapes) -> None:
    """Writes a pickled module for each snapshot, as EDM2's training does."""
    folder.mkdir(parents=True)
    for step, index, path in snapshots(run):
        module = nn.ParameterDict(load_file(path)).requires_grad_(False)
        with (folder / f"{index}.{step}.pkl").open("wb") as file:
            pickle.dump({"ema": module}, file)


FORMATS = {"pytorch-posthoc-ema": write_pytorch_posthoc_ema, "ema-pytorch": write_ema_pytorch, "edm2": write_edm2}


def main() -> None:
    kind, *rest = sys.argv[1:]
    if kind == "run":
        folder, model, size, dtype, steps = rest
        write_run(Path(folder), models.MODELS[model][size], getattr(torch, dtype), int(steps))
    else:
        run, folder, model, size, *packages = rest
        sys.path[:0] = packages
        FORMATS[kind](Path(run), Path(folder), models.MODELS[model][size])


if __name__ == "__main__":
    main()
