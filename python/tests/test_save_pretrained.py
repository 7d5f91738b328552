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
from transformers import GPT2Config, GPT2LMHeadModel

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
    in_block, from_file = code_of("read-elsewhere.md", "Convert")
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
