"""Folders of checkpoints as trainers write them: no weights in them are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posthoc_ema import Profile, average

EVEN = Profile.uniform(fraction=1.0)


def assert_is_mean(path: Path, states: list[dict[str, torch.Tensor]]) -> None:
    found = load_file(path)
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        exact = sum(state[name].double() for state in states) / len(states)
        assert isinstance(exact, torch.Tensor)
        assert torch.equal(tensor, exact.to(tensor.dtype)), name


def test_every_model_of_accelerate_is_averaged(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(5)
    generator, critic = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD([*generator.parameters(), *critic.parameters()], 0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    generator, critic, optimizer = accelerator.prepare(generator, critic, optimizer)
    states: list[list[dict[str, torch.Tensor]]] = [[], []]
    folders = [tmp_path / "run" / f"step_{step}" for step in (1, 2)]
    for folder in folders:
        for model, kept in zip((generator, critic), states):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        accelerator.save_state(folder)
    out = tmp_path / "mean"
    average(folders, EVEN, out)
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "model_1.safetensors"]
    assert_is_mean(out / "model.safetensors", states[0])
    assert_is_mean(out / "model_1.safetensors", states[1])
    with pytest.raises(ValueError, match=r"`model_1\.safetensors` holds other weights .* --leave-out 'model_1\.safe"):
        average(folders, EVEN, tmp_path / "mean.safetensors")
    with pytest.warns(UserWarning, match=r"left out: `model_1\.safetensors/bias`"):
        average(folders, EVEN, tmp_path / "mean.safetensors", leave_out=["model_1.safetensors/*"])
    assert_is_mean(tmp_path / "mean.safetensors", states[0])


def test_weights_beside_an_adapter_are_averaged(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    torch.manual_seed(6)
    states: dict[str, list[dict[str, torch.Tensor]]] = {"adapter_model": [], "non_lora_trainables": []}
    for folder in folders:
        folder.mkdir()
        for kept in states.values():
            kept.append({"w": torch.randn(3)})
        save_file(states["adapter_model"][-1], folder / "adapter_model.safetensors")
        torch.save(states["non_lora_trainables"][-1], folder / "non_lora_trainables.bin")
        torch.save({"lr": 0.1}, folder / "optimizer.pt")
    average(folders, EVEN, tmp_path / "mean")
    for name, kept in states.items():
        assert_is_mean(tmp_path / "mean" / f"{name}.safetensors", kept)
    assert len(list((tmp_path / "mean").iterdir())) == 2


def test_one_model_in_two_formats_is_averaged_once(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    states: list[dict[str, torch.Tensor]] = []
    for folder in folders:
        folder.mkdir()
        states.append({"w": torch.randn(3)})
        save_file(states[-1], folder / "model.safetensors")
        torch.save(states[-1], folder / "pytorch_model.bin")
    average(folders, EVEN, tmp_path / "mean")
    assert [path.name for path in (tmp_path / "mean").iterdir()] == ["model.safetensors"]
    assert_is_mean(tmp_path / "mean" / "model.safetensors", states)


QUANTIZED: dict[str, Any] = {
    "layer.weight.SCB": torch.ones(2),
    "layer.weight.absmax": torch.ones(2),
    "layer.qweight": torch.ones(2, dtype=torch.int32),
    "layer.weight_scale_inv": torch.ones(2),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_refused(tmp_path: Path, name: str) -> None:
    paths = [tmp_path / f"step_{step}.safetensors" for step in (1, 2)]
    for path in paths:
        save_file({"layer.weight": torch.ones(2, 2), name: QUANTIZED[name]}, path)
    with pytest.raises(ValueError, match="belongs to quantized weights"):
        average(paths, EVEN, tmp_path / "mean.safetensors")


def test_scales_of_adapters_in_metadata_must_agree(tmp_path: Path) -> None:
    """Files of diffusers hold the scale in their metadata only."""
    loaders = pytest.importorskip("diffusers.loaders")
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = torch.nn.Linear(4, 4)

    folders = [tmp_path / f"step_{step}" for step in (1, 2, 3)]
    for folder, alpha in zip(folders, (4, 4, 32)):
        config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q"])
        adapted = peft.get_peft_model(Net(), config)
        loaders.StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder,
            unet_lora_layers=peft.get_peft_model_state_dict(adapted),
            unet_lora_adapter_metadata=config.to_dict(),
        )
    average(folders[:2], EVEN, tmp_path / "mean")
    assert (tmp_path / "mean" / "pytorch_lora_weights.safetensors").is_file()
    with pytest.raises(ValueError, match="`lora_adapter_metadata` of its metadata differs"):
        average(folders, EVEN, tmp_path / "other")


def test_models_of_different_configuration_are_refused(tmp_path: Path) -> None:
    """Their tensors have the same names and shapes."""
    transformers = pytest.importorskip("transformers")
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    for folder, activation, dropout in zip(folders, ("silu", "silu", "relu"), (0.0, 0.1, 0.1)):
        config = transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_act=activation,
            attention_dropout=dropout,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    average(folders[:2], EVEN, tmp_path / "mean")
    message = (
        r'checkpoint-3/config.json: `hidden_act` is "relu", but "silu" in .*checkpoint-1.*--ignore-config hidden_act'
    )
    with pytest.raises(ValueError, match=message):
        average(folders, EVEN, tmp_path / "other")
    average(folders, EVEN, tmp_path / "other", ignore_config=["hidden_act"])


def test_folders_keep_all_but_the_state_of_the_training(tmp_path: Path) -> None:
    kept = ["config.json", "layers.py", "lit.yaml", "merges.txt", "net.py", "README.md", "tokenizer.model"]
    dropped = ["optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "latest", "x.log"]
    for step in (10, 20):
        folder = tmp_path / f"step-{step}"
        folder.mkdir()
        torch.save({"w": torch.full((3,), float(step))}, folder / "lit_model.pth")
        for name in (*kept, *dropped):
            (folder / name).write_text("{}" if name.endswith("json") else name)
    average([tmp_path / "step-10", tmp_path / "step-20"], EVEN, tmp_path / "mean")
    assert sorted(path.name for path in (tmp_path / "mean").iterdir()) == sorted([*kept, "lit_model.safetensors"])
    assert (tmp_path / "mean" / "net.py").read_text() == "net.py"
    # The files alone have one name, so that their folders give the steps.
    files = [tmp_path / f"step-{step}" / "lit_model.pth" for step in (10, 20)]
    (found,) = average(files, EVEN)
    assert [weight.step for weight in found.weights] == [10, 20]


def test_models_with_code_of_their_own_load_again(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class NetConfig(PretrainedConfig):
    model_type = "own-net"

class Net(PreTrainedModel):
    config_class = NetConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(3, 2)
        self.post_init()
    def forward(self, x):
        return self.layer(x)
"""
    import importlib.util
    import sys

    module_path = tmp_path / "own_net.py"
    module_path.write_text(source)
    spec = importlib.util.spec_from_file_location("own_net", module_path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_net"] = module
    spec.loader.exec_module(module)
    module.NetConfig.register_for_auto_class()
    module.Net.register_for_auto_class("AutoModel")
    states = []
    for step in (1, 2):
        torch.manual_seed(step)
        net = module.Net(module.NetConfig())
        net.save_pretrained(tmp_path / f"checkpoint-{step}")
        states.append(net.state_dict())
    average([tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"], EVEN, tmp_path / "mean")
    loaded, info = transformers.AutoModel.from_pretrained(
        tmp_path / "mean", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        exact = sum(state[name].double() for state in states) / 2
        assert isinstance(exact, torch.Tensor) and torch.equal(tensor, exact.float()), name


def test_sharded_variants_of_diffusers_load_again(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    states = []
    for step in (1, 2):
        torch.manual_seed(step)
        net = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=2,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        ).half()
        net.save_pretrained(tmp_path / "run" / f"checkpoint-{step}" / "unet", variant="fp16", max_shard_size="10KB")
        states.append(net.state_dict())
    with pytest.raises(ValueError, match=r"in folders called `unet` within these: name them, as in .*run/\*/unet"):
        average(tmp_path / "run", EVEN)
    average(sorted((tmp_path / "run").glob("*/unet")), EVEN, tmp_path / "mean")
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "mean", variant="fp16", torch_dtype=torch.float16)
    assert len(loaded.state_dict()) == len(states[0])
    for name, tensor in loaded.state_dict().items():
        exact = sum(state[name].double() for state in states) / 2
        assert isinstance(exact, torch.Tensor) and torch.equal(tensor, exact.half()), name


def test_modules_with_weights_of_their_own_are_averaged(tmp_path: Path) -> None:
    """As sentence-transformers stores a transformer with a dense layer after it."""
    modules = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "2_Dense"}]
    states = []
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "2_Dense").mkdir(parents=True)
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "2_Dense" / "config.json").write_text("{}")
        states.append({"linear.weight": torch.randn(3)})
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        save_file(states[-1], folder / "2_Dense" / "model.safetensors")
    average([tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"], EVEN, tmp_path / "mean")
    assert_is_mean(tmp_path / "mean" / "2_Dense" / "model.safetensors", states)
    assert (tmp_path / "mean" / "2_Dense" / "config.json").read_text() == "{}"
