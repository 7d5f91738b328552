"""The callback for Lightning, in real trainings: steps, checkpoints, evaluations, failures and resumes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EACH_STEP, RecordedWeights

from posthoc_ema import PostHocEMA

pytest.importorskip("lightning.pytorch")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]

import lightning.pytorch as pl  # noqa: E402
from lightning.fabric import Fabric  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.core.optimizer import LightningOptimizer  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from posthoc_ema.integrations.lightning import PostHocEMACallback  # noqa: E402


def batches(count: int = 10) -> torch.utils.data.DataLoader:
    """Returns the same batches at each call."""
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(count * 4, 3, generator=generator), batch_size=4)


def net_of(module_class: type) -> type:
    """Returns a module to train, for the given package."""

    class Net(module_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            self.recorded = RecordedWeights(self.layer)
            self.validated: list[torch.Tensor] = []

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            if index == 0:
                self.validated.append(self.layer.weight.clone())
            self.log("loss", self.layer(batch).square().mean(), batch_size=4)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            before = self.layer.weight.detach().clone()
            super().optimizer_step(*args, **kwargs)
            if not torch.equal(before, self.layer.weight):
                self.recorded.add()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)

    return Net


def trainer(folder: Path, *callbacks: Any, package: Any = pl, **options: Any) -> Any:
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
        "default_root_dir": folder,
    }
    return package.Trainer(callbacks=list(callbacks), **{**defaults, **options})


@pytest.fixture
def net() -> Any:
    return net_of(pl.LightningModule)()


def weights(checkpoint: Path) -> torch.Tensor:
    return torch.load(checkpoint, weights_only=True)["state_dict"]["layer.weight"]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_accumulation_counts_optimizer_steps(run_dir: Path, package: str) -> None:
    library = pytest.importorskip(package)
    net = net_of(library.LightningModule)()
    callback = PostHocEMACallback(run_dir, sigma_rels=[0.1, 0.2], **EACH_STEP)
    trained = trainer(run_dir.parent, callback, package=library, accumulate_grad_batches=4, max_epochs=3)
    trained.fit(net, batches(12))
    assert trained.global_step == callback.ema.step == 9
    net.recorded.check(callback.ema, "layer.weight")
    assert callback.ema.sigma_rels == pytest.approx((0.1, 0.2))


def test_steps_that_a_scaler_skips_do_not_count(run_dir: Path, net: Any) -> None:
    class Overflow(Callback):
        """Makes every third gradient infinite."""

        def on_after_backward(self, trainer: Any, module: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_idx % 3 == 0:
                module.layer.weight.grad[0, 0] = torch.inf

    callback = PostHocEMACallback(run_dir, **EACH_STEP)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(run_dir.parent, callback, Overflow(), plugins=[plugin]).fit(net, batches(9))
    assert callback.ema.step == 6
    net.recorded.check(callback.ema, "layer.weight")


def test_validations_have_the_average_and_checkpoints_the_own_weights(run_dir: Path, net: Any) -> None:
    folder = run_dir.parent / "saved"
    own: list[torch.Tensor] = []
    averages: list[torch.Tensor] = []

    class Watch(Callback):
        """Saves checkpoints during the validations."""

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            own.append(module.layer.weight.detach().clone())
            averages.append(callback.ema.synthesize([0.1])[0]["layer.weight"])

        def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(folder / f"whole-{trainer.global_step}.ckpt")
                trainer.save_checkpoint(folder / f"weights-{trainer.global_step}.ckpt", weights_only=True)
                module.validated.append(module.layer.weight.clone())

    callback = PostHocEMACallback(run_dir, evaluate_with=0.1, **EACH_STEP)
    best = ModelCheckpoint(folder, monitor="loss", save_top_k=-1, save_last=True, filename="{step}")
    fitted = trainer(run_dir.parent, Watch(), callback, best, max_epochs=2, val_check_interval=5)
    first = net.layer.weight.detach().clone()
    fitted.fit(net, batches(), batches(1))
    # The check before the training has no average yet.
    assert torch.equal(net.validated[0], first)
    assert len(net.validated) == 9
    for i, step in enumerate((5, 10, 15, 20)):
        for validated in net.validated[1 + 2 * i : 3 + 2 * i]:
            assert torch.equal(validated, averages[step - 1]) and not torch.equal(validated, own[step - 1])
        for name in (f"whole-{step}", f"weights-{step}", f"step={step}"):
            assert torch.equal(weights(folder / f"{name}.ckpt"), own[step - 1]), name
    assert torch.equal(weights(folder / "last.ckpt"), own[-1])
    assert torch.equal(net.layer.weight, own[-1]) and net.training and net.layer.training
    net.recorded.check(callback.ema, "layer.weight")
    assert "save_checkpoint" not in vars(fitted)


def test_own_weights_are_validated_by_default(run_dir: Path, net: Any) -> None:
    callback = PostHocEMACallback(run_dir, **EACH_STEP)
    fitted = trainer(run_dir.parent, callback)
    fitted.fit(net, batches(), batches(1))
    assert torch.equal(net.validated[-1], net.layer.weight)
    # An evaluation outside a training has the weights that its caller chose.
    callback.evaluate_with = 0.1
    fitted.validate(net, batches(1), verbose=False)
    assert torch.equal(net.validated[-1], net.layer.weight)
    with callback.ema.model(net, 0.1):
        average = net.layer.weight.detach().clone()
        fitted.validate(net, batches(1), verbose=False)
    assert torch.equal(net.validated[-1], average) and not torch.equal(average, net.layer.weight)


def test_checkpoint_of_a_failed_validation_has_the_own_weights(run_dir: Path, net: Any) -> None:
    class Fail(Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step > 0:
                raise ArithmeticError("a metric failed")

    folder = run_dir.parent / "saved"
    callback = PostHocEMACallback(run_dir, evaluate_with=0.1, **EACH_STEP)
    saved = ModelCheckpoint(folder, save_on_exception=True, filename="last")
    with pytest.raises(ArithmeticError, match="a metric failed"):
        trainer(run_dir.parent, Fail(), callback, saved).fit(net, batches(), batches(1))
    (file,) = folder.glob("*.ckpt")
    assert torch.equal(weights(file), net.layer.weight)
    assert weights(file).double().numpy() == pytest.approx(net.recorded.seen[-1], abs=0)
    # The run is free, and continues from that checkpoint.
    other = net_of(pl.LightningModule)()
    other.recorded.seen = net.recorded.seen
    callback = PostHocEMACallback(run_dir, **EACH_STEP)
    trainer(run_dir.parent, callback, max_epochs=2).fit(other, batches(), ckpt_path=file)
    other.recorded.check(callback.ema, "layer.weight")


TRAIN = """
import os, sys, torch, pathlib
sys.path.insert(0, {tests!r})
from test_lightning import *

class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == {kill}:
            os._exit(9)

torch.manual_seed(0)
net = net_of(pl.LightningModule)()
folder = pathlib.Path({folder!r})
callback = PostHocEMACallback(folder / "ema", evaluate_with=0.2, **{{**EACH_STEP, "checkpoint_every": 7}})
saved = ModelCheckpoint(folder / "saved", every_n_train_steps=10, save_top_k=-1, filename="{{step}}")
trainer(folder, callback, saved, Kill(), max_epochs=4).fit(net, batches(), batches(1), ckpt_path={resume!r})
torch.save(net.state_dict(), folder / "end.pt")
"""


def run(folder: Path, resume: int | None = None, kill: int = -1) -> None:
    """Trains 40 steps in a process of its own, from a checkpoint, until it is killed."""
    checkpoint = None if resume is None else str(folder / "saved" / f"step={resume}.ckpt")
    program = TRAIN.format(tests=str(Path(__file__).parent), kill=kill, folder=str(folder), resume=checkpoint)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if kill < 0 else 9), done.stderr


def test_killed_and_rewound_trainings_have_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    moved = tmp_path / "moved"
    run(moved, kill=27)
    # Snapshots after the checkpoint that the training goes back to: the newest may still have been on its way.
    assert 20 < PostHocEMA.from_path(moved / "ema").step <= 27
    # Killed at 27, continued from 20, killed at 38, taken back to 10.
    run(moved, resume=20, kill=38)
    run(moved, resume=10)
    one, other = (PostHocEMA.from_path(tmp_path / name / "ema") for name in ("straight", "moved"))
    names = [
        sorted(p.name for p in (tmp_path / name / "ema").glob("*.*.safetensors")) for name in ("straight", "moved")
    ]
    assert names[0] == names[1] and len(names[0]) >= 12
    ends = [torch.load(tmp_path / name / "end.pt") for name in ("straight", "moved")]
    assert torch.equal(ends[0]["layer.weight"], ends[1]["layer.weight"])
    assert one.step == other.step == 40
    for a, b in zip(one.synthesize([0.05, 0.1, 0.28]), other.synthesize([0.05, 0.1, 0.28])):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not list(tmp_path.glob("*/.posthoc-ema-*"))


def test_checkpoint_after_the_training_continues(run_dir: Path, net: Any) -> None:
    callback = PostHocEMACallback(run_dir, **EACH_STEP)
    fitted = trainer(run_dir.parent, callback)
    fitted.fit(net, batches())
    fitted.save_checkpoint(run_dir.parent / "end.ckpt")
    # The same trainer continues without a checkpoint.
    fitted.fit_loop.max_epochs = 2
    fitted.fit(net, batches())
    assert callback.ema.step == 20
    net.recorded.check(callback.ema, "layer.weight")
    del net.recorded.seen[10:]
    callback = PostHocEMACallback(run_dir, **EACH_STEP)
    trainer(run_dir.parent, callback, max_epochs=3).fit(net, batches(), ckpt_path=run_dir.parent / "end.ckpt")
    assert callback.ema.step == 30
    net.recorded.check(callback.ema, "layer.weight")


def test_run_of_another_training_is_refused(run_dir: Path, net: Any) -> None:
    trainer(run_dir.parent, PostHocEMACallback(run_dir, **EACH_STEP)).fit(net, batches())
    callback = PostHocEMACallback(run_dir, **EACH_STEP)
    with pytest.raises(ValueError, match="already contains checkpoints"):
        trainer(run_dir.parent, callback).fit(net, batches())
    with pytest.raises(ValueError, match="resume: the averages resume when the trainer does"):
        PostHocEMACallback(run_dir, resume=True)


def test_checkpoint_without_averages_is_refused(run_dir: Path, net: Any) -> None:
    plain = trainer(run_dir.parent)
    plain.fit(net, batches())
    plain.save_checkpoint(run_dir.parent / "plain.ckpt")
    late: dict[str, Any] = {"ckpt_path": run_dir.parent / "plain.ckpt"}
    with pytest.raises(ValueError, match="continues from step 10, from a checkpoint without .* pass begin_late"):
        trainer(run_dir.parent, PostHocEMACallback(run_dir), max_epochs=2).fit(net, batches(), **late)
    net.recorded.seen.clear()
    callback = PostHocEMACallback(run_dir, begin_late=True, **EACH_STEP)
    fitted = trainer(run_dir.parent, callback, max_epochs=2)
    fitted.fit(net, batches(), **late)
    assert callback.ema.step == 10
    net.recorded.check(callback.ema, "layer.weight")
    with pytest.raises(ValueError, match="continue from a checkpoint that has one"):
        trainer(run_dir.parent, PostHocEMACallback(run_dir), max_epochs=2).fit(net, batches(), **late)
    # A checkpoint of the run that began late continues, with the option.
    fitted.save_checkpoint(run_dir.parent / "late.ckpt")
    callback = PostHocEMACallback(run_dir, begin_late=True, **EACH_STEP)
    trainer(run_dir.parent, callback, max_epochs=3).fit(net, batches(), ckpt_path=run_dir.parent / "late.ckpt")
    assert callback.ema.step == 20


def test_one_of_several_optimizers_counts(run_dir: Path) -> None:
    class Adversaries(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
            self.recorded = RecordedWeights(self.generator)

        def training_step(self, batch: torch.Tensor, index: int) -> None:
            critic, generator = self.optimizers()
            self.manual_backward(self.critic(batch).square().mean())
            critic.step()
            if index % 2:
                self.manual_backward(self.generator(batch).square().mean())
                generator.step()
                self.recorded.add()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(m.parameters(), lr=0.05) for m in (self.critic, self.generator)]

    net = Adversaries()
    with pytest.raises(ValueError, match="has 2 optimizers .0: SGD, 1: SGD.: name the one whose steps count"):
        trainer(run_dir.parent, PostHocEMACallback(run_dir)).fit(net, batches())
    net.recorded.seen.clear()
    callback = PostHocEMACallback(run_dir, optimizer=1, **EACH_STEP)
    trainer(run_dir.parent, callback).fit(net, batches())
    assert callback.ema.step == 5
    net.recorded.check(callback.ema, "generator.weight")


def test_wrapped_optimizers_are_looked_through(run_dir: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    layer = torch.nn.Linear(3, 2)
    recorded = RecordedWeights(layer)
    net, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), lr=0.05))
    ema = PostHocEMA.from_model(layer, run_dir, **EACH_STEP)
    wrapped = LightningOptimizer(optimizer.optimizer)
    assert type(optimizer) is not torch.optim.SGD and type(wrapped) is not torch.optim.SGD
    with ema.attach(optimizer, layer):
        for batch in batches(5):
            fabric.backward(net(batch).square().mean())
            optimizer.step()
            recorded.add()
    with ema.attach(wrapped, layer):
        optimizer.step()
        recorded.add()
    recorded.check(ema)


def test_fast_dev_run_tracks_nothing(run_dir: Path, net: Any) -> None:
    callback = PostHocEMACallback(run_dir, evaluate_with=0.1)
    trainer(run_dir.parent, callback, fast_dev_run=3).fit(net, batches(), batches(1))
    assert callback.ema is None and not run_dir.exists()


DDP = """
import os, sys, torch, pathlib
sys.path.insert(0, {tests!r})
from test_lightning import *

folder = pathlib.Path({folder!r})
rank = int(os.environ["LOCAL_RANK"])
torch.manual_seed(0)
net = net_of(pl.LightningModule)()
callback = PostHocEMACallback(folder / "ema", evaluate_with=0.1, **EACH_STEP)
saved = ModelCheckpoint(folder / "saved", save_top_k=-1, filename="{{step}}")
with_all = dict(devices=2, strategy="ddp", max_epochs=2, use_distributed_sampler=True)
trainer(folder, callback, saved, **with_all).fit(net, batches(), batches(2))
assert callback.ema.step == 10
net.recorded.check(callback.ema, "layer.weight")
torch.save(net.validated, folder / f"validated-{{rank}}.pt")

# Taken back to the end of the first epoch.
del net.recorded.seen[5:]
again = PostHocEMACallback(folder / "ema", **EACH_STEP)
trainer(folder, again, **with_all).fit(net, batches(), ckpt_path=folder / "saved" / "step=5.ckpt")
assert again.ema.step == 10
net.recorded.check(again.ema, "layer.weight")
"""


def test_two_processes_track_one_run(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(DDP.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, other = (torch.load(tmp_path / f"validated-{rank}.pt") for rank in (0, 1))
    assert len(one) == 3 and all(map(torch.equal, one, other))


def test_neither_package_is_imported_by_the_other(tmp_path: Path) -> None:
    program = "import {}, sys, posthoc_ema.integrations.lightning; print('{}' in sys.modules)"
    for used, other in (("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")):
        command = [sys.executable, "-c", program.format(used, other)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        assert done.stdout.strip() == "False"
        assert issubclass(PostHocEMACallback, importlib.import_module("lightning.pytorch").Callback)
