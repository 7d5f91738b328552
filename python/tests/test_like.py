"""Averages written like a model's folder, loaded strictly by the model's own library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model

from posthoc_ema import PostHocEMA, Profile, average

EVEN = Profile.uniform(fraction=1.0)

State = dict[str, torch.Tensor]


def change(model: torch.nn.Module, step: int) -> None:
    """Changes all parameters, so that each step has weights of its own."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.3).to(parameter.dtype))


def state_of(model: torch.nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def tracked(directory: Path, model: torch.nn.Module, steps: int = 4, **options: Any) -> PostHocEMA:
    """Tracks a training with a snapshot at each step, and opens it."""
    schedule: dict[str, Any] = dict(update_every=1, update_after_step=0, checkpoint_every=1)
    ema = PostHocEMA.from_model(model, directory, sigma_rels=(), betas=[0.5], **schedule, **options)
    for step in range(1, steps + 1):
        change(model, step)
        ema.update_(model)
    ema.finish()
    return PostHocEMA.from_path(directory)


def exact(ema: PostHocEMA) -> State:
    """Returns the plain mean of a training in float64, from the stored snapshots; other tensors are the newest."""
    [plan] = ema.plan([EVEN])
    averaged: State = {}
    for weight in plan.weights:
        snapshot = load_file(ema.checkpoint_dir / f"{weight.index}.{weight.step}.safetensors")
        for name, tensor in snapshot.items():
            if tensor.is_floating_point():
                averaged[name] = averaged.get(name, 0) + weight.weight * tensor.double()
            else:
                averaged[name] = tensor
    assert len(plan.weights) > 2
    return averaged


def assert_within_one_ulp(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Compares with an average in float64: one unit in the last place of the stored dtype."""
    assert found.shape == expected.shape, name
    if not found.is_floating_point():
        assert torch.equal(found, expected), name
        return
    allowed = torch.finfo(found.dtype).eps * expected.abs() + 1e-14
    assert bool(((found.double() - expected.double()).abs() <= allowed).all()), name


def assert_is_average(found: State, ema: PostHocEMA, rename: Callable[[str], str] = str) -> None:
    expected = {rename(name): tensor for name, tensor in exact(ema).items()}
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert found.keys() - tied.keys() <= expected.keys() <= found.keys()
    for name, tensor in found.items():
        assert_within_one_ulp(tensor, expected.get(name, expected.get(tied.get(name, ""))), name)


def write_like(ema: PostHocEMA, like: Path, out: Path, **options: Any) -> Path:
    [written] = ema.write([EVEN], out, like=like, **options)
    assert written.is_dir() and written.parent == out
    return written


def llama(tied: bool = True, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(tie_word_embeddings=tied, max_position_embeddings=32, **sizes, **options)
    return transformers.LlamaForCausalLM(config)


def assert_loads(loader: Any, folder: Path) -> Any:
    """Loads a folder by its library, without missing, unexpected or unequal tensors."""
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info.get(kind), (kind, info[kind])
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_load_an_average_of_a_run(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    model = llama(tied)
    like = tmp_path / "like"
    model.save_pretrained(like)
    for name in ("tokenizer.json", "chat_template.jinja", "code.py"):
        (like / name).write_text(name)
    for name in ("trainer_state.json", "optimizer.pt", "training_args.bin"):
        (like / name).write_text("state")
    ema = tracked(tmp_path / "ema", model)
    out = write_like(ema, like, tmp_path / "out")
    named = {path.name for path in out.iterdir()}
    assert named == {"model.safetensors", "config.json", "generation_config.json"} | {
        "tokenizer.json",
        "chat_template.jinja",
        "code.py",
    }
    loaded = assert_loads(AutoModelForCausalLM, out)
    assert_is_average(state_of(loaded), ema)
    base = AutoModel.from_pretrained(out)
    assert torch.equal(base.embed_tokens.weight, loaded.model.embed_tokens.weight)
    # Strict: a tied tensor may be missing in the file, but not in the model.
    load_model(llama(tied), out / "model.safetensors", strict=True)
    assert load_file(out / "model.safetensors").keys() == load_file(like / "model.safetensors").keys()


def test_files_of_a_run_with_tied_tensors_load_everywhere(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    model = llama()
    like = tmp_path / "like"
    model.save_pretrained(like)
    ema = tracked(tmp_path / "ema", model)
    [file] = ema.write([EVEN], tmp_path / "files")
    assert load_file(file).keys() == load_file(like / "model.safetensors").keys()
    fresh = llama()
    load_model(fresh, file, strict=True)
    assert_is_average(state_of(fresh), ema)
    shutil.copy(file, like / "model.safetensors")
    loaded = assert_loads(AutoModelForCausalLM, like)
    base = AutoModel.from_pretrained(like)
    assert torch.equal(base.embed_tokens.weight, loaded.lm_head.weight)
    assert torch.equal(loaded.lm_head.weight, fresh.lm_head.weight)


def test_dtypes_are_those_of_the_folder_or_as_asked(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = llama()
    like = tmp_path / "like"
    llama(dtype=torch.bfloat16).to(torch.bfloat16).save_pretrained(like)
    ema = tracked(tmp_path / "ema", model)
    out = write_like(ema, like, tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_is_average(found, ema)
    assert (out / "config.json").read_text() == (like / "config.json").read_text()
    asked = write_like(ema, like, tmp_path / "asked", dtype="float16")
    assert {tensor.dtype for tensor in load_file(asked / "model.safetensors").values()} == {torch.float16}
    assert json.loads((asked / "config.json").read_text())["dtype"] == "float16"
    assert assert_loads(AutoModelForCausalLM, asked).dtype == torch.float16


@pytest.mark.parametrize("shard_size", ["6KB", 6000])
def test_shards_are_those_of_save_pretrained(tmp_path: Path, shard_size: int | str) -> None:
    from transformers import AutoModelForCausalLM

    model = llama()
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    model.save_pretrained(whole)
    model.save_pretrained(sharded, max_shard_size="6KB")
    ema = tracked(tmp_path / "ema", model)
    for i, (like, options) in enumerate([(whole, {"shard_size": shard_size}), (sharded, {})]):
        out = write_like(ema, like, tmp_path / f"out-{i}", **options)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        theirs = json.loads((sharded / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == theirs["weight_map"].keys()
        assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
        shards = sorted(set(index["weight_map"].values()))
        assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        assert len(shards) > 2
        for shard in shards:
            tensors = load_file(out / shard)
            assert tensors.keys() == {name for name, file in index["weight_map"].items() if file == shard}
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 6000
        assert_is_average(state_of(assert_loads(AutoModelForCausalLM, out)), ema)
    joined = write_like(ema, sharded, tmp_path / "joined", shard_size="5GB")
    assert sorted(path.name for path in joined.iterdir() if path.suffix == ".safetensors") == ["model.safetensors"]
    assert not list(joined.glob("*.index.json"))
    assert_is_average(state_of(assert_loads(AutoModelForCausalLM, joined)), ema)


def test_a_folder_that_would_not_load_is_refused(tmp_path: Path) -> None:
    model = llama()
    like = tmp_path / "like"
    llama(tied=False, attention_bias=True).save_pretrained(like)
    other = tmp_path / "other"
    llama(vocab_size_per_layer=1).save_pretrained(other)
    ema = tracked(tmp_path / "ema", model)
    with pytest.raises(ValueError) as refused:
        write_like(ema, like, tmp_path / "out")
    text = str(refused.value)
    for layer in range(2):
        for part in "qkvo":
            assert f"`model.layers.{layer}.self_attn.{part}_proj.bias`" in text
    assert "would not load: the average has no" in text and str(like) in text
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    wide = tmp_path / "wide"
    big = llama()
    big.resize_token_embeddings(48)
    big.save_pretrained(wide)
    with pytest.raises(ValueError, match=r"in the average `model.embed_tokens.weight` has shape \[40, 16\], not \[48"):
        write_like(ema, wide, tmp_path / "out")


def test_compiled_and_wrapped_models_get_the_names_of_the_folder(tmp_path: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.module = torch.nn.Module()
            self.module._orig_mod = inner

    from transformers import AutoModelForCausalLM

    model = llama(tied=False)
    like = tmp_path / "like"
    model.save_pretrained(like)
    ema = tracked(tmp_path / "ema", Wrapper(model))
    with pytest.warns(UserWarning, match="names are those of wrappers of a model"):
        found = write_like(ema, like, tmp_path / "found")
    ruled = write_like(ema, like, tmp_path / "ruled", rename=[r"s/^module/x/", r"s/^x\.(\w+)/\1/"])
    preset = write_like(ema, like, tmp_path / "preset", rename="wrappers")
    for out in (found, ruled, preset):
        loaded = assert_loads(AutoModelForCausalLM, out)
        assert_is_average(state_of(loaded), ema, lambda name: name.removeprefix("module."))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_loads_an_average_of_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    base = llama()
    base_state = state_of(base)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    like = tmp_path / "like"
    model.save_pretrained(like)
    ema = tracked(tmp_path / "ema", model, only_save_diff=True)
    with pytest.warns(UserWarning, match="names are those of PEFT in memory"):
        found = write_like(ema, like, tmp_path / "found")
    preset = write_like(ema, like, tmp_path / "preset", rename="peft")
    for out in (found, preset):
        fresh = llama()
        fresh.load_state_dict(base_state)
        loaded = peft.PeftModel.from_pretrained(fresh, out)
        assert (
            load_file(out / "adapter_model.safetensors").keys() == load_file(like / "adapter_model.safetensors").keys()
        )
        expected = exact(ema)
        assert any("modules_to_save" in name for name in expected)
        for name, tensor in loaded.state_dict().items():
            if name in expected:
                assert_within_one_ulp(tensor, expected[name], name)
    with pytest.raises(ValueError, match=r"an adapter is read from one file, adapter_model.safetensors"):
        write_like(ema, like, tmp_path / "shards", rename="peft", shard_size=100)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_diffusers_load_an_average_in_shards(tmp_path: Path, variant: str | None) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=8)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False)
    model = diffusers.UNet2DModel(**sizes, **blocks)
    like = tmp_path / "like"
    model.save_pretrained(like, variant=variant)
    ema = tracked(tmp_path / "ema", model)
    for options in ({}, {"shard_size": "20KB"}):
        out = write_like(ema, like, tmp_path / f"out-{len(options)}", **options)
        loaded, info = diffusers.UNet2DModel.from_pretrained(out, variant=variant, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        assert_is_average(state_of(loaded), ema)
    middle = "" if variant is None else f".{variant}"
    assert (out / f"diffusion_pytorch_model.safetensors.index{middle}.json").is_file()
    assert (
        out / f"diffusion_pytorch_model{middle}-00001-of-{len(list(out.glob('*.safetensors'))):05}.safetensors"
    ).is_file()


def test_timm_loads_an_average_of_a_run(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=5)
    like = tmp_path / "like"
    timm.models.save_for_hf(model, like, model_config={}, safe_serialization=True)
    ema = tracked(tmp_path / "ema", model)
    out = write_like(ema, like, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert_is_average(state_of(loaded), ema)
    loaded.load_state_dict(load_file(out / "model.safetensors"), strict=True)


def test_raw_checkpoints_become_a_folder_of_the_library(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    model = llama()
    like = tmp_path / "like"
    model.save_pretrained(like, max_shard_size="6KB")
    states, paths = [], []
    for step in (1, 2, 3):
        change(model, step)
        states.append(state_of(model))
        path = tmp_path / f"step_{step}.pt"
        # A compiled model's names, and a tied tensor twice, as torch.save has them.
        torch.save({"model": {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}}, path)
        paths.append(path)
    with pytest.warns(UserWarning) as notes:
        average(paths, EVEN, tmp_path / "out", like=like)
    texts = [str(note.message) for note in notes]
    assert any("`lm_head.weight` is left out, since it is tied to `model.embed_tokens.weight`" in t for t in texts)
    assert any("names are those of wrappers" in text for text in texts)
    loaded = assert_loads(AutoModelForCausalLM, tmp_path / "out")
    base = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(base.embed_tokens.weight, loaded.lm_head.weight)
    for name, tensor in loaded.state_dict().items():
        mean = sum(state[name].double() for state in states) / 3
        assert isinstance(mean, torch.Tensor)
        allowed = torch.finfo(tensor.dtype).eps * mean.abs()
        assert bool(((tensor.double() - mean).abs() <= allowed).all()), name
    # Loading strictly needs the folder's names: the file alone has those of the wrapper.
    average(paths, EVEN, tmp_path / "plain", shard_size="6KB", rename="wrappers")
    index = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == states[0].keys()


def test_rules_that_join_names_are_refused(tmp_path: Path) -> None:
    ema = tracked(tmp_path / "ema", torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"rename: `0.bias` and `1.bias` would both be called `bias`"):
        ema.write([EVEN], out, rename=r"s/^[01]\.//")
    with pytest.raises(ValueError, match="changes no name"):
        ema.write([EVEN], out, rename="s/^layers//")
    with pytest.raises(ValueError, match="write it as 's/PATTERN/REPLACEMENT/'"):
        ema.write([EVEN], out, rename="_orig_mod.")
    with pytest.raises(ValueError, match="shard_size = '5 bytes'"):
        ema.write([EVEN], out, shard_size="5 bytes")
    with pytest.raises(ValueError, match="not a folder of a model|no weights are in this folder"):
        (tmp_path / "empty").mkdir()
        ema.write([EVEN], out, like=tmp_path / "empty")
    [file] = ema.write([EVEN], out, rename="s/^/net./")
    assert load_file(file).keys() == {"net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias"}
    [file] = ema.write([EVEN], tmp_path / "less", leave_out=["1.*"])
    assert load_file(file).keys() == {"0.weight", "0.bias"}
