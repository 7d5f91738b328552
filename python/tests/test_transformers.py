"""The callback for the Trainer of transformers, in real trainings: steps, checkpoints, evaluations and resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EACH_STEP, RecordedWeights
from safetensors.torch import load_file

from posthoc_ema import PostHocEMA

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    # TRL and PEFT use these names.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from posthoc_ema.integrations.transformers import PostHocEMACallback  # noqa: E402


class Net(torch.nn.Module):
    """One layer, with a loss as models of transformers return it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.evaluated: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.training:
            self.evaluated.append(self.layer.weight.detach().clone())
        out = self.layer(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


class Record(TrainerCallback):
    """Records the weights after each step that changed them."""

    def __init__(self, net: Net):
        self.net = net
        self.weights = RecordedWeights(net.layer)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.weights.add()


def data(count: int = 400) -> list[dict[str, torch.Tensor]]:
    """Returns the same samples at each call."""
    return [{"x": row, "labels": row[:2]} for row in torch.randn(count, 3, generator=torch.Generator().manual_seed(1))]


def trainer(folder: Path, net: Any, *callbacks: Any, optimizers: Any = (None, None), **options: Any) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return Trainer(
        net,
        TrainingArguments(**{**defaults, **options}),
        train_dataset=data(),
        eval_dataset=data(4),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


@pytest.fixture
def net() -> Net:
    return Net()


def test_accumulation_counts_optimizer_steps(run_dir: Path, net: Net) -> None:
    record, callback = Record(net), PostHocEMACallback(run_dir, sigma_rels=[0.1, 0.2], **EACH_STEP)
    trained = trainer(run_dir.parent, net, record, callback, gradient_accumulation_steps=4, max_steps=10)
    trained.train()
    assert trained.state.global_step == callback.ema.step == 10
    record.weights.check(callback.ema, "layer.weight")
    assert callback.ema.sigma_rels == pytest.approx((0.1, 0.2))


def test_steps_that_a_scaler_skips_do_not_count(run_dir: Path, net: Net) -> None:
    class Overflow(Record):
        """Makes every third gradient infinite, and records the steps that are not skipped."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            # Mixed precision in float16 is for GPUs only; its scaler works without one.
            prepared.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            prepared.optimizer.__init__(prepared.optimizer.optimizer, scaler=prepared.accelerator.scaler)

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step % 3 != 1:
                self.weights.add()

    class Infinite(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step % 3 == 0:
                net.layer.weight.grad[0, 0] = torch.inf
            return loss

    record, callback = Overflow(net), PostHocEMACallback(run_dir, **EACH_STEP)
    prepared = trainer(run_dir.parent, net, record, callback, max_steps=9, max_grad_norm=0.0)
    prepared.__class__ = Infinite
    prepared.train()
    assert prepared.state.global_step == 9 and callback.ema.step == 6
    record.weights.check(callback.ema, "layer.weight")


def test_evaluations_have_the_average_and_checkpoints_the_own_weights(run_dir: Path, net: Net) -> None:
    folder = run_dir.parent / "out"
    own: dict[int, torch.Tensor] = {0: net.layer.weight.detach().clone()}
    averages: dict[int, torch.Tensor] = {0: own[0]}

    class Watch(Record):
        """Saves the model during the evaluations."""

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            super().on_step_end()
            own[state.global_step] = net.layer.weight.detach().clone()
            averages[state.global_step] = callback.ema.synthesize([0.1])[0]["layer.weight"]

        def on_evaluate(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            prepared.save_model(str(folder / f"during-{state.global_step}"))

    record, callback = Watch(net), PostHocEMACallback(run_dir, evaluate_with=0.1, **EACH_STEP)
    prepared = trainer(
        folder,
        net,
        callback,
        record,
        eval_strategy="steps",
        eval_steps=10,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=10,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    prepared.train()
    assert len(net.evaluated) == 5
    for seen, step in zip(net.evaluated, (0, 10, 20, 30, 40)):
        assert torch.equal(seen, averages[step])
        assert torch.equal(load_file(folder / f"during-{step}" / "model.safetensors")["layer.weight"], own[step])
    # Rotation removes the states with their folders.
    kept = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    best = prepared.state.best_global_step
    assert len(kept) == 2 and best in kept
    for step in kept:
        saved = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        assert torch.equal(saved["layer.weight"], own[step])
        assert (folder / f"checkpoint-{step}" / "posthoc-ema.safetensors").is_file()
    assert torch.equal(net.layer.weight, own[best])
    record.weights.check(callback.ema, "layer.weight")
    # The evaluations of a training are over.
    prepared.evaluate()
    assert torch.equal(net.evaluated[-1], own[best])


def test_failed_evaluation_gives_the_own_weights_back(run_dir: Path, net: Net) -> None:
    class Fail(Record):
        def on_evaluate(self, *_: Any, **__: Any) -> None:
            raise ArithmeticError("a metric failed")

    record, callback = Fail(net), PostHocEMACallback(run_dir, evaluate_with=0.1, **EACH_STEP)
    folder = run_dir.parent / "out"
    steps = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 8}
    failing = trainer(folder, net, callback, record, **steps)
    with pytest.raises(ArithmeticError, match="a metric failed"):
        failing.train()
    assert record.weights.seen[-1] == pytest.approx(net.layer.weight.detach().double().numpy(), abs=0)
    # The same objects continue from the newest checkpoint.
    failing.remove_callback(record)
    record = Record(net)
    failing.add_callback(record)
    failing.train(resume_from_checkpoint=True)
    assert callback.ema.step == 40 and len(record.weights.seen) == 35
    assert "evaluate" not in vars(failing)


TRAIN = """
import os, sys, torch, pathlib
sys.path.insert(0, {tests!r})
from test_transformers import *

class Kill(TrainerCallback):
    def on_step_end(self, args, state, *_, **__):
        if state.global_step == {kill}:
            os._exit(9)

torch.manual_seed(0)
net = Net()
folder = pathlib.Path({folder!r})
callback = PostHocEMACallback(folder / "ema", evaluate_with=0.2, **{{**EACH_STEP, "checkpoint_every": 7}})
steps = dict(save_strategy="steps", save_steps=10, eval_strategy="steps", eval_steps=10)
trainer(folder, net, callback, Kill(), **steps).train(resume_from_checkpoint={resume!r})
torch.save(net.state_dict(), folder / "end.pt")
print(callback.ema.step)
"""


def run(folder: Path, resume: int | None = None, kill: int = -1) -> None:
    """Trains 40 steps in a process of its own, from a checkpoint, until it is killed."""
    checkpoint = None if resume is None else str(folder / f"checkpoint-{resume}")
    program = TRAIN.format(tests=str(Path(__file__).parent), kill=kill, folder=str(folder), resume=checkpoint)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == (0 if kill < 0 else 9), done.stderr


def test_killed_and_rewound_trainings_have_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    run(tmp_path / "straight")
    moved = tmp_path / "moved"
    run(moved, kill=27)
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


def test_checkpoint_without_averages_is_refused(run_dir: Path, net: Net) -> None:
    folder = run_dir.parent / "out"
    trainer(folder, net, max_steps=5, save_strategy="steps", save_steps=5).train()
    with pytest.raises(ValueError, match="continues from step 5, from a checkpoint without .* pass begin_late"):
        trainer(folder, net, PostHocEMACallback(run_dir)).train(resume_from_checkpoint=True)
    record, callback = Record(net), PostHocEMACallback(run_dir, begin_late=True, **EACH_STEP)
    trainer(folder, net, record, callback, max_steps=15).train(resume_from_checkpoint=True)
    assert callback.ema.step == 10
    record.weights.check(callback.ema, "layer.weight")
    with pytest.raises(ValueError, match="continue from a checkpoint that has one"):
        trainer(folder, net, PostHocEMACallback(run_dir)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="resume: the averages resume when the trainer does"):
        PostHocEMACallback(run_dir, resume=True)


def test_state_of_another_step_is_refused(run_dir: Path, net: Net) -> None:
    folder = run_dir.parent / "out"
    steps = {"save_strategy": "steps", "save_steps": 5}
    trainer(folder, net, PostHocEMACallback(run_dir, **EACH_STEP), max_steps=10, **steps).train()
    (folder / "checkpoint-10" / "posthoc-ema.safetensors").replace(folder / "checkpoint-5" / "posthoc-ema.safetensors")
    again = trainer(folder, net, PostHocEMACallback(run_dir), max_steps=10, **steps)
    with pytest.raises(ValueError, match="are at step 10, and the training continues from step 5"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-5"))


def test_checkpoint_in_another_folder_continues(run_dir: Path, net: Net) -> None:
    folder = run_dir.parent / "out"
    record, callback = Record(net), PostHocEMACallback(run_dir, **EACH_STEP)
    trainer(folder, net, record, callback, max_steps=10, save_strategy="steps", save_steps=5).train()
    moved = (folder / "checkpoint-5").rename(run_dir.parent / "moved")
    del record.weights.seen[5:]
    callback = PostHocEMACallback(run_dir, **EACH_STEP)
    trainer(folder, net, record, callback, max_steps=10).train(resume_from_checkpoint=str(moved))
    assert callback.ema.step == 10
    record.weights.check(callback.ema, "layer.weight")


def test_optimizer_without_hooks_counts_by_the_trainer(run_dir: Path, net: Net) -> None:
    class Plain(torch.optim.SGD):
        """Calls no hooks, like the optimizers of DeepSpeed."""

        def _patch_step_function(self) -> None:
            pass

        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                parameter.data.sub_(parameter.grad, alpha=0.05)

    record, callback = Record(net), PostHocEMACallback(run_dir, **EACH_STEP)
    optimizers = (Plain(net.parameters(), lr=0.05), None)
    trainer(run_dir.parent, net, record, callback, optimizers=optimizers, max_steps=10).train()
    assert callback.ema.step == 10
    record.weights.check(callback.ema, "layer.weight")


DDP = """
import os, sys, torch, pathlib
sys.path.insert(0, {tests!r})
from test_transformers import *

folder = pathlib.Path({folder!r})
rank = int(os.environ["LOCAL_RANK"])
torch.manual_seed(0)
net = Net()
record, callback = Record(net), PostHocEMACallback(folder / "ema", evaluate_with=0.1, **EACH_STEP)
steps = dict(save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=5, max_steps=10)
trainer(folder, net, callback, record, ddp_backend="gloo", **steps).train()
assert callback.ema.step == 10
record.weights.check(callback.ema, "layer.weight")
torch.save(net.evaluated, folder / f"evaluated-{{rank}}.pt")
del record.weights.seen[5:]
again = PostHocEMACallback(folder / "ema", **EACH_STEP)
last = trainer(folder, net, again, record, ddp_backend="gloo", max_steps=12)
last.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
assert again.ema.step == 12
record.weights.check(again.ema, "layer.weight")
torch.distributed.destroy_process_group()
"""


def test_two_processes_track_one_run(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(DDP.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, other = (torch.load(tmp_path / f"evaluated-{rank}.pt") for rank in (0, 1))
    assert len(one) == 2 and all(map(torch.equal, one, other))


@pytest.mark.parametrize("adapters", [False, True])
def test_a_trainer_of_trl_counts(run_dir: Path, adapters: bool) -> None:
    peft = pytest.importorskip("peft")
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    processing = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=5, n_positions=16, n_embd=8, n_layer=1, n_head=1, eos_token_id=1, bos_token_id=1)
    )
    texts = datasets.Dataset.from_list([{"text": "one two three"}, {"text": "three two"}] * 20)
    folder = run_dir.parent / "out"
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        disable_tqdm=True,
        logging_strategy="no",
    )
    callback = PostHocEMACallback(run_dir, evaluate_with=0.1, only_save_diff=adapters, **EACH_STEP)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True) if adapters else None
    sft = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=texts,
        eval_dataset=texts.select(range(2)),
        processing_class=processing,
        callbacks=[callback],
        peft_config=lora,
    )
    trained = ".lora_A.default" if adapters else ".wte"
    ((name, layer),) = [(name, part) for name, part in sft.model.named_modules() if name.endswith(trained)]
    weights = RecordedWeights(layer)

    class Add(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            weights.add()

    sft.add_callback(Add())
    sft.train()
    assert callback.ema.step == 6
    weights.check(callback.ema, f"{name}.weight")
    assert (folder / "checkpoint-3" / "posthoc-ema.safetensors").is_file()
    assert json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
