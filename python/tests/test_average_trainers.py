"""Averages of the checkpoints that trainers write, whatever they keep beside the model."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from posthoc_ema import Profile, average

EVEN = Profile.uniform(fraction=1.0)


def assert_is_mean(found: dict[str, torch.Tensor], states: list[dict[str, torch.Tensor]]) -> None:
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, states[-1][name]), name
            continue
        exact = torch.stack([state[name].double() for state in states]).mean(0)
        assert torch.equal(tensor, exact.to(tensor.dtype)), name


def test_checkpoints_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    utils = pytest.importorskip("timm.utils")
    torch.manual_seed(3)
    out = tmp_path / "out"
    out.mkdir()
    model = timm.create_model("test_vit")
    ema = utils.ModelEmaV3(model)
    saver = utils.CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args=argparse.Namespace(model="test_vit"),
        model_ema=ema,
        checkpoint_dir=str(out),
        recovery_dir=str(out),
    )
    for epoch in (0, 1):
        with torch.no_grad():
            for parameter in [*model.parameters(), *ema.module.parameters()]:
                parameter.add_(torch.randn_like(parameter))
        saver.save_checkpoint(epoch, metric=epoch)
    files = sorted(out.glob("checkpoint-*.pth.tar"))
    stored = [torch.load(path, weights_only=False) for path in files]
    from_zero = "epochs are counted from 0 in the names, so the first is step 1"
    entry = "the entry `state_dict` of each checkpoint is averaged; `state_dict_ema` hold"
    with pytest.warns(UserWarning, match=entry), pytest.warns(UserWarning, match=from_zero):
        average(files, EVEN, tmp_path / "mean.safetensors")
    assert_is_mean(load_file(tmp_path / "mean.safetensors"), [each["state_dict"] for each in stored])
    with pytest.warns(UserWarning, match=from_zero):
        average(files, EVEN, tmp_path / "ema.safetensors", key="state_dict_ema")
    found = load_file(tmp_path / "ema.safetensors")
    assert_is_mean(found, [each["state_dict_ema"] for each in stored])
    model.load_state_dict(found, strict=True)
    # The whole folder: the last and the best are names of a numbered one, and the others are within an epoch.
    for batch in (50, 100):
        saver.save_recovery(1, batch)
    saver.save_recovery(2, 50)
    with pytest.warns(UserWarning) as said:
        (whole,) = average([out], EVEN, key="state_dict_ema")
    texts = [str(warning.message) for warning in said]
    for name in ("last", "model_best"):
        assert f"left out, the same as `checkpoint-1.pth.tar`: `{name}.pth.tar`" in texts
    recovery = "`recovery-1-100.pth.tar` and `recovery-2-50.pth.tar`"
    assert f"left out, saved within an epoch to recover from a crash: {recovery}" in texts
    assert [weight.step for weight in whole.weights] == [1, 2]
    assert whole.state_dict is not None
    assert_is_mean(whole.state_dict, [each["state_dict_ema"] for each in stored])


def test_checkpoints_of_lightning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning = pytest.importorskip("lightning")

        class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self, **kwargs: Any) -> None:
                super().__init__()
                self.save_hyperparameters()
                self.layer = torch.nn.Linear(3, 2)

            def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
                return self.layer(batch).square().sum()

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), 0.01)
                return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6])]

        net = Net(path=Path("x"), number=np.float64(1), arguments=argparse.Namespace(lr=0.1))
        saved = lightning.pytorch.callbacks.ModelCheckpoint(
            tmp_path, save_top_k=-1, every_n_train_steps=2, filename="{step}"
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(max_steps=4, callbacks=[saved], **quiet)
        trainer.fit(net, torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=2))
    files = sorted(tmp_path.glob("*.ckpt"))
    states = [torch.load(path, weights_only=False)["state_dict"] for path in files]
    assert len(states) == 2 and not torch.equal(states[0]["layer.weight"], states[1]["layer.weight"])
    (found,) = average(tmp_path, EVEN)
    assert found.state_dict is not None and [weight.step for weight in found.weights] == [2, 4]
    assert_is_mean(found.state_dict, states)
    net.load_state_dict(found.state_dict, strict=True)


def test_constant_infinities_of_a_causal_mask_stay(tmp_path: Path) -> None:
    states = []
    for step in (1, 2, 3):
        layer = torch.nn.Linear(2, 2)
        layer.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        states.append({name: tensor.detach().clone() for name, tensor in layer.state_dict().items()})
        torch.save(states[-1], tmp_path / f"step_{step}.pt")
    for target in (Profile.gamma(0.5), Profile.uniform(fraction=0.8)):
        (found,) = average(tmp_path, target)
        assert found.state_dict is not None and torch.equal(found.state_dict["mask"], states[0]["mask"])
        layer.load_state_dict(found.state_dict, strict=True)
    states[1]["mask"][0, 0] = float("inf")
    torch.save(states[1], tmp_path / "step_2.pt")
    with pytest.raises(ValueError, match=r"step_2\.pt: tensor `mask` holds inf at element 0"):
        average(tmp_path, Profile.gamma(0.5))
