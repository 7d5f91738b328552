"""Averages attached to an Accelerator, in real trainings: steps, checkpoints, kills and resumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EACH_STEP, RecordedWeights

from posthoc_ema import PostHocEMA

pytest.importorskip("accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import ProjectConfiguration  # noqa: E402

from posthoc_ema.integrations.accelerate import attach  # noqa: E402


class Training:
    """A training loop with accelerate, as its users write it.

    Args:
        folder: Folder of the run and the checkpoints.
        options: Options of the accelerator.
    """

    def __init__(self, folder: Path, *, resume: bool = False, optimizer: Any = torch.optim.SGD, **options: Any):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, **options)
        net = torch.nn.Linear(3, 2)
        rows = torch.randn(400, 3, generator=torch.Generator().manual_seed(1))
        batches = torch.utils.data.DataLoader(rows, batch_size=4)
        self.net, self.optimizer, self.batches = self.accelerator.prepare(
            net, optimizer(net.parameters(), lr=0.05), batches
        )
        schedule = {**EACH_STEP, "checkpoint_every": 7}
        self.ema = PostHocEMA.from_model(self.net, folder / "ema", resume=resume, rank_zero_only=True, **schedule)
        self.handle = attach(self.accelerator, self.ema, self.net, self.optimizer)
        self.recorded = RecordedWeights(net)

    def train(self, count: int, spoil: int = 0) -> None:
        """Trains some batches; the gradient of each `spoil`th is infinite."""
        for index, batch in zip(range(1, count + 1), self.batches):
            with self.accelerator.accumulate(self.net):
                self.accelerator.backward(self.net(batch).square().mean())
                if spoil and index % spoil == 0:
                    self.accelerator.unwrap_model(self.net).weight.grad[0, 0] = torch.inf
                self.optimizer.step()
                if self.accelerator.sync_gradients and not self.optimizer.step_was_skipped:
                    self.recorded.add()
                self.optimizer.zero_grad()


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    training = Training(tmp_path, gradient_accumulation_steps=4)
    training.train(40)
    assert training.ema.step == 10
    training.recorded.check(training.ema)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_skips_do_not_count(tmp_path: Path, fused: bool) -> None:
    def optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(*args, fused=fused, **kwargs)

    training = Training(tmp_path, optimizer=optimizer)
    # Mixed precision in float16 is for GPUs only; its scaler works without one.
    scaler = training.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    training.optimizer.__init__(training.optimizer.optimizer, scaler=scaler)
    seen = training.recorded.seen
    for batch in range(9):
        before = training.net.weight.detach().clone()
        training.train(1, spoil=int(batch % 3 == 0))
        # Accelerate does not notice that a fused optimizer has skipped its step.
        if torch.equal(before, training.net.weight) and fused:
            seen.pop()
    assert training.ema.step == 6
    training.recorded.check(training.ema)


def test_checkpoints_hold_the_averages(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for _ in range(3):
        training.train(10)
        training.accelerator.save_state(tmp_path / f"step-{training.ema.step}")
    assert [p.name for p in sorted(tmp_path.glob("step-*/posthoc-ema.safetensors"))] == ["posthoc-ema.safetensors"] * 3
    end = training.ema.synthesize([0.1])[0]["weight"]
    # Back to a checkpoint and on again, more than once, with the same object.
    for step in (20, 10, 20):
        training.accelerator.load_state(tmp_path / f"step-{step}")
        assert training.ema.step == training.ema.last_update == step
        del training.recorded.seen[step:]
        training.recorded.check(training.ema)
        for _ in range((30 - step) // 10):
            training.train(10)
            training.accelerator.save_state(tmp_path / f"step-{training.ema.step}")
        training.recorded.check(training.ema)
        assert torch.equal(training.ema.synthesize([0.1])[0]["weight"], end)


def test_rotation_removes_the_states(tmp_path: Path) -> None:
    configuration = ProjectConfiguration(str(tmp_path / "project"), automatic_checkpoint_naming=True, total_limit=2)
    training = Training(tmp_path, project_config=configuration)
    for _ in range(4):
        training.train(5)
        training.accelerator.save_state()
    kept = sorted(path.parent.name for path in tmp_path.rglob("posthoc-ema.safetensors"))
    assert kept == ["checkpoint_2", "checkpoint_3"]
    training.train(3)
    training.accelerator.load_state()
    assert training.ema.step == 20


def test_average_is_not_saved_as_the_model(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.train(5)
    with training.ema.model(training.net, 0.1), pytest.raises(RuntimeError, match="the model holds an average"):
        training.accelerator.save_state(tmp_path / "state")
    training.accelerator.save_state(tmp_path / "state")


def test_checkpoint_without_averages_is_refused(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.handle.remove()
    training.accelerator.save_state(tmp_path / "plain")
    assert not (tmp_path / "plain" / "posthoc-ema.safetensors").exists()
    with attach(training.accelerator, training.ema, training.net, training.optimizer):
        with pytest.raises(FileNotFoundError, match="holds no state of the averages in .*ema: load one that was"):
            training.accelerator.load_state(tmp_path / "plain")
        training.train(3)
    training.train(3)
    assert training.ema.step == 3


TRAIN = """
import os, sys, pathlib
sys.path.insert(0, {tests!r})
from test_accelerate import *

folder = pathlib.Path({folder!r})
training = Training(folder, resume=True)
if {resume} > 0:
    training.accelerator.load_state(folder / "step-{resume}")
while training.ema.step < 40:
    training.train(1)
    if training.ema.step % 10 == 0:
        training.accelerator.save_state(folder / f"step-{{training.ema.step}}")
    if training.ema.step == {kill}:
        os._exit(9)
training.ema.finish()
torch.save(training.net.state_dict(), folder / "end.pt")
"""


def run(folder: Path, resume: int = 0, kill: int = -1) -> None:
    """Trains to step 40 in a process of its own, from a checkpoint, until it is killed."""
    program = TRAIN.format(tests=str(Path(__file__).parent), kill=kill, folder=str(folder), resume=resume)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if kill < 0 else 9), done.stderr


def test_killed_and_rewound_trainings_have_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    moved = tmp_path / "moved"
    run(moved, kill=27)
    run(moved, resume=20, kill=38)
    run(moved, resume=10)
    one, other = (PostHocEMA.from_path(tmp_path / name / "ema") for name in ("straight", "moved"))
    names = [
        sorted(p.name for p in (tmp_path / name / "ema").glob("*.*.safetensors")) for name in ("straight", "moved")
    ]
    assert names[0] == names[1] and len(names[0]) >= 12
    ends = [torch.load(tmp_path / name / "end.pt") for name in ("straight", "moved")]
    assert torch.equal(ends[0]["weight"], ends[1]["weight"])
    assert one.step == other.step == 40
    for a, b in zip(one.synthesize([0.05, 0.1, 0.28]), other.synthesize([0.05, 0.1, 0.28])):
        assert all(torch.equal(a[key], b[key]) for key in a)


DDP = """
import os, sys, pathlib
sys.path.insert(0, {tests!r})
from test_accelerate import *

folder = pathlib.Path({folder!r})
training = Training(folder, gradient_accumulation_steps=2)
assert training.accelerator.num_processes == 2
training.train(10)
training.accelerator.save_state(folder / "state")
training.train(10)
assert training.ema.step == 10
training.accelerator.load_state(folder / "state")
assert training.ema.step == 5
del training.recorded.seen[5:]
training.train(10)
assert training.ema.step == 10
training.recorded.check(training.ema, "module.weight")
training.accelerator.end_training()
"""


def test_two_processes_track_one_run(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(DDP.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "state" / "posthoc-ema.safetensors").is_file()
