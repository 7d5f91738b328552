"""Averages in a training with the Trainer of transformers: one callback in the training, every length afterwards.

Trains a small vision transformer that reads handwritten digits; examples/digits.py says where they come from.

pip install 'transformers[torch]'
python python/examples/classify_transformers.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from posthoc_ema import PostHocEMA
from posthoc_ema.integrations.transformers import PostHocEMACallback

DATA = Path(__file__).resolve().parents[2] / "candle" / "examples" / "digits" / "digits.csv.gz"


def digits() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Returns the digits to train with, and those to evaluate with."""
    rows = torch.from_numpy(np.loadtxt(DATA, delimiter=",", dtype=np.int64))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    images, labels = rows[:, :64].float().view(-1, 1, 8, 8) / 8 - 1, rows[:, 64]
    samples = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels)]
    return samples[:1400], samples[1400:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("classify-transformers"), help="folder of the run; must be new"
    )
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, held_out = digits()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))

    # The evaluations are made with the average of length 0.1; the folders checkpoint-N hold the model's own weights,
    # and all that the averages need to continue from them: trainer.train(resume_from_checkpoint=True).
    averages = PostHocEMACallback(
        arguments.out / "ema",
        evaluate_with=0.1,
        update_every=2,
        update_after_step=10,
        checkpoint_every=arguments.steps // 20,
    )
    every = arguments.steps // 4
    schedule = {"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every}
    trainer = Trainer(
        model,
        TrainingArguments(
            str(arguments.out / "trainer"),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            save_total_limit=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **schedule,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[averages],
    )
    trainer.train()

    def loss(_: ViTForImageClassification) -> float:
        return float(trainer.evaluate()["eval_loss"])

    print(f"last weights: {loss(model):.4f}")
    run = PostHocEMA.from_path(arguments.out / "ema")
    swept = run.sweep(loss, sigma_rels=[0.05, 0.1, 0.15, 0.2, 0.25], model=model, refine=2, progress=False)
    print(f"best average, {swept.best.profile}: {swept.best.score:.4f}")
    with run.model(model, swept.best.profile) as averaged:
        averaged.save_pretrained(arguments.out / "averaged")


if __name__ == "__main__":
    main()
