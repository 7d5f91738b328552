"""Makes the checkpoints in this folder with the tools whose files `posthoc-ema import` reads: python make.py CASE...

Needs torch, numpy and for each case the package below, in that version. pytorch-posthoc-ema also needs pillow and
matplotlib; its two versions need an environment each.

    ramp, halves, dtypes        pytorch-posthoc-ema==1.0.10
    prefixed                    pytorch-posthoc-ema==1.0.5
    ema                         ema-pytorch==0.8.3
    nitrous, corrected          nitrous-ema==0.0.1

Each case makes a folder of INDEX.STEP.pt files, and expected.json with the tool's own results from them.
"""

import json
import math
import pathlib
import sys

import torch
from torch import nn

HERE = pathlib.Path(__file__).parent


class Ramp(nn.Module):
    """Model whose parameters, at step t of 20,000, are t/20000 of their last values."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def at(self, t):
        self.weight.data.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]) * (t / 20_000))


class Waves(nn.Module):
    """Model whose parameter i, at step t, is sin(t/100 + i). A batch norm counts its batches, one a step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.norm = nn.BatchNorm1d(2)

    def at(self, t):
        self.weight.data.copy_(torch.tensor([math.sin(t / 100 + i) for i in range(6)]).reshape(2, 3))
        self.norm.running_mean.copy_(torch.tensor([t / 1000, 1.0]))
        self.norm.num_batches_tracked.fill_(t)


class Kinds(nn.Module):
    """Model with the dtypes, scalars and strides that a state dict may hold."""

    def __init__(self):
        super().__init__()
        count = torch.arange(48, dtype=torch.float32)
        self.plain = nn.Parameter(count.reshape(6, 8).clone())
        self.transposed = nn.Parameter(count[:12].reshape(3, 4).clone().t())
        self.channels_last = nn.Parameter(count.reshape(2, 3, 4, 2).clone().to(memory_format=torch.channels_last))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.bf16 = nn.Parameter(count[:5].to(torch.bfloat16) / 8)
        self.f16 = nn.Parameter(count[:5].to(torch.float16) / 8)
        self.f64 = nn.Parameter(count[:5].to(torch.float64) / 3)
        self.register_buffer("i64", torch.tensor([[-1, 2**40]]))
        self.register_buffer("empty", torch.zeros(0, 3))

    def at(self, t):
        pass


def posthoc_ema(folder, model, steps, **options):
    from posthoc_ema import PostHocEMA

    ema = PostHocEMA.from_model(model, folder, **options)
    for t in range(1, steps + 1):
        model.at(t)
        ema.update_(model)
    return ema


def ramp(folder):
    ema = posthoc_ema(folder, Ramp(), 20_000)
    with ema.state_dict(sigma_rel=0.15) as state:
        return {"own synthesis at sigma_rel 0.15": state["weight"].tolist()}


def halves(folder):
    posthoc_ema(
        folder,
        Waves(),
        2240,
        sigma_rels=(0.1, 0.25),
        update_every=20,
        checkpoint_every=560,
        checkpoint_dtype=torch.float16,
    )


def prefixed(folder):
    posthoc_ema(folder, Waves(), 600, update_every=10, checkpoint_every=200)


def dtypes(folder):
    posthoc_ema(folder, Kinds(), 110, update_every=10, checkpoint_every=110)
    legacy = torch.load(folder / "1.110.pt", weights_only=True)
    torch.save(legacy, folder / "1.110.pt", _use_new_zipfile_serialization=False)
    return {name: tensor.flatten().tolist() for name, tensor in Kinds().state_dict().items()}


def lucid(PostHocEMA, folder, **options):
    model = Waves()
    model.at(0)
    ema = PostHocEMA(
        model,
        sigma_rels=(0.05, 0.28),
        update_every=10,
        checkpoint_every_num_steps=205,
        checkpoint_folder=folder,
        **options,
    )
    for t in range(1, 821):
        model.at(t)
        ema.update()
    return ema


def lucid_synthesis(ema, **options):
    state = ema.synthesize_ema_model(sigma_rel=0.15, **options).ema_model.state_dict()
    return {"own synthesis at sigma_rel 0.15": state["weight"].flatten().tolist()}


def ema(folder):
    from ema_pytorch import PostHocEMA

    return lucid_synthesis(lucid(PostHocEMA, folder))


def nitrous(folder, correction=False):
    from nitrous_ema import PostHocEMA

    return lucid_synthesis(lucid(PostHocEMA, folder, step_size_correction=correction), device="cpu")


def corrected(folder):
    return nitrous(folder, correction=True)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        folder = HERE / case
        folder.mkdir()
        expected = globals()[case](folder) or {}
        (folder / "expected.json").write_text(json.dumps({"torch": torch.__version__, **expected}, indent=1) + "\n")
