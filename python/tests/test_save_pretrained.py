"""`save_pretrained` of an average within a block of `model`, with the libraries that have this method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bits, code_of, run_code, shake
from diffusers import UNet2DModel
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from posthoc_ema import PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 10}


def gpt() -> Any:
    # The output layer shares the weights of the embedding.
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def adapted(folder: Path) -> Any:
    gpt().save_pretrained(folder)
    base = GPT2LMHeadModel.from_pretrained(folder)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"))


def unet() -> Any:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
    )


CASES: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], bool]] = {
    "transformers": (lambda _: gpt(), GPT2LMHeadModel.from_pretrained, False),
    "peft": (adapted, AutoPeftModelForCausalLM.from_pretrained, True),
    "diffusers": (lambda _: unet(), UNet2DModel.from_pretrained, False),
}


# PEFT's own call.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("library", CASES)
def test_saved_folder_holds_the_average(
    library: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, in_block, from_file = code_of("read-elsewhere.md", "Convert")
    make, load, only_trained = CASES[library]
    model = make(tmp_path / "base")
    ema = PostHocEMA.from_model(model, run_dir, only_save_diff=only_trained, **OPTIONS)
    for _ in range(20):
        shake(model, 0.01)
        ema.update_(model)
    before = bits(model)
    for source in (ema, PostHocEMA.from_path(run_dir, model, only_save_diff=only_trained)):
        ema.finish()
        expected = source.synthesize([0.15])[0]
        run_code(in_block, {"ema": source, "model": model})
        assert bits(model) == before
        loaded = load(tmp_path / "averaged").state_dict()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and trained <= set(expected) <= set(loaded)
        for name in expected:
            assert torch.equal(loaded[name], expected[name]), name
            assert name not in trained or not torch.equal(loaded[name], model.state_dict()[name]), name
    # The same from a file, for a model that has all its tensors.
    if not only_trained:
        ema.write([0.15], tmp_path / "files")[0].rename(tmp_path / "ema.safetensors")
        run_code(from_file, {"model": model})
        assert all(torch.equal(load(tmp_path / "averaged").state_dict()[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("library", CASES)
def test_save_pretrained_writes_the_average(
    library: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, load, only_trained = CASES[library]
    model = make(tmp_path / "base")
    ema = PostHocEMA.from_model(model, run_dir, only_save_diff=only_trained, **OPTIONS)
    for _ in range(20):
        shake(model, 0.01)
        ema.update_(model)
    before = bits(model)
    expected = ema.synthesize([0.15])[0]
    run_code(code_of("read-elsewhere.md", "Convert")[0], {"ema": ema, "model": torch.compile(model)})
    assert bits(model) == before
    loaded = load(tmp_path / "averaged").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_save_pretrained_of_timm_and_of_no_library(run_dir: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3)
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    for _ in range(12):
        shake(model, 0.01)
        ema.update_(model)
    expected = ema.synthesize([0.15])[0]
    ema.save_pretrained(model, tmp_path / "averaged", 0.15)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'averaged'}", pretrained=True).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    with pytest.raises(TypeError, match="Linear has no method `save_pretrained`, and is not a model of timm"):
        ema.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "other", 0.15)


def test_file_of_tied_weights_has_the_name_that_libraries_keep(run_dir: Path, tmp_path: Path) -> None:
    """The file in the place of `model.safetensors` loads into classes with and without the output layer."""
    model = gpt()
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    for _ in range(12):
        shake(model, 0.01)
        ema.update_(model)
    model.save_pretrained(tmp_path / "folder")
    stored = load_file(tmp_path / "folder" / "model.safetensors")
    (path,) = ema.write([0.15], tmp_path / "files")
    assert load_file(path).keys() == stored.keys()
    path.replace(tmp_path / "folder" / "model.safetensors")
    expected = ema.synthesize([0.15])[0]
    for kind, prefix in [(AutoModel, "transformer."), (AutoModelForCausalLM, "")]:
        loaded, info = kind.from_pretrained(tmp_path / "folder", output_loading_info=True)
        assert not info["missing_keys"]
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, expected[prefix + name]), name
