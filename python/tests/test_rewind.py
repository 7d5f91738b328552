"""States that are saved with the checkpoints of a training, and trainings that go back to one of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from posthoc_ema import PostHocEMA

OPTIONS: dict[str, Any] = {"update_every": 2, "update_after_step": 0, "checkpoint_every": 5, "max_checkpoints": 40}
STEPS = 60
STATE = "posthoc-ema.safetensors"


class Trainer:
    """Training that stores a checkpoint of model and optimizer every six steps, with the state of the averages."""

    def __init__(self, folder: Path, resume: bool | int = False):
        torch.manual_seed(3)
        self.folder = folder
        self.model = torch.nn.Linear(4, 3)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.step = 0
        path: bool | Path = resume if isinstance(resume, bool) else self.checkpoint(resume)
        if isinstance(path, Path):
            stored = torch.load(path / "trainer.pt")
            self.model.load_state_dict(stored["model"])
            self.optimizer.load_state_dict(stored["optimizer"])
            self.step = stored["step"]
        self.ema = PostHocEMA.from_model(self.model, folder / "ema", resume=path, **OPTIONS)
        self.ema.check_step(self.step)

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def train(self, until: int) -> None:
        while self.step < until:
            batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.step))
            self.optimizer.zero_grad()
            (self.model(batch) - batch[:, :3]).square().mean().backward()
            self.optimizer.step()
            self.step += 1
            self.ema.update_(self.model)
            if self.step % 6 == 0:
                path = self.checkpoint(self.step)
                path.mkdir(exist_ok=True)
                stored = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
                torch.save(stored, path / "trainer.pt")
                self.ema.save(path)

    def end(self) -> dict[str, bytes]:
        """Trains to the end and returns the bits of averages, live and from the snapshots."""
        self.train(STEPS)
        self.ema.finish()
        live = self.ema.synthesize([0.1, 0.25])
        self.ema.close()
        run = PostHocEMA.from_path(self.folder / "ema")
        averages = {f"{i} {name}": tensor for i, average in enumerate(live) for name, tensor in average.items()}
        for i, average in enumerate(run.synthesize([0.06, 0.2])):
            averages |= {f"run {i} {name}": tensor for name, tensor in average.items()}
        snapshots = {str(path.name): b"" for path in (self.folder / "ema").glob("*.*.safetensors")}
        return snapshots | {name: tensor.numpy().tobytes() for name, tensor in averages.items()}


def test_going_back_to_any_checkpoint_keeps_every_bit(tmp_path: Path) -> None:
    expected = Trainer(tmp_path).end()
    chance = random.Random(1)
    for step in [*chance.sample(range(6, STEPS + 1, 6), 6), 6]:
        trainer = Trainer(tmp_path, resume=step)
        assert trainer.ema.step == step
        assert trainer.end() == expected
    assert not (tmp_path / "ema" / "aside").exists()


def test_state_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.train(7)
    assert os.listdir(trainer.checkpoint(6)).count(STATE) == 1
    file = tmp_path / "state"
    for path in (file, str(file), tmp_path):
        trainer.ema.save(path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-6", "ema", STATE, "state"]
    with pytest.raises(ValueError, match="holds nothing but the run: save elsewhere"):
        trainer.ema.save(tmp_path / "ema")
    with pytest.raises(FileNotFoundError, match="missing/state"):
        trainer.ema.save(tmp_path / "missing" / "state")
    trainer.ema.close()
    for path in (file, tmp_path):
        ema = PostHocEMA.from_model(trainer.model, tmp_path / "ema", resume=path)
        assert ema.step == 7
        with pytest.raises(ValueError, match="are at step 7, and the training continues from step 6"):
            ema.check_step(6)
        ema.close()


def test_unfit_states_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 3)
    with pytest.raises(FileNotFoundError, match="missing: it does not exist: name a file"):
        PostHocEMA.from_model(model, tmp_path / "ema", resume=tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=f"neither {STATE} nor state.safetensors"):
        PostHocEMA.from_model(model, tmp_path / "ema", resume=tmp_path)
    with pytest.raises(ValueError, match="resume = ''"):
        PostHocEMA.from_model(model, tmp_path / "ema", resume="")
    with pytest.raises(TypeError):
        PostHocEMA.from_model(model, tmp_path / "ema", resume=3)  # type: ignore[arg-type]
    assert not (tmp_path / "ema").exists()
    # A trainer without a checkpoint passes None.
    PostHocEMA.from_model(model, tmp_path / "new", resume=None).close()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Trainer(tmp_path / name).train(12)
    with pytest.raises(ValueError, match="belongs to another run"):
        PostHocEMA.from_model(model, tmp_path / "a" / "ema", resume=tmp_path / "b" / "checkpoint-6")
    with pytest.raises(ValueError, match="profiles"):
        PostHocEMA.from_model(model, tmp_path / "a" / "ema", sigma_rels=[0.1], resume=tmp_path / "a" / "checkpoint-6")
    with pytest.raises(ValueError, match="tensor `0.average.weight`"):
        PostHocEMA.from_model(torch.nn.Linear(5, 3), tmp_path / "a" / "ema", resume=tmp_path / "a" / "checkpoint-6")


def test_other_ranks_count_from_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tmp_path)
    trainer.train(12)
    trainer.ema.close()
    monkeypatch.setenv("RANK", "1")
    model = torch.nn.Linear(4, 3)
    ema = PostHocEMA.from_model(model, tmp_path / "ema", resume=trainer.checkpoint(6), rank_zero_only=True)
    ema.check_step(6)
    ema.update_(model)
    ema.save(tmp_path / "nothing")
    assert ema.step == 7 and not (tmp_path / "nothing").exists()


def test_killed_trainings_that_go_back_end_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    expected = Trainer(tmp_path / "straight").end()
    folder = tmp_path / "killed"
    folder.mkdir()
    # Goes back to a random checkpoint among those that a real trainer has: none younger than its newest one.
    script = textwrap.dedent(
        """
        import random, shutil, sys
        from pathlib import Path
        from test_rewind import STEPS, STATE, Trainer

        folder, seed = Path(sys.argv[1]), int(sys.argv[2])
        newest = folder / "newest"
        limit = int(newest.read_text()) if newest.exists() else 0
        whole = [step for step in range(6, limit + 1, 6) if (folder / f"checkpoint-{step}" / STATE).exists()]
        step = random.Random(seed).choice(whole) if whole else False
        newest.write_text(str(int(step)))
        if not whole:
            shutil.rmtree(folder / "ema", ignore_errors=True)
        trainer = Trainer(folder, resume=step)
        print("ready", flush=True)
        while trainer.step < STEPS:
            trainer.train(trainer.step // 6 * 6 + 6)
            newest.write_text(str(trainer.step))
            trainer.ema.flush()
        """
    )
    chance = random.Random(int(os.environ.get("POSTHOC_EMA_SEED", "2")))
    tests = str(Path(__file__).parent)
    for seed in range(8):
        arguments = [sys.executable, "-c", script, str(folder), str(seed)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
        with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
    newest = int((folder / "newest").read_text())
    whole = [step for step in range(6, newest + 1, 6) if (folder / f"checkpoint-{step}" / STATE).exists()]
    trainer = Trainer(folder, resume=max(whole))
    assert trainer.end() == expected
