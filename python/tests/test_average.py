"""Averages of checkpoints, compared with sums of PyTorch in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posthoc_ema import Profile, average

STEPS = [100, 250, 300, 500, 700, 850, 1000]


def state(step: int) -> dict[str, torch.Tensor]:
    """Returns a model's state dict at a step; no two values are equal."""
    generator = torch.Generator().manual_seed(step)
    half = torch.randn(40, generator=generator).half()
    return {
        "embed": torch.randn(7, 5, generator=generator),
        "half": half,
        "brain": torch.randn(3, 11, generator=generator).bfloat16(),
        "double": torch.randn(4, dtype=torch.float64, generator=generator),
        "count": torch.tensor(step),
        "mask": torch.tensor([True, step % 200 == 0]),
    }


def masses(profile: Profile, steps: list[int], at: int) -> list[float]:
    shares = [0.0, *profile.cumulative(steps[:-1], at), 1.0]
    return [after - before for before, after in zip(shares, shares[1:])]


def assert_is_sum(found: dict[str, torch.Tensor], weights: list[float], dtype: torch.dtype | None = None) -> None:
    states = [state(step) for step in STEPS[: len(weights)]]
    newest = states[-1]
    assert found.keys() == newest.keys()
    for name, last in newest.items():
        if not last.is_floating_point():
            assert torch.equal(found[name], last)
            continue
        assert found[name].dtype == (dtype or last.dtype)
        exact = sum(weight * each[name].double() for weight, each in zip(weights, states))
        # Half an ulp of the result, half of the smallest subnormal of float16, and the rounding of a sum in float64.
        allowed = torch.finfo(found[name].dtype).eps / 2 * exact.abs() + 1e-15
        allowed += 2.0**-25 if found[name].dtype == torch.float16 else 0.0
        assert bool(((found[name].double() - exact).abs() <= allowed).all()), name


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"step_{step}.safetensors" for step in STEPS]
    for path, step in zip(paths, STEPS):
        save_file(state(step), path)
    return paths


def test_averages_in_memory_equal_sums(files: list[Path]) -> None:
    profiles = [
        Profile.sigma_rel(0.2),
        Profile.half_life(500),
        Profile.uniform(fraction=1.0),
        Profile.lr_decay("1-sqrt", 800),
        Profile.lr_decay("cosine", 800),
    ]
    reported: list[tuple[int, int | None]] = []
    found = average(files, profiles, progress=lambda done, total: reported.append((done, total)))
    for each, profile in zip(found, profiles):
        weights = masses(profile, STEPS, 1000)
        assert each.profile == profile and each.at == 1000 and each.path is None
        assert [w.step for w in each.weights] == STEPS and [w.path for w in each.weights] == files
        assert [w.weight for w in each.weights] == pytest.approx(weights, abs=1e-15)
        assert each.state_dict is not None
        assert_is_sum(each.state_dict, weights)
    assert reported[-1][0] == reported[-1][1] == 7 * (35 * 4 + 40 * 2 + 33 * 2 + 4 * 8)
    (earlier,) = average(files, 0.2, at=700, dtype=torch.float32)
    assert earlier.state_dict is not None
    assert_is_sum(earlier.state_dict, masses(Profile.sigma_rel(0.2), STEPS[:5], 700), torch.float32)


def test_pytorch_and_safetensors_files_give_equal_averages(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "pt"
    folder.mkdir()
    for step in STEPS:
        torch.save(
            {"model": state(step), "step": step, "optimizer": {"state": {0: {"m": torch.ones(3)}}}},
            folder / f"{step}.pt",
        )
    (found,) = average(folder, Profile.uniform(fraction=0.9))
    (expected,) = average(files, Profile.uniform(fraction=0.9))
    assert found.state_dict is not None and expected.state_dict is not None
    for name, tensor in expected.state_dict.items():
        assert torch.equal(found.state_dict[name], tensor), name
    (written,) = average(folder, Profile.uniform(fraction=0.9), tmp_path / "average.safetensors", device="cpu")
    assert written.path == tmp_path / "average.safetensors" and written.state_dict is None
    loaded = load_file(written.path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.state_dict.items())


def test_average_of_folders_is_a_folder(tmp_path: Path) -> None:
    for step in STEPS:
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        tensors = state(step)
        shards = {"model-00001-of-00002.safetensors": ["embed", "half"]}
        shards["model-00002-of-00002.safetensors"] = [name for name in tensors if name not in ("embed", "half")]
        for shard, names in shards.items():
            save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text('{"torch_dtype": "float32"}')
        (folder / "optimizer.pt").write_text("state")
    outputs = [tmp_path / "wide", tmp_path / "narrow"]
    profiles = [Profile.gamma(0), Profile.gamma(3)]
    for each, profile in zip(average(tmp_path / "run", profiles, outputs, dtype="bf16"), profiles):
        assert each.path is not None
        index = json.loads((each.path / "model.safetensors.index.json").read_text())
        loaded = {}
        for name, shard in index["weight_map"].items():
            loaded[name] = load_file(each.path / shard)[name]
        assert_is_sum(loaded, masses(profile, STEPS, 1000), torch.bfloat16)
        assert json.loads((each.path / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
        assert not (each.path / "optimizer.pt").exists()


def test_links_out_of_a_folder_are_copied_only_if_asked(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in STEPS]
    for folder, step in zip(folders, STEPS):
        folder.mkdir()
        save_file(state(step), folder / "model.safetensors")
    secret = tmp_path / "key"
    secret.write_text("secret")
    secret.chmod(0o600)
    (folders[-1] / "vocab.txt").symlink_to(secret)
    out = tmp_path / "average"
    with pytest.raises(ValueError, match="vocab.txt: a link leads to"):
        average(folders, Profile.uniform(fraction=1.0), out)
    assert not out.exists()
    average(folders, Profile.uniform(fraction=1.0), out, follow_links=True)
    copy = out / "vocab.txt"
    assert copy.read_text() == "secret" and copy.stat().st_mode & 0o777 == 0o600


def test_lora_files_of_different_scales_are_refused(tmp_path: Path) -> None:
    def lora(alpha: float, step: int) -> dict[str, torch.Tensor]:
        return {"unet.lora_down.weight": torch.full((2, 3), float(step)), "unet.alpha": torch.tensor(alpha)}

    for step in (10, 20):
        save_file(lora(0.7, step), tmp_path / f"lora-{step:06}.safetensors", metadata={"ss_network_dim": "2"})
    (found,) = average(tmp_path, Profile.gamma(0))
    assert found.state_dict is not None
    assert torch.equal(found.state_dict["unet.alpha"], torch.tensor(0.7))
    assert torch.equal(found.state_dict["unet.lora_down.weight"], torch.full((2, 3), 15.0))
    save_file(lora(0.5, 20), tmp_path / "lora-000020.safetensors")
    with pytest.raises(ValueError, match=r"`unet\.alpha`, the scale of a low-rank adapter"):
        average(tmp_path, Profile.gamma(0))


def test_invalid_arguments_are_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out names 1 paths for 2 targets"):
        average(files, [0.1, 0.2], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="option steps: 2 are given for 7"):
        average(files, 0.1, steps=[1, 2])
    with pytest.raises(ValueError, match="the target time 2000 is after"):
        average(files, 0.1, at=2000)
    with pytest.raises(FileNotFoundError, match="check the path"):
        average([*files, tmp_path / "gone-5.safetensors"], 0.1)
    with pytest.raises(ValueError, match="averages can be float32"):
        average(files, 0.1, dtype="int8")
    with pytest.warns(UserWarning, match="hardly an average"):
        average(files, Profile.half_life(10))
