"""Trains a small diffusion model as the scripts of diffusers do, with one changed import.

    python python/examples/diffusers_unet.py --out unet
    python python/examples/diffusers_unet.py --out unet --resume_from_checkpoint latest

The script follows `examples/unconditional_image_generation/train_unconditional.py` of diffusers (Apache 2.0), with
accelerate, hooks for checkpoints, and evaluation with the average between `store` and `restore`. Only the import of
`EMAModel`, its argument `posthoc` and the last part, which makes averages of several lengths, are not from there. It
needs diffusers and accelerate.

The digits are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, UCI,
doi:10.24432/C50P49, CC BY 4.0).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler, UNet2DModel

from posthoc_ema.integrations.diffusers import EMAModel

DATA = Path(__file__).resolve().parents[2] / "candle" / "examples" / "digits" / "digits.csv.gz"
SIGMA_RELS = (0.05, 0.10, 0.20)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and results")
    parser.add_argument("--max_train_steps", type=int, default=200)
    parser.add_argument("--checkpointing_steps", type=int, default=50)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--resume_from_checkpoint", help="a folder in `--out`, or `latest`")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def images() -> torch.Tensor:
    """Returns the digits: `(1797, 1, 8, 8)`, in [-1, 1]."""
    rows = np.loadtxt(DATA, delimiter=",", dtype=np.int64)[:, :64]
    return torch.from_numpy(rows).float().reshape(-1, 1, 8, 8) / 8.0 - 1.0


def new_model() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )


def loss_of(model: UNet2DModel, scheduler: DDPMScheduler, batch: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Returns the mean squared error of the predicted noise."""
    noise = torch.randn(batch.shape, generator=random)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(batch),), generator=random)
    return F.mse_loss(model(scheduler.add_noise(batch, noise, timesteps), timesteps).sample, noise)


def register_hooks(accelerator: Accelerator, ema_model: EMAModel) -> None:
    """Makes `save_state` and `load_state` of accelerate use folders of diffusers."""

    def save_model_hook(models, weights, output_dir):
        if accelerator.is_main_process:
            ema_model.save_pretrained(Path(output_dir, "unet_ema"))
            for model in models:
                model.save_pretrained(Path(output_dir, "unet"))
                # The model is saved: accelerate must not save it once more.
                weights.pop()

    def load_model_hook(models, input_dir):
        load_model = EMAModel.from_pretrained(Path(input_dir, "unet_ema"), UNet2DModel)
        ema_model.load_state_dict(load_model.state_dict())
        ema_model.to(accelerator.device)
        del load_model
        for _ in range(len(models)):
            model = models.pop()
            load_model = UNet2DModel.from_pretrained(Path(input_dir, "unet"))
            model.register_to_config(**load_model.config)
            model.load_state_dict(load_model.state_dict())
            del load_model

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)


def resume(accelerator: Accelerator, args: argparse.Namespace) -> int:
    """Loads a checkpoint if one is asked for, and returns the step to continue from."""
    if not args.resume_from_checkpoint:
        return 0
    folder = Path(args.resume_from_checkpoint).name
    if folder == "latest":
        folder = max((p.name for p in args.out.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
    accelerator.print(f"Resuming from checkpoint {folder}")
    accelerator.load_state(str(args.out / folder))
    return int(folder.split("-")[1])


def evaluate(unet: UNet2DModel, scheduler: DDPMScheduler, held_out: torch.Tensor) -> float:
    """Returns the loss on held-out images."""
    unet.eval()
    with torch.no_grad():
        return loss_of(unet, scheduler, held_out, torch.Generator().manual_seed(1)).item()


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
    data = images()
    train, held_out = data[:1500], data[1500:]
    model = new_model()
    ema_model = EMAModel(
        model.parameters(),
        decay=0.99,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=3 / 4,
        model_cls=UNet2DModel,
        model_config=model.config,
        # This training is short. The class of diffusers has no such argument, and would ignore it.
        posthoc={"update_every": 1},
    )
    register_hooks(accelerator, ema_model)
    scheduler = DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema_model.to(accelerator.device)
    global_step = resume(accelerator, args)
    micro_step = global_step * args.gradient_accumulation_steps
    while global_step < args.max_train_steps:
        # Data and noise of a batch depend on its number only, so that a resumed training sees the same ones.
        random = torch.Generator().manual_seed(args.seed + micro_step)
        batch = train[torch.randint(len(train), (args.train_batch_size,), generator=random)]
        micro_step += 1
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, scheduler, batch, random))
            optimizer.step()
            optimizer.zero_grad()

        # Checks if the accelerator has performed an optimization step behind the scenes
        if accelerator.sync_gradients:
            ema_model.step(model.parameters())
            global_step += 1
            if global_step % args.checkpointing_steps == 0 and accelerator.is_main_process:
                accelerator.save_state(str(args.out / f"checkpoint-{global_step}"))

    unet = accelerator.unwrap_model(model)
    accelerator.print(f"loss of the last weights: {evaluate(unet, scheduler, held_out):.5f}")
    ema_model.store(unet.parameters())
    ema_model.copy_to(unet.parameters())
    accelerator.print(f"loss of the average with decay {ema_model.decay}: {evaluate(unet, scheduler, held_out):.5f}")
    unet.save_pretrained(args.out / "unet")
    ema_model.restore(unet.parameters())

    # The part that is new: averages of other lengths, from the same training.
    for sigma_rel in SIGMA_RELS if hasattr(ema_model, "posthoc") else ():
        with ema_model.posthoc.model(unet, sigma_rel) as averaged:
            loss = evaluate(unet, scheduler, held_out)
            accelerator.print(f"loss of the average with sigma_rel {sigma_rel}: {loss:.5f}")
            averaged.save_pretrained(args.out / f"unet-{sigma_rel}")


if __name__ == "__main__":
    main()
