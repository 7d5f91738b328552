"""Imports of averages that trainings kept themselves, in files that the real libraries wrote."""

from __future__ import annotations

import argparse
import copy
import math
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import allowance, exact
from torch import nn

from posthoc_ema import PostHocEMA, Profile, import_averages
from posthoc_ema.utils import sigma_rel_to_gamma

STEPS = 120
EVERY = 10
BETA = 0.9
TARGETS = (Profile.sigma_rel(0.15), Profile.beta(0.95))


def move(model: nn.Module, step: float) -> None:
    """Takes a step of a training: every parameter moves on a curve of its own."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            phases = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
            parameter.copy_(torch.sin(step / 40 + phases) + step / 50 * (i + 1))


def check(run: Path, names: Iterable[str], values: Callable[[int], dict[str, torch.Tensor]], rounding: float) -> None:
    """Compares syntheses with the exact averages of the weights after each step, within the plan's error."""
    opened = PostHocEMA.from_path(run)
    times = np.arange(1, STEPS + 1)
    steps = [values(int(time)) for time in times]
    for profile, average, plan in zip(TARGETS, opened.synthesize(TARGETS), opened.plan(TARGETS), strict=True):
        assert plan.relative_error < 0.5, (profile, plan.relative_error)
        for name in names:
            course = torch.stack([weights[name].double().flatten() for weights in steps]).numpy()
            for i, element in enumerate(average[name].double().flatten().tolist()):
                right = exact(profile, times, course[:, i])
                allowed = allowance(profile, times, course[:, i], plan.relative_error)
                allowed += rounding * max(plan.noise_gain, 1.0) * max(1.0, float(np.abs(course[:, i]).max()))
                assert abs(element - right) <= allowed, (profile, name, i, element, right, allowed)


def weights_after(model: nn.Module) -> Callable[[int], dict[str, torch.Tensor]]:
    """Returns the function of a step that returns the weights after it."""

    def values(step: int) -> dict[str, torch.Tensor]:
        move(model, step)
        return {name: value.clone() for name, value in model.state_dict().items()}

    return values


@pytest.mark.parametrize("warmup", [False, True])
def test_timm_s_checkpoints(tmp_path: Path, warmup: bool) -> None:
    utils = pytest.importorskip("timm.utils")
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = utils.ModelEmaV3(model, decay=BETA, use_warmup=warmup)
    out = tmp_path / "out"
    out.mkdir()
    # As the options of timm's train.py.
    arguments = argparse.Namespace(
        model="linear", model_ema=True, model_ema_decay=BETA, model_ema_warmup=warmup, model_ema_force_cpu=False
    )
    folders = {"checkpoint_dir": str(out), "recovery_dir": str(out)}
    saver = utils.CheckpointSaver(model, optimizer, args=arguments, model_ema=ema, max_history=99, **folders)
    for step in range(1, STEPS + 1):
        move(model, step)
        ema.update(model, step=step)
        if step % EVERY == 0:
            saver.save_checkpoint(step // EVERY - 1, metric=float(step))
        elif step % EVERY == EVERY // 2:
            saver.save_recovery(step // EVERY, step % EVERY)
    ramp = "inverse-gamma" if warmup else None
    with pytest.raises(ValueError, match="steps"):
        import_averages(out, tmp_path / "run", beta=BETA, ramp=ramp)
    steps = range(EVERY, STEPS + 1, EVERY)
    with (
        pytest.warns(UserWarning, match="last.pth.tar"),
        pytest.warns(UserWarning, match="within an epoch.*`recovery-"),
    ):
        imported = import_averages(out, tmp_path / "run", beta=BETA, ramp=ramp, steps=steps)
    assert imported.snapshots == 2 * len(steps) and imported.steps == tuple(steps)
    assert "timm: `state_dict_ema` is the average" in imported.notes[0]
    check(tmp_path / "run", ("weight", "bias"), weights_after(model), 1e-5)
    # The files record decay and warm-up.
    with (
        pytest.warns(UserWarning, match="last.pth.tar"),
        pytest.warns(UserWarning, match="within an epoch.*`recovery-"),
    ):
        recorded = import_averages(out, tmp_path / "recorded", steps=steps)
    assert any(f"the decay {BETA}" in note and "`args.model_ema_decay`" in note for note in recorded.notes)
    check(tmp_path / "recorded", ("weight", "bias"), weights_after(model), 1e-5)


class ExponentialMovingAverage(torch.optim.swa_utils.AveragedModel):
    """The average of torchvision's references (`references/classification/utils.py`)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        def ema_avg(avg: torch.Tensor, parameter: torch.Tensor, count: Any) -> torch.Tensor:
            return decay * avg + (1 - decay) * parameter

        super().__init__(model, None, ema_avg, use_buffers=True)


def test_torchvision_s_checkpoints(tmp_path: Path) -> None:
    """Loops as torchvision's `train.py`: updates begin again in each epoch, and the warm-up copies the weights."""
    args = argparse.Namespace(
        model_ema=True,
        model_ema_decay=0.997,
        model_ema_steps=3,
        world_size=8,
        batch_size=16,
        epochs=12,
        lr_warmup_epochs=2,
    )
    adjust = args.world_size * args.batch_size * args.model_ema_steps / args.epochs
    alpha = min(1.0, (1.0 - args.model_ema_decay) * adjust)
    model = nn.Linear(4, 3)
    ema = ExponentialMovingAverage(model, 1.0 - alpha)
    out = tmp_path / "out"
    out.mkdir()
    counted = 0
    # Ten batches, which the steps between updates do not divide.
    for epoch in range(args.lr_warmup_epochs + STEPS // 4):
        for i in range(10):
            is_update = i % args.model_ema_steps == 0
            if is_update and epoch >= args.lr_warmup_epochs:
                counted += 1
                move(model, counted)
            if is_update:
                ema.update_parameters(model)
                if epoch < args.lr_warmup_epochs:
                    ema.n_averaged.fill_(0)
        checkpoint = {"model": model.state_dict(), "model_ema": ema.state_dict(), "epoch": epoch, "args": args}
        if epoch % 2:
            torch.save(checkpoint, out / f"model_{epoch}.pth")
        torch.save(checkpoint, out / "checkpoint.pth")
    assert counted == STEPS
    with pytest.warns(UserWarning) as said:
        imported = import_averages(out, tmp_path / "run")
    texts = [str(warning.message) for warning in said]
    assert any("saved in the warm-up, in which the average is a copy: `model_1.pth`" in text for text in texts), texts
    assert f"the decay {1.0 - alpha}, by torchvision's adjustment of 0.997, is that of" in "; ".join(imported.notes)
    assert imported.steps == tuple(range(8, STEPS + 1, 8)) and imported.snapshots == 2 * len(imported.steps)
    check(tmp_path / "run", ("weight", "bias"), weights_after(model), 1e-5)
    for path in out.glob("model_*.pth"):
        if path.name != "model_1.pth":
            path.unlink()
    with pytest.raises(ValueError, match="is a copy, as all others here: name a folder with later checkpoints"):
        import_averages(out, tmp_path / "other")
    with pytest.raises(ValueError, match="torchvision's files count the updates of the average"):
        import_averages(out, tmp_path / "other", update_every=3)


@pytest.mark.filterwarnings("ignore")
def test_lightning_s_ema_weight_averaging(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this version has no EMAWeightAveraging")

    class Trained(lightning.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.layer(batch[0]).sum()

        def optimizer_step(self, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
            optimizer.step(closure=closure)
            move(self, self.trainer.global_step)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    out = tmp_path / "out"
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(STEPS, 4)))
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            callbacks.EMAWeightAveraging(decay=BETA, update_every_n_steps=2),
            callbacks.ModelCheckpoint(dirpath=out, every_n_train_steps=EVERY, save_top_k=-1, filename="{step}"),
        ],
    )
    module = Trained()
    trainer.fit(module, data)
    with pytest.raises(ValueError, match="`n_averaged` is 5, and at step 10 it would be 10"):
        import_averages(out, tmp_path / "run", beta=BETA)
    imported = import_averages(out, tmp_path / "run", beta=BETA, update_every=2)
    assert imported.snapshots == 2 * STEPS // EVERY and imported.steps[0] == EVERY
    assert imported.notes[0] == "checkpoints of Lightning: `state_dict` is the average"
    opened = PostHocEMA.from_path(tmp_path / "run")
    assert opened.plan([0.15])[0].relative_error < 0.3
    # The raw weights between two updates are one source each, at their own step.
    (average,) = opened.synthesize([Profile.beta(1e-6)])
    assert torch.allclose(average["layer.weight"], module.state_dict()["layer.weight"]) is False
    raw = torch.load(out / f"step={STEPS}.ckpt", weights_only=True)["current_model_state"]
    assert torch.allclose(average["layer.weight"], raw["layer.weight"], atol=1e-5)


def test_diffusers_s_folders_record_the_decay(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    training_utils = pytest.importorskip("diffusers.training_utils")
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4,),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    ema = training_utils.EMAModel(
        model.parameters(), decay=BETA, update_after_step=4, model_cls=type(model), model_config=model.config
    )
    out = tmp_path / "out"
    for step in range(1, STEPS + 1):
        move(model, step)
        ema.step(model.parameters())
        if step % EVERY == 0:
            ema.save_pretrained(out / f"checkpoint-{step}" / "unet_ema")
            model.save_pretrained(out / f"checkpoint-{step}" / "unet")
    with pytest.raises(ValueError, match="the files record of decay 0.9 after a ramp"):
        import_averages(out, tmp_path / "run", beta=0.999)
    imported = import_averages(out, tmp_path / "run")
    assert imported.snapshots == 2 * STEPS // EVERY and imported.steps[-1] == STEPS
    opened = PostHocEMA.from_path(tmp_path / "run")
    # The raw weights of steps 1 to 4 are not in any average: a copy began at step 5.
    values = weights_after(model)
    times = np.arange(5, STEPS + 1)
    course = np.array([values(int(time))["conv_in.bias"][0].item() for time in times])
    for profile, average, plan in zip(TARGETS, opened.synthesize(TARGETS), opened.plan(TARGETS), strict=True):
        allowed = allowance(profile, times, course, plan.relative_error) + 1e-4 * max(plan.noise_gain, 1.0)
        assert plan.relative_error < 0.3
        assert abs(average["conv_in.bias"][0].item() - exact(profile, times, course)) <= allowed, profile


class ModelEma:
    """The average of ultralytics' trainer, by its formula."""

    def __init__(self, model: nn.Module, decay: float, tau: float) -> None:
        self.ema = copy.deepcopy(model).eval()
        self.updates = 0
        self.decay = lambda updates: decay * (1 - math.exp(-updates / tau))

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = self.decay(self.updates)
        state = model.state_dict()
        for name, value in self.ema.state_dict().items():
            if value.dtype.is_floating_point:
                value *= decay
                value += (1 - decay) * state[name].detach()


def test_ultralytics_pickled_modules(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    ema = ModelEma(model, BETA, 40.0)
    out = tmp_path / "out"
    out.mkdir()
    for step in range(1, STEPS + 1):
        move(model, step)
        ema.update(model)
        if step % EVERY == 0:
            half = copy.deepcopy(ema.ema).half()
            saved = {"epoch": step // EVERY - 1, "model": None, "ema": half, "updates": ema.updates, "train_args": {}}
            torch.save(saved, out / f"epoch{step // EVERY - 1}.pt")
    with pytest.raises(ValueError, match="--beta 0.9999 --ramp exponential:2000"):
        import_averages(out, tmp_path / "run")
    imported = import_averages(out, tmp_path / "run", beta=BETA, ramp="exponential:40")
    assert imported.steps == tuple(range(EVERY, STEPS + 1, EVERY))
    check(tmp_path / "run", ("0.weight", "1.bias"), weights_after(model), 2e-3)


def _reconstruct(meta: dict[str, Any]) -> nn.Module:
    """Stands for `torch_utils.persistence._reconstruct_persistent_obj`, which builds a module of its source."""
    module = nn.Linear(4, 3)
    module.__dict__.update(meta["state"])
    return module


class Persistent(nn.Linear):
    """Module that is pickled as EDM2's persistent classes are: a call with the module's attributes."""

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": "", "class_name": "Net", "state": dict(self.__dict__)}
        return _reconstruct, (meta,), None


def test_edm2_s_snapshots(tmp_path: Path) -> None:
    lengths, batch = (0.05, 0.10), 0.5
    model = Persistent(4, 3)
    emas = {length: Persistent(4, 3).double() for length in lengths}
    out = tmp_path / "out"
    out.mkdir()
    time = 0.0
    while time < STEPS:
        before, time = time, time + batch
        move(model, time)
        for length, ema in emas.items():
            decay = (before / time) ** (sigma_rel_to_gamma(length) + 1)
            with torch.no_grad():
                for average, weights in zip(ema.parameters(), model.parameters(), strict=True):
                    average.lerp_(weights.double(), 1 - decay)
        if time % EVERY == 0:
            for length, ema in emas.items():
                stored = Persistent(4, 3)
                stored.load_state_dict(ema.state_dict())
                data = {"encoder": None, "dataset_kwargs": {}, "loss_fn": None, "ema": stored.half()}
                with (out / f"network-snapshot-{int(time):07d}-{length:.3f}.pkl").open("wb") as file:
                    pickle.dump(data, file)
            torch.save({"state": 1}, out / f"training-state-{int(time):07d}.pt")
    imported = import_averages(out, tmp_path / "run")
    assert imported.snapshots == 2 * STEPS // EVERY
    opened = PostHocEMA.from_path(tmp_path / "run")
    times = np.arange(1, int(STEPS / batch) + 1) * batch
    course = []
    for moment in times:
        move(model, moment)
        course.append(model.bias[0].item())
    for sigma_rel in (0.05, 0.08, 0.12):
        profile = Profile.sigma_rel(sigma_rel)
        (average,), (plan,) = opened.synthesize([profile]), opened.plan([profile])
        right = exact(profile, times, np.array(course))
        allowed = allowance(profile, times, np.array(course), plan.relative_error)
        # Halves, and the closed form, which takes updates as dense.
        allowed += 2e-3 * max(plan.noise_gain, 1.0) * abs(right) + 0.02 * batch
        assert plan.relative_error < 0.05
        assert abs(average["bias"][0].item() - right) <= allowed, (sigma_rel, average["bias"], right, allowed)


def test_an_epoch_is_not_a_step_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for epoch in (1, 2):
        torch.save({"w": torch.ones(2)}, out / f"ema_epoch{epoch}.pt")
    with pytest.raises(ValueError, match="number of an epoch"):
        import_averages(out, tmp_path / "run", beta=BETA, update_every=1)
    with pytest.raises(ValueError, match="linear"):
        import_averages(out, tmp_path / "run", beta=BETA, ramp="linear")
    assert not (tmp_path / "run").exists()
