"""Averages of the products of low-rank adapters, made and loaded by the libraries that train them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posthoc_ema import Profile, average

EVEN = Profile.uniform(fraction=1.0)
RANK = 2


def nearest(deltas: list[torch.Tensor]) -> tuple[torch.Tensor, float, float]:
    """Returns the nearest matrix of the rank to the mean of some, in float64, its distance and the mean's norm."""
    mean = sum(delta.double().flatten(1) for delta in deltas) / len(deltas)
    assert isinstance(mean, torch.Tensor)
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    cut = u[:, :RANK] * s[:RANK] @ v[:RANK]
    return cut, float(s[RANK:].square().sum()), float(mean.square().sum())


def assert_nearest(found: dict[str, torch.Tensor], steps: list[dict[str, torch.Tensor]]) -> float:
    """Compares products with the oracle. Returns the relative error of cutting them back to the rank."""
    assert found.keys() == steps[0].keys()
    error = norm = 0.0
    for name, delta in found.items():
        cut, distance, square = nearest([step[name] for step in steps])
        assert bool(((delta.double().flatten(1) - cut).abs() <= 1e-5 * square**0.5).all()), name
        error, norm = error + distance, norm + square
    return (error / norm) ** 0.5


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 5)
        self.conv = torch.nn.Conv2d(4, 6, 3)
        self.embedding = torch.nn.Embedding(9, 6)


def deltas(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns what each adapter of PEFT adds to its weight."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            (adapter,) = layer.scaling
            found[name] = layer.get_delta_weight(adapter).detach().clone()
    return found


def randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_products_of_peft_load_into_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config: dict[str, Any] = {"r": RANK, "target_modules": ["linear", "conv", "embedding"]}
    steps = []
    for step, alpha in enumerate((8, 2, 4)):
        model = peft.get_peft_model(Net(), peft.LoraConfig(lora_alpha=alpha, **config))
        randomize(model, step)
        model.save_pretrained(tmp_path / f"run/checkpoint-{step + 1}")
        steps.append(deltas(model))
    with pytest.raises(ValueError, match="`lora_alpha` is 2, but 8 in .* --product svd"):
        average(tmp_path / "run", EVEN, tmp_path / "mean")
    (found,) = average(tmp_path / "run", EVEN, tmp_path / "mean", product="svd")
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "mean")
    error = assert_nearest(deltas(loaded), steps)
    assert found.product is not None and found.product.pairs == 3
    assert found.product.truncation_error == pytest.approx(error, rel=1e-5)
    assert error < found.product.factors_error
    (in_memory,) = average(tmp_path / "run", EVEN, product="svd")
    assert in_memory.product == found.product and in_memory.state_dict is not None
    written = load_file(tmp_path / "mean/adapter_model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in in_memory.state_dict.items())
    with pytest.raises(ValueError, match='"factors" and "svd"'):
        average(tmp_path / "run", EVEN, product="qr")  # type: ignore[arg-type]


def test_dora_of_peft_is_refused_with_the_reason(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for step in (1, 2):
        config = peft.LoraConfig(r=RANK, target_modules=["linear"], use_dora=True)
        peft.get_peft_model(Net(), config).save_pretrained(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="`base_model.model.linear.lora_magnitude_vector` is of DoRA"):
        average(tmp_path, EVEN, tmp_path / "mean", product="svd")


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_other_adapters_of_peft_are_averaged_with_equal_scales_only(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    for step, alpha in enumerate((4, 4, 32)):
        config = getattr(peft, f"{kind}Config")(r=RANK, alpha=alpha, target_modules=["linear"])
        peft.get_peft_model(Net(), config).save_pretrained(tmp_path / f"run/checkpoint-{step + 1}")
    run = [tmp_path / f"run/checkpoint-{step}" for step in (1, 2, 3)]
    average(run[:2], EVEN, tmp_path / "mean")
    peft.PeftModel.from_pretrained(Net(), tmp_path / "mean")
    with pytest.raises(ValueError, match="`alpha` is 32, but 4 in"):
        average(run, EVEN, tmp_path / "other")
    with pytest.raises(ValueError, match=f"is of {kind}"):
        average(run[:2], EVEN, tmp_path / "other", product="svd")


def unet() -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    assert isinstance(made, torch.nn.Module)
    return made


def pipeline() -> Any:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_products_of_diffusers_load_into_a_pipeline(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    loaders = pytest.importorskip("diffusers.loaders")
    steps = []
    for step, alpha in enumerate((3, 12)):
        model: Any = unet()
        config = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=["to_q", "conv1"])
        model.add_adapter(config)
        randomize(model, step)
        loaders.StableDiffusionLoraLoaderMixin.save_lora_weights(
            tmp_path / f"run/step_{step + 1}",
            unet_lora_layers=peft.get_peft_model_state_dict(model),
            unet_lora_adapter_metadata=config.to_dict(),
        )
        steps.append(deltas(model))
    average(tmp_path / "run", EVEN, tmp_path / "mean", product="svd")
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path / "mean")
    assert_nearest(deltas(pipe.unet), steps)


def kohya(step: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns a file as kohya's scripts write it: names with underscores, convolutions, and a scale for each module."""
    generator = torch.Generator().manual_seed(step)
    tensors = {}
    shapes = {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": ((RANK, 16), (16, RANK)),
        "lora_unet_down_blocks_1_resnets_0_conv1": ((RANK, 8, 3, 3), (16, RANK, 1, 1)),
        "lora_unet_down_blocks_1_attentions_0_proj_in": ((RANK, 16, 1, 1), (16, RANK, 1, 1)),
    }
    for name, (down, up) in shapes.items():
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        tensors[f"{name}.lora_down.weight"] = torch.randn(down, generator=generator).half()
        tensors[f"{name}.lora_up.weight"] = torch.randn(up, generator=generator).half()
    arguments = json.dumps({"conv_dim": str(RANK), "conv_alpha": "1"})
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(RANK), "ss_network_alpha": "1.0"}
    return tensors, metadata | {"ss_steps": str(step), "ss_network_args": arguments, "sshs_model_hash": "0"}


def test_products_of_kohya_keep_every_key_and_load_into_diffusers(tmp_path: Path) -> None:
    files = [tmp_path / f"lora-{step:06}.safetensors" for step in (1, 2, 3)]
    for step, path in enumerate(files):
        tensors, metadata = kohya(step + 1)
        save_file(tensors, path, metadata)
    out = tmp_path / "mean.safetensors"
    average(files, EVEN, out, product="svd")
    found, expected = load_file(out), [load_file(path) for path in files]
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected[0].items()
    }
    with safe_open(out, "pt") as file:
        kept = file.metadata()
    assert {name: kept[name] for name in kohya(3)[1] if name != "sshs_model_hash"} == {
        name: text for name, text in kohya(3)[1].items() if name != "sshs_model_hash"
    }
    assert "sshs_model_hash" not in kept
    for name in [name for name in found if name.endswith(".alpha")]:
        assert torch.equal(found[name], torch.tensor(1.0))
        prefix = name.removesuffix("alpha")
        products = []
        for state in [*expected, found]:
            up, down = (state[f"{prefix}lora_{which}.weight"].double().flatten(1) for which in ("up", "down"))
            products.append(up @ down)
        cut, _, square = nearest(products[:-1])
        assert bool(((products[-1] - cut).abs() <= 2e-3 * square**0.5).all()), name
    pytest.importorskip("peft")
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path, weight_name=out.name)
    assert len(deltas(pipe.unet)) == 3
