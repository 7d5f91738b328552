"""Worker of `folders`: makes folders as `save_pretrained` writes them, and averages them by PyTorch.

make FOLDER MODEL SIZE STEP...    folders FOLDER/checkpoint-STEP, each with two shards, their index and a configuration
average OUT FOLDER...             the mean by hand: loads each shard of all folders, adds in f32, saves it
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import models

INDEX = "model.safetensors.index.json"


def make(folder: Path, model: str, size: str, steps: list[int]) -> None:
    shapes = models.MODELS[model][size]
    names = list(shapes)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        out = folder / f"checkpoint-{step}"
        out.mkdir(parents=True)
        total = 0
        for file, part in halves.items():
            tensors = {name: torch.randn(shapes[name], generator=generator) for name in part}
            total += sum(tensor.nbytes for tensor in tensors.values())
            save_file(tensors, out / file, {"format": "pt"})
        weight_map = {name: file for file, part in halves.items() for name in part}
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
        (out / "config.json").write_text(json.dumps(configuration(shapes)))


def configuration(shapes: models.Shapes) -> dict[str, Any]:
    """Returns the configuration of a Llama with these shapes."""
    vocabulary, width = shapes["model.embed_tokens.weight"]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("up_proj.weight") for name in shapes),
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }


def average(out: Path, folders: list[Path]) -> None:
    out.mkdir(parents=True)
    shards = sorted(set(json.loads((folders[0] / INDEX).read_text())["weight_map"].values()))
    for shard in shards:
        total: dict[str, Any] = {}
        for folder in folders:
            for name, tensor in load_file(folder / shard).items():
                total[name] = total[name].add_(tensor) if name in total else tensor.clone()
        save_file({name: tensor.div_(len(folders)) for name, tensor in total.items()}, out / shard, {"format": "pt"})
    for name in (INDEX, "config.json"):
        shutil.copy(folders[0] / name, out / name)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), sys.argv[3], sys.argv[4], [int(step) for step in sys.argv[5:]])
    else:
        average(Path(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]])
