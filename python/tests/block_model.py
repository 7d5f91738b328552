"""Model with parts of every kind, and all that a block must give back of it."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import bits, shake, train

from posthoc_ema import PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 10}


class Net(torch.nn.Module):
    """Model with tied weights, batch normalisation, a recurrent part, buffers of all kinds and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.recurrent = torch.nn.LSTM(4, 4, batch_first=True)
        self.norm = torch.nn.BatchNorm1d(4)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.lone = torch.nn.Linear(4, 4)
        self.output = torch.nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("cache", torch.ones(4), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.recurrent(self.embedding(tokens) + self.table)
        hidden = self.norm(self.lone(self.frozen(hidden)).transpose(1, 2)).transpose(1, 2)
        return self.output(self.dropout(hidden * self.cache))


TOKENS = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(0))


def trained(run_dir: Path, model: torch.nn.Module | None = None) -> tuple[PostHocEMA, torch.nn.Module]:
    model = Net() if model is None else model
    left_out = ["lone.*"] if isinstance(model, Net) else None
    ema = PostHocEMA.from_model(model, run_dir, leave_out=left_out, **OPTIONS)
    if isinstance(model, Net):
        # Gradients, one of them absent, and a mixture of modes.
        model(TOKENS).square().sum().backward()
        model.norm.bias.grad = None
        model.dropout.eval()
    train(ema, model, 20)
    return ema, model


def everything(model: torch.nn.Module) -> dict[str, object]:
    """Returns all that a block must give back: bits, identities, places, flags, modes, gradients and versions."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    facts = {
        name: (id(t), t.data_ptr(), t.stride(), t.dtype, t.device, t.requires_grad, t.is_leaf, id(t.grad))
        for name, t in tensors
    }
    gradients = {name: t.grad.clone().numpy().tobytes() for name, t in tensors if t.grad is not None}
    modules = [
        (name, id(part), type(part), part.training, len(part._forward_hooks)) for name, part in model.named_modules()
    ]
    hidden = [name for part in model.modules() for name, value in part.__dict__.items() if torch.is_tensor(value)]
    return {"bits": bits(model), "facts": facts, "gradients": gradients, "modules": modules, "hidden": hidden}


def check_works(ema: PostHocEMA, model: torch.nn.Module) -> None:
    """Checks that model and averages can still be used."""
    model(TOKENS).sum().backward()
    step = ema.step
    shake(model)
    ema.update_(model)
    assert ema.step == step + 1
    with ema.model(model, 0.1):
        assert not model.training
