"""Worker of `updates`: the same two averages by posthoc-ema, other packages and PyTorch's own functions.

    python trackers.py KIND [FOLDER]       one of KINDS; the folder of its package

Packages differ in the time that they give an update. Each tracker therefore reports its decays, for a recurrence in f64
that checks its averages.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
import serve

SIGMA_RELS = (0.05, 0.28)
GAMMAS = tuple(map(models.gamma_of, SIGMA_RELS))
# Elements of each tensor that are checked.
WINDOW = 1000
# Interval of updates or checkpoints that are never due.
NEVER = 2**40
Windows = dict[str, torch.Tensor]


class Tracker:
    """Tracker of two averages of a model."""

    def __init__(self, model: nn.Module, update_every: int, folder: Path):
        self.model = model
        self.update_every = update_every
        self.folder = folder

    def update(self) -> object:
        """Runs after each step of training."""
        raise NotImplementedError

    def averages(self) -> list[Windows]:
        """Returns the beginning of each tensor of both averages, by name."""
        raise NotImplementedError

    def dtype(self) -> torch.dtype:
        """Returns the dtype of the averages."""
        return torch.float32

    def decay(self, update: int, gamma: float) -> float:
        """Returns the decay of an update, counted from 1. The first update copies the parameters."""
        return ((update - 1) / update) ** (gamma + 1)


def options(update_every: int) -> dict[str, Any]:
    """Returns the arguments that this package and pytorch-posthoc-ema share."""
    return {
        "sigma_rels": SIGMA_RELS,
        "update_every": update_every,
        "checkpoint_every": NEVER,
        "update_after_step": 0,
    }


class PosthocEma(Tracker):
    """posthoc-ema."""

    def __init__(self, model: nn.Module, update_every: int, folder: Path, device: str, compensated: bool):
        super().__init__(model, update_every, folder)
        import posthoc_ema

        self.ema = posthoc_ema.PostHocEMA.from_model(
            model,
            folder,
            **options(update_every),
            device=device,
            compensated=compensated,
        )

    def update(self) -> None:
        self.ema.update_(self.model)

    def averages(self) -> list[Windows]:
        return [windows(average) for average in self.ema.synthesize(SIGMA_RELS, dtype=torch.float32)]


class PytorchPosthocEma(Tracker):
    """pytorch-posthoc-ema: averages in the parameters' dtype, on the host."""

    def __init__(self, model: nn.Module, update_every: int, folder: Path):
        super().__init__(model, update_every, folder)
        self.ema = serve.import_peer("posthoc_ema").PostHocEMA.from_model(
            model,
            folder,
            **options(update_every),
        )

    def update(self) -> None:
        self.ema.update_(self.model)

    def averages(self) -> list[Windows]:
        return [windows(average.ema_params) for average in self.ema.ema_models]

    def dtype(self) -> torch.dtype:
        return next(iter(self.ema.ema_models[0].ema_params.values())).dtype

    def decay(self, update: int, gamma: float) -> float:
        return (1.0 - 1.0 / (update + 1)) ** (gamma + 1)


class EmaPytorch(Tracker):
    """ema-pytorch: averages in the parameters' dtype, beside them."""

    def __init__(self, model: nn.Module, update_every: int, folder: Path):
        super().__init__(model, update_every, folder)
        self.ema = serve.import_peer("ema_pytorch").PostHocEMA(
            model,
            sigma_rels=SIGMA_RELS,
            update_every=update_every,
            checkpoint_every_num_steps=NEVER,
            checkpoint_folder=str(folder),
        )

    def update(self) -> None:
        self.ema.update()

    def averages(self) -> list[Windows]:
        return [windows(dict(average.ema_model.named_parameters())) for average in self.ema.ema_models]

    def dtype(self) -> torch.dtype:
        return next(self.ema.ema_models[0].ema_model.parameters()).dtype

    def decay(self, update: int, gamma: float) -> float:
        return (1.0 - 1.0 / (update + 1)) ** (gamma + 1)


class Timm(Tracker):
    """timm's ModelEmaV3, one for each average; its decay is set before each update."""

    def __init__(self, model: nn.Module, update_every: int, folder: Path, in_f32: bool):
        super().__init__(model, update_every, folder)
        of = importlib.import_module("timm.utils").ModelEmaV3
        self.both = [of(model, dtype=torch.float32 if in_f32 else None) for _ in GAMMAS]
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        for average, gamma in zip(self.both, GAMMAS):
            average.decay = self.decay(self.updates, gamma)
            average.update(self.model)

    def averages(self) -> list[Windows]:
        return [windows(dict(average.module.named_parameters())) for average in self.both]

    def dtype(self) -> torch.dtype:
        return next(self.both[0].module.parameters()).dtype


class Foreach(Tracker):
    """``torch._foreach_lerp_`` into f32 averages beside the parameters, one call for each average.

    Parameters of 16 bits are first converted into memory that is kept for them. `gathered`: each update lists the
    parameters again, as torchtitan does.
    """

    def __init__(self, model: nn.Module, update_every: int, folder: Path, gathered: bool = False):
        super().__init__(model, update_every, folder)
        self.names = [name for name, _ in model.named_parameters()]
        self.gathered = gathered
        self.parameters = self.listed()
        self.both = [[parameter.float().clone() for parameter in self.parameters] for _ in GAMMAS]
        in_f32 = self.parameters[0].dtype == torch.float32
        self.converted = None if in_f32 else [torch.empty_like(each) for each in self.both[0]]
        self.updates = 0

    def listed(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self.model.parameters()]

    def update(self) -> None:
        self.updates += 1
        given = self.listed() if self.gathered else self.parameters
        if self.converted is not None:
            torch._foreach_copy_(self.converted, given)
            given = self.converted
        for averages, gamma in zip(self.both, GAMMAS):
            torch._foreach_lerp_(averages, given, 1.0 - self.decay(self.updates, gamma))

    def averages(self) -> list[Windows]:
        return [windows(dict(zip(self.names, averages))) for averages in self.both]


class ForeachOfFloats(Foreach):
    """:class:`Foreach` without memory for converted parameters: each average converts them for itself."""

    def update(self) -> None:
        self.updates += 1
        for averages, gamma in zip(self.both, GAMMAS):
            floats = [parameter.float() for parameter in self.parameters]
            torch._foreach_lerp_(averages, floats, 1.0 - self.decay(self.updates, gamma))


def fused(first: list, second: list, parameters: list, weights: torch.Tensor) -> None:
    """Updates both averages in one pass over the parameters, in terms that a compiler can fuse."""
    for a, b, parameter in zip(first, second, parameters):
        p = parameter.float()
        a.add_((p - a) * weights[0])
        b.add_((p - b) * weights[1])


class Compiled(Foreach):
    """``torch.compile`` of :func:`fused` over the list of tensors."""

    def __init__(self, model: nn.Module, update_every: int, folder: Path):
        super().__init__(model, update_every, folder)
        self.converted = None
        self.compiled = torch.compile(fused, dynamic=False)

    def update(self) -> None:
        self.updates += 1
        weights = torch.tensor([1.0 - self.decay(self.updates, gamma) for gamma in GAMMAS]).to(self.both[0][0].device)
        with torch.no_grad():
            self.compiled(*self.both, self.parameters, weights)


class CompiledFlat(Compiled):
    """:class:`Compiled` on one flat tensor of all parameters. No model is one; it is the best case for a compiler."""

    def __init__(self, model: nn.Module, update_every: int, folder: Path):
        super().__init__(model, update_every, folder)
        self.shapes = [parameter.shape for parameter in self.parameters]
        self.parameters = [torch.cat([each.flatten() for each in self.parameters])]
        # Makes the model's tensors views of it.
        at = 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.set_(self.parameters[0][at : at + parameter.numel()].view(parameter.shape))
                at += parameter.numel()
        self.both = [[self.parameters[0].float().clone()] for _ in GAMMAS]

    def averages(self) -> list[Windows]:
        sizes = [shape.numel() for shape in self.shapes]
        return [windows(dict(zip(self.names, average.split(sizes)))) for (average,) in self.both]


class Copy(Tracker):
    """Copy of the parameters in their own dtype into memory that is already allocated: no averages."""

    def __init__(self, model: nn.Module, update_every: int, folder: Path):
        super().__init__(model, update_every, folder)
        self.parameters = [parameter.detach() for parameter in model.parameters()]
        self.copies = [parameter.clone() for parameter in self.parameters]

    def update(self) -> None:
        torch._foreach_copy_(self.copies, self.parameters)


KINDS: dict[str, Callable[[nn.Module, int, Path], Tracker]] = {
    "plain": lambda *given: PosthocEma(*given, device="cpu", compensated=False),
    "compensated": lambda *given: PosthocEma(*given, device="cpu", compensated=True),
    "device-plain": lambda *given: PosthocEma(*given, device="cuda", compensated=False),
    "device-compensated": lambda *given: PosthocEma(*given, device="cuda", compensated=True),
    "pytorch-posthoc-ema": PytorchPosthocEma,
    "ema-pytorch": EmaPytorch,
    "timm": lambda *given: Timm(*given, in_f32=False),
    "timm-f32": lambda *given: Timm(*given, in_f32=True),
    "foreach": Foreach,
    "foreach-gathered": lambda *given: Foreach(*given, gathered=True),
    "foreach-floats": ForeachOfFloats,
    "compiled": Compiled,
    "compiled-flat": CompiledFlat,
    "copy": Copy,
}


def windows(tensors: dict[str, torch.Tensor]) -> Windows:
    """Returns the beginning of each tensor, on the host in f64."""
    return {name: tensor.detach().flatten()[:WINDOW].cpu().double() for name, tensor in tensors.items()}


def model_of(shapes: models.Shapes, dtype: torch.dtype, device: str) -> nn.Module:
    """Makes a model with parameters in [-1, 1), in which neighbouring elements differ."""
    most = max(torch.Size(shape).numel() for shape in shapes.values())
    values = (torch.arange(most) % 251 / 128 - 1).to(device, dtype)
    tensors = {name: values[: torch.Size(shape).numel()].reshape(shape).clone() for name, shape in shapes.items()}
    return nn.ParameterDict(tensors)


def check(tracker: Tracker, model: nn.Module) -> float:
    """Runs three updates, and returns the largest difference from a recurrence in f64.

    It must be within a few roundings of the averages' own dtype.
    """
    tolerance = max(2e-6, 16.0 * torch.finfo(tracker.dtype()).eps)
    expected: list[Windows] = [{} for _ in GAMMAS]
    for update in (1, 2, 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-0.9).add_(0.05)
        tracker.update()
        for average, gamma in zip(expected, GAMMAS):
            decay = tracker.decay(update, gamma) if update > 1 else 0.0
            for name, p in windows(dict(model.named_parameters())).items():
                average[name] = p if update == 1 else decay * average[name] + (1.0 - decay) * p
    largest = 0.0
    for got, wanted in zip(tracker.averages(), expected):
        for name, values in wanted.items():
            difference = (got[name] - values).abs().max().item()
            # A comparison that NaN fails.
            if not difference <= tolerance:
                raise ValueError(f"{name} is {difference:.1e} away from the average in f64, allowed {tolerance:.1e}")
            largest = max(largest, difference)
    return largest


class Session:
    """Trackers of one kind, one for each case."""

    def __init__(self, kind: str):
        self.kind = kind

    def prepare(self, model: str, size: str, dtype: str, device: str, due: bool, calls: int) -> dict[str, Any]:
        """Makes model and averages, and checks the updates."""
        self.calls = calls
        self.device = device
        self.folder = tempfile.TemporaryDirectory()
        module = model_of(models.MODELS[model][size], getattr(torch, dtype), device)
        made = KINDS[self.kind](module, 1 if due else NEVER, Path(self.folder.name) / "run")
        answer: dict[str, Any] = {"model_bytes": sum(parameter.nbytes for parameter in module.parameters())}
        if due and self.kind != "copy":
            answer |= {"largest_difference": check(made, module), "dtype_of_averages": str(made.dtype())}
        else:
            made.update()  # the first call is due in the other packages
        self.tracker = made
        trim_memory()
        return answer

    def go(self) -> dict[str, float]:
        """Returns the seconds of one update, a mean of `calls` in a row."""
        self.wait()
        start = time.perf_counter()
        for _ in range(self.calls):
            self.tracker.update()
        self.wait()
        return {"seconds": (time.perf_counter() - start) / self.calls}

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def drop(self) -> None:
        del self.tracker
        self.folder.cleanup()
        # Without a reset, torch.compile would compile the next case for any size.
        torch.compiler.reset()
        trim_memory()


def trim_memory() -> None:
    """Returns free memory to the system, so that the memory in use can be measured."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:]
    session = Session(sys.argv[1])
    serve.serve({"prepare": session.prepare, "go": session.go, "drop": session.drop})
