"""Averages of adapters of LyCORIS, loaded by it again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posthoc_ema import Profile, average

with warnings.catch_warnings():
    # Libraries that it imports warn of their own future.
    warnings.simplefilter("ignore")
    lycoris = pytest.importorskip("lycoris")

EVEN = Profile.uniform(fraction=1.0)
RANK = 2
ALPHA = 1.0


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(12, 8)
        self.conv = torch.nn.Conv2d(4, 6, 3)


def network(algorithm: str, seed: int) -> Any:
    """Returns adapters of random factors. Their names and shapes do not depend on the seed."""
    made = lycoris.create_lycoris(
        Net(),
        1.0,
        RANK,
        ALPHA,
        conv_dim=RANK,
        conv_alpha=ALPHA,
        algo=algorithm,
        factor=2,
        target_modules=["Linear", "Conv2d"],
    )
    made.apply_to()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


def saved(folder: Path, algorithm: str) -> list[Any]:
    networks = [network(algorithm, step) for step in (1, 2, 3)]
    for step, made in enumerate(networks):
        tensors = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
        save_file(tensors, folder / f"lora-{step + 1:06}.safetensors", {"ss_network_dim": str(RANK)})
    return networks


def differences(made: Any) -> dict[str, torch.Tensor]:
    """Returns what each adapter adds to its weight, as a matrix."""
    return {each.lora_name: each.get_diff_weight(1.0)[0].detach().double().flatten(1) for each in made.loras}


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_averages_of_factors_load_strictly(tmp_path: Path, algorithm: str) -> None:
    networks = saved(tmp_path, algorithm)
    (found,) = average(tmp_path, EVEN)
    assert found.state_dict is not None
    states = [made.state_dict() for made in networks]
    for name, tensor in found.state_dict.items():
        if name.endswith("alpha"):
            assert torch.equal(tensor, states[0][name]), name
            continue
        exact = torch.stack([state[name].detach().double() for state in states]).mean(0)
        # Half an ulp, and the rounding of a sum in float64.
        allowed = torch.finfo(tensor.dtype).eps / 2 * exact.abs() + 1e-15
        assert bool(((tensor.double() - exact).abs() <= allowed).all()), name
    network(algorithm, 0).load_state_dict(found.state_dict, strict=True)
    if algorithm != "lora":
        with pytest.raises(ValueError, match="cannot be averaged by --product svd"):
            average(tmp_path, EVEN, product="svd")


def test_products_load_strictly_and_are_the_nearest(tmp_path: Path) -> None:
    networks = saved(tmp_path, "lora")
    out = tmp_path / "out" / "mean.safetensors"
    average([tmp_path / f"lora-{step:06}.safetensors" for step in (1, 2, 3)], EVEN, out, product="svd")
    loaded = network("lora", 0)
    loaded.load_state_dict(load_file(out), strict=True)
    each = [differences(made) for made in networks]
    for name, found in differences(loaded).items():
        mean = torch.stack([of_step[name] for of_step in each]).mean(0)
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        nearest = u[:, :RANK] * s[:RANK] @ v[:RANK]
        assert bool(((found - nearest).abs() <= 1e-5 * mean.norm()).all()), name
