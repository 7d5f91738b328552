"""Worker of `synthesis`: averages from 40 snapshots, by posthoc-ema, other packages and hand-written scripts.

    python blends.py KIND TASK [FOLDER]       one of KINDS; a JSON file; the folder of KIND's package

Keys of the task:

    run       folder of our snapshots
    folder    the same snapshots in KIND's own files
    model     name of the model in models.MODELS
    size      full or quick
    targets   relative standard deviations
    weights   for each target, our plan's `[index, step, weight]`, for kinds that solve for no weights
    output    folder for files
    dtype     dtype of the results
"""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import answers
import data
import models
import runs
import serve

Task = dict[str, Any]
Tensors = dict[str, torch.Tensor]
# Returns the tensors of each target, or nothing if it writes files.
Work = Callable[[], list[Tensors]]
# Averages of different lengths that EDM2 makes in one pass.
EDM2_TARGETS = 8


def posthoc_ema(task: Task) -> Work:
    """posthoc-ema in Python, into memory."""
    ema = importlib.import_module("posthoc_ema").PostHocEMA.from_path(task["run"])
    if len(task["targets"]) > 1:
        return lambda: ema.synthesize(task["targets"], dtype=dtype_of(task))

    def once() -> list[Tensors]:
        if task["dtype"] != "float32":
            return ema.synthesize(task["targets"], dtype=dtype_of(task))
        with ema.state_dict(task["targets"][0]) as state_dict:
            return [state_dict]

    return once


def pytorch_posthoc_ema(task: Task) -> Work:
    """pytorch-posthoc-ema's `state_dict`. It solves for its own weights; the result has the snapshots' dtype."""
    model = data.module_of(models.MODELS[task["model"]][task["size"]])
    of = serve.import_peer("posthoc_ema").PostHocEMA
    ema = of.from_path(task["folder"], model, sigma_rels=runs.SIGMA_RELS)

    def once() -> list[Tensors]:
        with ema.state_dict(task["targets"][0]) as state_dict:
            return [dict(state_dict)]

    return once


def ema_pytorch(task: Task) -> Work:
    """ema-pytorch's `synthesize_ema_model`. It solves for its own weights."""
    model = data.module_of(models.MODELS[task["model"]][task["size"]])
    of = serve.import_peer("ema_pytorch").PostHocEMA
    ema = of(model, sigma_rels=runs.SIGMA_RELS, checkpoint_folder=task["folder"])

    def once() -> list[Tensors]:
        made = ema.synthesize_ema_model(sigma_rel=task["targets"][0])
        return [dict(made.ema_model.named_parameters())]

    return once


def edm2(task: Task) -> Work:
    """EDM2's method (Karras et al. 2023): pickles one by one, f32 sums of up to 8 targets in a pass, saved to files."""
    output = Path(task["output"])

    def once() -> list[Tensors]:
        for begin in range(0, len(task["weights"]), EDM2_TARGETS):
            weights = task["weights"][begin : begin + EDM2_TARGETS]
            sums: list[Tensors] = [{} for _ in weights]
            for each in zip(*weights):
                index, step, _ = each[0]
                with (Path(task["folder"]) / f"{index}.{step}.pkl").open("rb") as file:
                    module = pickle.load(file)["ema"]
                for name, parameter in module.named_parameters():
                    value = parameter.to(torch.float32)
                    for summed, (_, _, weight) in zip(sums, each):
                        if name in summed:
                            summed[name].add_(value, alpha=weight)
                        else:
                            summed[name] = value * weight
            for i, summed in enumerate(sums, begin):
                module = nn.ParameterDict({name: tensor.to(dtype_of(task)) for name, tensor in summed.items()})
                with (output / f"edm2.{i}.pkl").open("wb") as file:
                    pickle.dump({"ema": module.requires_grad_(False)}, file)
        return []

    return once


def edm2_results(task: Task) -> list[Tensors]:
    found = []
    for i in range(len(task["targets"])):
        with (Path(task["output"]) / f"edm2.{i}.pkl").open("rb") as file:
            found.append(dict(pickle.load(file)["ema"].named_parameters()))
    return found


def files(task: Task) -> list[tuple[Path, float]]:
    """Returns our snapshots with their weights for the first target."""
    run = Path(task["run"])
    return [(run / f"{index}.{step}.safetensors", weight) for index, step, weight in task["weights"][0]]


def lora_merge(task: Task) -> Work:
    """Hand-written merge of LoRA files: loads each file whole, adds it to a dictionary in f32, saves that."""

    def once() -> list[Tensors]:
        merged: Tensors = {}
        for path, ratio in files(task):
            for key, value in load_file(path).items():
                value = value.to(torch.float32) * ratio
                merged[key] = merged[key] + value if key in merged else value
        save_file({key: value.to(dtype_of(task)) for key, value in merged.items()}, lora_output(task))
        return []

    return once


def lora_output(task: Task) -> Path:
    return Path(task["output"]) / "lora-merge.safetensors"


def torch_loop(task: Task) -> Work:
    """Hand-written loop over mapped files, into memory: adds up in f32, tensor by tensor."""

    def once() -> list[Tensors]:
        opened = [(safe_open(path, "pt"), weight) for path, weight in files(task)]
        result: Tensors = {}
        for name in opened[0][0].keys():
            first, weight = opened[0]
            total = first.get_tensor(name).to(torch.float32).mul_(weight)
            for file, weight in opened[1:]:
                total.add_(file.get_tensor(name), alpha=weight)
            result[name] = total.to(dtype_of(task))
        return [result]

    return once


def dtype_of(task: Task) -> torch.dtype:
    return getattr(torch, task["dtype"])


KINDS: dict[str, Callable[[Task], Work]] = {
    "posthoc-ema": posthoc_ema,
    "pytorch-posthoc-ema": pytorch_posthoc_ema,
    "ema-pytorch": ema_pytorch,
    "edm2": edm2,
    "lora-merge": lora_merge,
    "torch-loop": torch_loop,
}
WRITTEN: dict[str, Callable[[Task], list[Tensors]]] = {
    "edm2": edm2_results,
    "lora-merge": lambda task: [load_file(lora_output(task))],
}


class Session:
    """One kind's work on one task, done at every "go"."""

    def __init__(self, kind: str, task: Task):
        self.kind = kind
        self.task = task

    def prepare(self) -> None:
        self.work = KINDS[self.kind](self.task)

    def go(self) -> dict[str, float]:
        # Frees the last results before the next are made.
        self.results: list[Tensors] = []
        with torch.no_grad():
            seconds, self.results = serve.seconds_of(self.work)
        return {"seconds": seconds}

    def sample(self, path: str) -> None:
        """Writes a sample of the last results to a file."""
        results = WRITTEN.get(self.kind, lambda _: self.results)(self.task)
        answers.save(path, answers.sample(results[answers.compared_index(results)]))
        self.results = []


def main() -> None:
    kind, task, *packages = sys.argv[1:]
    sys.path[:0] = packages
    session = Session(kind, json.loads(Path(task).read_text()))
    serve.serve({"prepare": session.prepare, "go": session.go, "sample": session.sample})


if __name__ == "__main__":
    main()
