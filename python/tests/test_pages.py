"""The code of how-to pages, run as it stands there with the real libraries."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PAGES, bits, code_of, exact, run_code, shake
from diffusers import UNet2DModel
from timm.models import load_checkpoint
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from posthoc_ema import PostHocEMA, Profile

EPOCHS, SWA_START, BATCHES = 8, 4, 25


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """Makes what a page takes for granted: the same model, data and loss at each call."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()

    def new() -> dict[str, Any]:
        torch.manual_seed(0)
        inputs = torch.randn(BATCHES * 8, 6)
        data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history: list[dict[str, np.ndarray]] = []

        def remember(*_: object) -> None:
            history.append({name: p.detach().numpy().copy() for name, p in model.named_parameters()})

        optimizer.register_step_post_hook(remember)

        def evaluate(module: torch.nn.Module) -> float:
            was_training = module.training
            module.eval()
            with torch.no_grad():
                loss = torch.nn.functional.cross_entropy(module(inputs), data.tensors[1]).item()
            module.train(was_training)
            return loss

        return {
            "model": model,
            "optimizer": optimizer,
            "loader": DataLoader(data, batch_size=8),
            "loss_fn": torch.nn.CrossEntropyLoss(),
            "epochs": EPOCHS,
            "swa_start": SWA_START,
            "evaluate": evaluate,
            "history": history,
        }

    return new


def at_updates(history: list[dict[str, np.ndarray]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns times and values of a parameter at the default updates and at the ends of epochs."""
    times = np.array([t for t in range(100, len(history) + 1) if t % 10 == 0 or t % BATCHES == 0])
    return times, np.stack([history[t - 1][name] for t in times])


def error(value: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(value.detach().double().numpy() - expected).max() / np.sqrt((expected**2).mean()))


def test_swa_training_is_replaced(training: Callable[[], dict[str, Any]]) -> None:
    there_code, here_code = code_of("swa-and-timm.md", "torch.optim.swa_utils")
    there = run_code(there_code, training())
    here = run_code(here_code, training())
    assert bits(here["model"]) == bits(there["model"])
    assert np.isfinite(there["score"]) and here["score"] < there["score"] + 0.05
    average = here["ema"].synthesize([here["target"]])[0]
    for name, _ in here["model"].named_parameters():
        expected = exact(here["target"], *at_updates(here["history"], name))
        assert error(average[name], expected) < 0.01, name
    assert here["target"] == Profile.uniform(fraction=0.5)
    assert here["model"].training and len(here["history"]) == EPOCHS * BATCHES


def test_decays_of_the_table_give_the_average_of_swa_utils(training: Callable[[], dict[str, Any]]) -> None:
    text = (PAGES / "swa-and-timm.md").read_text()
    assert "`from_model(..., betas=[0.999])`" in text and "`betas=[0.999 ** 0.1]`" in text
    model = training()["model"]
    every_step = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    every_ten = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    options: dict[str, Any] = {"update_after_step": 0, "checkpoint_every": 1000}
    dense = PostHocEMA.from_model(model, "dense", betas=[0.999], update_every=1, **options)
    sparse = PostHocEMA.from_model(model, "sparse", betas=[0.999**0.1], update_every=10, **options)
    for step in range(1, 501):
        shake(model)
        every_step.update_parameters(model)
        if step % 10 == 0:
            every_ten.update_parameters(model)
        dense.update_(model)
        sparse.update_(model)
    for ema, beta, there in ((dense, 0.999, every_step), (sparse, 0.999**0.1, every_ten)):
        average = ema.synthesize([Profile.beta(beta)])[0]
        for name, parameter in there.module.named_parameters():
            assert error(average[name], parameter.detach().double().numpy()) < 2e-5, name


def test_timm_training_is_replaced(training: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    there_code, here_code = code_of("swa-and-timm.md", "timm")
    there = run_code(there_code, training())
    (tmp_path / "output").rename(tmp_path / "output-of-timm")
    (tmp_path / "output").mkdir()
    here = run_code(here_code, training())
    assert bits(here["model"]) == bits(there["model"])
    # timm reads the averages as those of its own class.
    for name, parameter in there["model_ema"].module.named_parameters():
        expected = exact(here["target"], *_tens(here["history"], name))
        loaded = training()["model"]
        load_checkpoint(loaded, str(tmp_path / "output" / "last.pth.tar"), use_ema=True)
        assert error(loaded.state_dict()[name], expected) < 1e-5
        assert np.abs(parameter.detach().numpy() - expected).max() < 0.2
    raw = training()["model"]
    load_checkpoint(raw, str(tmp_path / "output" / "last.pth.tar"), use_ema=False)
    assert bits(raw) == bits(here["model"])
    assert (tmp_path / "output" / "model_best.pth.tar").is_file()
    # The line for a training that resumes.
    (line,) = re.findall(
        r"`(PostHocEMA\.from_model\(model, \"runs/timm\".*?)`", (PAGES / "swa-and-timm.md").read_text()
    )
    here["ema"].close()
    resumed = run_code(f"ema = {line}", {"PostHocEMA": PostHocEMA, "model": raw})["ema"]
    assert resumed.step == EPOCHS * BATCHES
    one, other = (ema.synthesize([0.1])[0] for ema in (resumed, PostHocEMA.from_path("runs/timm")))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _tens(history: list[dict[str, np.ndarray]], name: str) -> tuple[np.ndarray, np.ndarray]:
    times = np.arange(10, len(history) + 1, 10)
    return times, np.stack([history[t - 1][name] for t in times])


def test_ema_pytorch_page(training: Callable[[], dict[str, Any]]) -> None:
    imports, loop = code_of("ema-pytorch.md")
    (resume,) = code_of("ema-pytorch.md", "Resume")
    net = torch.nn.Linear(512, 2)
    # Steps that the page leaves to its reader are short here.
    assert loop.count("range(20_000)") == 1
    names = run_code(imports + loop.replace("20_000", "2_000"), {"net": net, "torch": torch, "train_step": shake})
    assert names["output"].shape == (1, 2) and names["emas"].step.item() == 2000
    before = names["emas"].state_dict()
    names = run_code(resume, names)
    for _ in range(10):
        shake(net)
        names["emas"].update()
    assert names["emas"].step.item() == 2010 and names["emas"].posthoc.step == 2010 and "_extra_state" in before


def test_diffusers_page(training: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    imports, make = code_of("diffusers.md")
    during, afterwards = code_of("diffusers.md", "Evaluate and save other lengths")
    (adapter,) = code_of("diffusers.md", "Names")
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
    )
    seen: list[Any] = []
    given = {"UNet2DModel": UNet2DModel, "PostHocEMA": PostHocEMA, "unet": unet, "log_validation": seen.append}
    names = run_code(imports + make, given)
    for _ in range(20):
        shake(unet, 0.01)
        names["ema_unet"].step(unet.parameters())
    before = bits(unet)
    names = run_code(during, names)
    assert seen == [unet] and bits(unet) == before
    average = names["ema_unet"].posthoc.synthesize([0.15])[0]
    saved = UNet2DModel.from_pretrained(tmp_path / "unet-0.15").state_dict()
    assert all(torch.equal(saved[name], average[name]) for name in average)
    names["ema_unet"].posthoc.finish()
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "unet-0.15").rename(tmp_path / "during")
    run_code(afterwards, names)
    saved = UNet2DModel.from_pretrained(tmp_path / "unet-0.15").state_dict()
    assert all(error(saved[name], average[name].double().numpy()) < 1e-6 for name in average)
    some = [unet.conv_in.weight, unet.conv_out.bias]
    lora = run_code(adapter, {**names, "lora_parameters": some})["ema_lora"]
    lora.step(some)
    assert lora.optimization_step == 1
