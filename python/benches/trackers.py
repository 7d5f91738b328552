"""The same two running averages by posthoc-ema, pytorch-posthoc-ema, ema-pytorch, and PyTorch's own foreach functions.

Each tracker says with which decay it updates, so that its averages can be checked against a recurrence in f64: the
packages differ in what they count as the time of an update.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import posthoc_ema
from posthoc_ema.utils import sigma_rel_to_gamma

SIGMA_RELS = (0.05, 0.28)
GAMMAS = tuple(sigma_rel_to_gamma(sigma_rel) for sigma_rel in SIGMA_RELS)
# Elements of each tensor that are checked.
WINDOW = 1000
# Never due.
NEVER = 2**40


class Tracker(Protocol):
    """Two averages of a model."""

    name: str
    # By how much an average in [-1, 1] may differ from one in f64.
    tolerance: float

    def update(self) -> None:
        """To be called after each step of training."""

    def averages(self) -> list[dict[str, torch.Tensor]]:
        """The beginning of each tensor of both averages, by name."""

    def decay(self, update: int, gamma: float) -> float:
        """What the average keeps of itself at an update, counted from 1; the first one copies the parameters."""


class PosthocEma:
    """This package, the averages beside the parameters or on the host."""

    tolerance = 2e-6

    def __init__(self, model: nn.Module, directory: Path, update_every: int, device: str, compensated: bool = True):
        self.name = "posthoc-ema" if device == "cpu" else "posthoc-ema, averages on the device"
        if device == "cpu" and next(model.parameters()).is_cuda:
            self.name = "posthoc-ema, averages on the host"
        if not compensated:
            self.name += ", uncompensated as the others"
        self.model = model
        self.ema = posthoc_ema.PostHocEMA.from_model(
            model,
            directory,
            sigma_rels=SIGMA_RELS,
            update_every=update_every,
            checkpoint_every=NEVER,
            update_after_step=0,
            device=device,
            compensated=compensated,
        )

    def update(self) -> None:
        self.ema.update_(self.model)

    def averages(self) -> list[dict[str, torch.Tensor]]:
        return [windows(average) for average in self.ema.synthesize(SIGMA_RELS, dtype=torch.float32)]

    def decay(self, update: int, gamma: float) -> float:
        return ((update - 1) / update) ** (gamma + 1)


class PytorchPosthocEma:
    """pytorch-posthoc-ema: averages in the parameters' dtype, on the host."""

    name = "pytorch-posthoc-ema"

    def __init__(self, package: Any, model: nn.Module, directory: Path, update_every: int):
        self.tolerance = own_tolerance(model)
        self.model = model
        self.ema = package.PostHocEMA.from_model(
            model,
            directory,
            sigma_rels=SIGMA_RELS,
            update_every=update_every,
            checkpoint_every=NEVER,
            update_after_step=0,
        )

    def update(self) -> None:
        self.ema.update_(self.model)

    def averages(self) -> list[dict[str, torch.Tensor]]:
        return [windows(average.ema_params) for average in self.ema.ema_models]

    def decay(self, update: int, gamma: float) -> float:
        return (1.0 - 1.0 / (update + 1)) ** (gamma + 1)


class EmaPytorch:
    """ema-pytorch: averages in the parameters' dtype, beside them."""

    name = "ema-pytorch"

    def __init__(self, package: Any, model: nn.Module, directory: Path, update_every: int):
        self.tolerance = own_tolerance(model)
        self.ema = package.PostHocEMA(
            model,
            sigma_rels=SIGMA_RELS,
            update_every=update_every,
            checkpoint_every_num_steps=NEVER,
            checkpoint_folder=str(directory),
        )

    def update(self) -> None:
        self.ema.update()

    def averages(self) -> list[dict[str, torch.Tensor]]:
        return [windows(dict(average.ema_model.named_parameters())) for average in self.ema.ema_models]

    def decay(self, update: int, gamma: float) -> float:
        return (1.0 - 1.0 / (update + 1)) ** (gamma + 1)


class Foreach:
    """``torch._foreach_lerp_`` into f32 averages beside the parameters, one call for each; bf16 is converted before."""

    name = "torch._foreach_lerp_"
    tolerance = 2e-6

    def __init__(self, model: nn.Module):
        self.names, parameters = zip(*model.named_parameters())
        self.parameters = [parameter.detach() for parameter in parameters]
        self.both = [[parameter.float().clone() for parameter in self.parameters] for _ in GAMMAS]
        in_f32 = self.parameters[0].dtype == torch.float32
        self.converted = self.parameters if in_f32 else [torch.empty_like(e) for e in self.both[0]]
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        if self.converted is not self.parameters:
            torch._foreach_copy_(self.converted, self.parameters)
        for averages, gamma in zip(self.both, GAMMAS):
            torch._foreach_lerp_(averages, self.converted, 1.0 - self.decay(self.updates, gamma))

    def averages(self) -> list[dict[str, torch.Tensor]]:
        return [windows(dict(zip(self.names, averages))) for averages in self.both]

    def decay(self, update: int, gamma: float) -> float:
        return ((update - 1) / update) ** (gamma + 1)


class ForeachOfFloats(Foreach):
    """As :class:`Foreach`, without memory of its own for converted parameters: each average converts them for itself."""

    name = "torch._foreach_lerp_ of p.float()"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.converted = []

    def update(self) -> None:
        self.updates += 1
        for averages, gamma in zip(self.both, GAMMAS):
            floats = [parameter.float() for parameter in self.parameters]
            torch._foreach_lerp_(averages, floats, 1.0 - self.decay(self.updates, gamma))


def own_tolerance(model: nn.Module) -> float:
    """A few roundings of averages in the parameters' own dtype."""
    return 16.0 * torch.finfo(next(model.parameters()).dtype).eps


def windows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The beginning of each tensor, on the host in f64."""
    return {name: tensor.detach().flatten()[:WINDOW].cpu().double() for name, tensor in tensors.items()}


def import_peers(folder: Path) -> tuple[Any, Any]:
    """pytorch-posthoc-ema and ema-pytorch from a folder; the former has the import name of this package."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "posthoc_ema"}
    sys.path.insert(0, str(folder))
    try:
        theirs, ema_pytorch = (importlib.import_module(name) for name in ("posthoc_ema", "ema_pytorch"))
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "posthoc_ema"]:
            del sys.modules[name]
        sys.modules.update(ours)
    if not Path(theirs.__file__).is_relative_to(folder):
        raise SystemExit(f"{folder} holds no pytorch-posthoc-ema: pip install --no-deps --target {folder} ...")
    return theirs, ema_pytorch


def check(tracker: Tracker, model: nn.Module) -> None:
    """Three updates by changing parameters, and the averages beside those of the recurrence in f64."""
    expected: list[dict[str, torch.Tensor]] = [{} for _ in GAMMAS]
    for update in (1, 2, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-0.9).add_(0.05)
        tracker.update()
        for average, gamma in zip(expected, GAMMAS):
            decay = tracker.decay(update, gamma) if update > 1 else 0.0
            for name, p in windows(dict(model.named_parameters())).items():
                average[name] = p if update == 1 else decay * average[name] + (1.0 - decay) * p
    for got, wanted in zip(tracker.averages(), expected):
        for name, values in wanted.items():
            difference = (got[name] - values).abs().max().item()
            # A comparison that NaN fails.
            if not difference <= tracker.tolerance:
                raise SystemExit(f"{tracker.name}: {name} is {difference:.1e} away from the average in f64")
