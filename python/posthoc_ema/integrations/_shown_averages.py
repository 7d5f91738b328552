"""Averages as modules in the manner of ema-pytorch."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch

from .. import karras_ema
from .._model import unwrap
from .._profiles import Profile
from .._tracked_average import named_tensors


class ShownAverage(torch.nn.Module):  # type: ignore[misc]
    """Module with an average's weights, as ema-pytorch's classes hold it.

    `ema_model` and the buffers `initted` and `step` are in the state dict, and move with `to`.

    Args:
        model: Module that trains; it is not registered.
        module: Module that receives the average.
        profile: Profile of the average.
        follows_model: Move the module to the model's device when it is asked for.
    """

    initted: torch.Tensor
    step: torch.Tensor

    def __init__(self, model: Any, module: Any, profile: Profile, follows_model: bool):
        super().__init__()
        self._follows_model = follows_model
        self.online_model = [model]
        self.gamma: float = profile.to_dict()["gamma"]
        # `ema_model` is a property, which `add_module` refuses as a name.
        self._modules["ema_model"] = module.requires_grad_(False)
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))

    @property
    def _is_idle(self) -> bool:
        """True on a process that leaves the tracking to another rank."""
        return False

    def _refresh(self) -> None:
        """Updates the weights of the module, unless another rank tracks."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        """Module that trains."""
        return self.online_model[0]

    @property
    def ema_model(self) -> Any:
        """Module with the average's weights; before the first update, with the model's first weights.

        Every access returns the same object and updates its weights.

        Raises:
            RuntimeError: On a process that leaves the tracking to another rank.
        """
        if self._is_idle:
            raise RuntimeError("this process does not track (rank_zero_only): use the average on rank 0")
        self._refresh()
        module = self._modules["ema_model"]
        if self._follows_model:
            module.to(next(self.model.parameters()).device)
        return module

    @property
    def beta(self) -> float:
        """Decay of an update at the present step that follows one at the step before."""
        step = int(self.step)
        return (1 - 1 / step) ** (self.gamma + 1) if step > 0 else 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the averaged module."""
        return self.ema_model(*args, **kwargs)

    def eval(self) -> Any:
        """Puts the averaged module into eval mode, and returns it."""
        return self.ema_model.eval()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the average as `ema_model.*`, with `initted` and `step`."""
        self._refresh()
        return super().state_dict(*args, **kwargs)

    def copy_params_from_ema_to_model(self) -> None:
        """Copies the average into the model that trains."""
        held, own = named_tensors(self.ema_model), named_tensors(self.model)
        for name, tensor in held.items():
            if tensor.is_floating_point() or tensor.is_complex():
                own[name].data.copy_(tensor)

    def restore_ema_model_device(self) -> None:
        """Moves the averaged module to the device of this object's own buffers."""
        self._modules["ema_model"].to(self.initted.device)


class KarrasEMA(ShownAverage):
    """Running average of a module, with a power-function profile and without a run on disk.

    The decay follows from `update_every`; in ema-pytorch it is that of one step, whatever the interval.

    Args:
        model: Module to average; every call of `update` reads it.
        sigma_rel: Standard deviation of the profile relative to the length of the training so far, in (0, 0.288675].
        gamma: Exponent of the profile, instead.
        ema_model: Module of the model's structure that receives the average, or a function that returns one; default a
            copy of the model.
        update_every: Calls of `update` between updates; the first call updates.
        frozen: Make no updates after the first.
        param_or_buffer_names_no_ema: Names to copy from the newest update instead of averaging them.
        ignore_names: Names that keep their first values.
        ignore_startswith_names: Prefixes of names that keep their first values.
        allow_different_devices: Accepted for compatibility: the module may be on any device.
        move_ema_to_online_device: Move the averaged module to the model's device when it is asked for.

    Raises:
        ValueError: If not exactly one of `sigma_rel` and `gamma` is given, or an option or a tensor is not valid.
    """

    def __init__(
        self,
        model: Any,
        sigma_rel: float | None = None,
        gamma: float | None = None,
        ema_model: Any = None,
        update_every: int = 100,
        frozen: bool = False,
        param_or_buffer_names_no_ema: Collection[str] = (),
        ignore_names: Collection[str] = (),
        ignore_startswith_names: Collection[str] = (),
        allow_different_devices: bool = False,
        move_ema_to_online_device: bool = False,
    ):
        module = module_for(model, ema_model)
        average = karras_ema.KarrasEMA(
            model,
            sigma_rel,
            gamma,
            update_every,
            frozen,
            ignore_names=ignore_names,
            ignore_startswith_names=ignore_startswith_names,
            copy=param_or_buffer_names_no_ema,
            ema_model=module,
        )
        super().__init__(model, module, average.profile, move_ema_to_online_device)
        self._average = average
        self.update_every = update_every
        self.frozen = frozen
        self.register_load_state_dict_post_hook(KarrasEMA._continue)

    def update(self) -> None:
        """Updates the average when that is due; to be called once after each training step.

        Raises:
            ValueError: If the model's tensors are not those of the first update. The message names the first
                difference.
        """
        self._average.update()
        self.step += 1
        self.initted.fill_(True)

    def _refresh(self) -> None:
        _ = self._average.ema_model

    @staticmethod
    def _continue(loaded: KarrasEMA, incompatible: Any) -> None:
        """Continues from the module's weights, which a state dict has replaced."""
        held = {name: tensor.clone() for name, tensor in named_tensors(loaded._modules["ema_model"]).items()}
        loaded._average.load_state_dict({**held, "initted": loaded.initted, "step": loaded.step})


def module_for(model: Any, ema_model: Any) -> Any:
    """Returns the module that receives an average: the given one, that of a given function, or a copy of the model."""
    if ema_model is None:
        return copy.deepcopy(unwrap(model))
    return ema_model if isinstance(ema_model, torch.nn.Module) else ema_model()
