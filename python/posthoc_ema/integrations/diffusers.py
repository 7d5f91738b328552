"""`EMAModel` of diffusers that also tracks a run, so that averages of any length can be made afterwards.

In a training script of diffusers, one import changes:

    from posthoc_ema.integrations.diffusers import EMAModel    # was: from diffusers.training_utils import EMAModel
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel as DiffusersEMAModel

from .._later_run import STATE_NAME, LaterRun, new_directory
from .._parameter_names import names_in, numbers
from ..posthoc_ema import PostHocEMA

__all__ = ["EMAModel"]

# File of `save_pretrained` that names the run's directory.
_PLACE = "posthoc-ema.json"

_HALF = (torch.float16, torch.bfloat16)

_log = logging.getLogger("posthoc_ema")


class EMAModel(DiffusersEMAModel):  # type: ignore[misc]
    """Average of a model as diffusers keeps it, and a run beside it.

    Constructor, methods, attributes and files are those of `diffusers.training_utils.EMAModel`, with its decays. Two
    things differ. Parameters of 16 bits are averaged in float32: in 16 bits an average with a decay of 0.9999 does not
    move. `step` between `copy_to` after `store` and `restore` raises an error, because the model holds the average.

    The run is opened at the first `step`, finished at the end of the process, and available as `posthoc`. Under data
    parallelism rank 0 tracks.

    Args:
        parameters: Parameters to average.
        decay: Largest decay of the average, per step.
        min_decay: Smallest decay after the first steps.
        update_after_step: Steps before the average begins.
        use_ema_warmup: Compute the decay from `inv_gamma` and `power`.
        inv_gamma: Inverse factor of the warm-up.
        power: Exponent of the warm-up.
        foreach: Update with the functions of PyTorch for lists of tensors.
        model_cls: Class of the model, for `save_pretrained` and for the names of the parameters.
        model_config: Configuration of the model, likewise.
        checkpoint_dir: Directory of the run; default a new one for each training in the folder `posthoc-ema` of the
            working directory.
        model: Module that has the parameters, for their names in the run. Without it and without `model_cls`, names are
            numbers: `0000`, `0001` and so on.
        posthoc: Options of `PostHocEMA.from_model`, such as `{"sigma_rels": (0.05, 0.28), "update_every": 10}`. The
            default of `update_after_step` is 0 here.
        **kwargs: Deprecated arguments of diffusers.
    """

    shadow_params: list[Any]

    def __init__(
        self,
        parameters: Iterable[Any],
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: Any = None,
        model_config: Any = None,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        model: Any = None,
        posthoc: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        if isinstance(parameters, torch.nn.Module):
            model = parameters if model is None else model
            listed = list(parameters.parameters())
        else:
            parameters = listed = list(parameters)
        given = (decay, min_decay, update_after_step, use_ema_warmup, inv_gamma, power, foreach)
        super().__init__(parameters, *given, model_cls=model_cls, model_config=model_config, **kwargs)
        self._widen()
        # Names of each parameter, of which a tied one has several.
        self._names = None if model is None else names_in(model, listed)
        self._tracked: dict[str, Any] = {}
        self._run = LaterRun(checkpoint_dir, posthoc or {}, update_after_step=0)
        self._holds_average = False

    @property
    def posthoc(self) -> PostHocEMA:
        """Run of this training: `posthoc.model(unet, 0.15)` evaluates an average, `posthoc.write` stores several.

        Raises:
            RuntimeError: Before the first `step`.
        """
        if self._run.ema is None:
            raise RuntimeError(
                "the run is opened at the first `step`: call this after it, or read a run that is on disk with "
                "`PostHocEMA.from_path`"
            )
        return self._run.ema

    @property
    def checkpoint_dir(self) -> Path | None:
        """Directory of the run; None if it is not named before the first `step`."""
        return self._run.directory

    def step(self, parameters: Iterable[Any]) -> None:
        """Updates the average and the run; to be called once after each step of the optimizer.

        Args:
            parameters: Parameters that train, in the order of the constructor.

        Raises:
            ValueError: If there are more or fewer parameters, or for the reasons of `PostHocEMA.update_`; at the first
                step also for those of `PostHocEMA.from_model`.
            RuntimeError: If the model holds the average: call `restore` first.
            OSError: As for `PostHocEMA.update_`.
        """
        listed = list(parameters.parameters() if isinstance(parameters, torch.nn.Module) else parameters)
        if self._holds_average:
            raise RuntimeError(
                "the model holds the average since `copy_to`, and averages of averages would spoil both: "
                "call `restore` before `step`"
            )
        if len(listed) != len(self.shadow_params):
            raise ValueError(
                f"step got {len(listed)} parameters, and this average has {len(self.shadow_params)}: pass those of the "
                f"model that trains, in the order of the constructor"
            )
        super().step(parameters if isinstance(parameters, torch.nn.Module) else listed)
        self._track(listed)

    def _track(self, parameters: list[Any]) -> None:
        """Updates the run, which is opened at the first call."""
        ema = self._run.ema
        if ema is None or ema.due:
            self._names = self._names or self._names_from_config(parameters) or numbers(len(parameters))
            # The same mapping each time: its tensors are not listed again.
            self._tracked.update((name, p) for names, p in zip(self._names, parameters) for name in names)
        if ema is None:
            ema = self._open()
        if ema.step + 1 == self.optimization_step:
            ema.update_(self._tracked)
        else:
            ema.update_at_(self.optimization_step, self._tracked)

    def _open(self) -> PostHocEMA:
        """Opens the run, and compares its step with that of the average."""
        if self._run.directory is None:
            self._run.directory = new_directory(getattr(self.model_cls, "__name__", "model"))
        ema = self._run.open(self._tracked)
        _log.info("averages for any length are tracked in %s", self._run.directory)
        before = self.optimization_step - 1
        if ema.step == 0 and before > 0:
            warnings.warn(
                f"the average continues from step {before} without the state of a run: averages of other lengths know "
                f"nothing of the steps before it",
                stacklevel=4,
            )
        else:
            ema.check_step(before)
        return ema

    def _names_from_config(self, parameters: Sequence[Any]) -> list[list[str]] | None:
        """Returns the names in a model of the class and configuration, if its parameters have the same shapes."""
        if self.model_cls is None or self.model_config is None:
            return None
        with torch.device("meta"):
            model = self.model_cls.from_config(self.model_config)
        own = list(model.parameters())
        if [p.shape for p in own] != [p.shape for p in parameters]:
            warnings.warn(
                f"the parameters are not those of {self.model_cls.__name__}, so that the run names them by numbers: "
                f"pass `model=` with the module that has them",
                stacklevel=5,
            )
            return None
        return names_in(model, own)

    def copy_to(self, parameters: Iterable[Any]) -> None:
        """Copies the average into parameters."""
        super().copy_to(parameters)
        self._holds_average = self.temp_stored_params is not None

    def restore(self, parameters: Iterable[Any]) -> None:
        """Gives parameters the values that `store` has kept.

        Raises:
            RuntimeError: If `store` was not called before.
        """
        super().restore(parameters)
        self._holds_average = False

    # Files and states.

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Writes the averaged model as diffusers does, the run's state, and the name of its directory.

        Args:
            path: Folder, created if it is missing.

        Raises:
            ValueError: If the constructor had no `model_cls` or no `model_config`.
            OSError: If the state cannot be written.
        """
        plain: Any = copy.copy(self)
        # As diffusers' own class, whose state dict goes into the configuration.
        plain.__class__ = DiffusersEMAModel
        plain.save_pretrained(path)
        self._run.save(path)
        if self._run.directory is not None:
            place = {"checkpoint_dir": str(self._run.directory.absolute())}
            Path(path, _PLACE).write_text(json.dumps(place) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        model_cls: Any,
        foreach: bool = False,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        posthoc: Mapping[str, Any] | None = None,
    ) -> EMAModel:
        """Restores an average, and continues its run at the next `step`.

        Args:
            path: Folder that `save_pretrained` wrote, here or in diffusers.
            model_cls: Class of the model.
            foreach: As in the constructor.
            checkpoint_dir: Directory of the run; default the one that `path` names.
            posthoc: As in the constructor.

        Returns:
            A new object. Snapshots of the run that are younger than its state are set aside at the next `step`.
        """
        place, state = Path(path, _PLACE), Path(path, STATE_NAME)
        if checkpoint_dir is None and place.is_file():
            checkpoint_dir = json.loads(place.read_text())["checkpoint_dir"]
        model = model_cls.from_pretrained(path)
        self = cls(
            model.parameters(),
            foreach=foreach,
            model_cls=model_cls,
            model_config=model.config,
            checkpoint_dir=checkpoint_dir,
            posthoc=posthoc,
        )
        config = model_cls.load_config(path)
        self.load_state_dict({key: config[key] for key in DiffusersEMAModel.state_dict(self) if key in config})
        self._run.state = str(state.absolute()) if state.is_file() else None
        return self

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of diffusers' class, and under `posthoc_ema` the directory and the state of the run.

        The run's state takes up to 6 bytes a parameter and profile. It is the name of a file if it was loaded from one
        and there was no `step` since then.
        """
        directory = None if self._run.directory is None else str(self._run.directory.absolute())
        return {**super().state_dict(), "posthoc_ema": {"checkpoint_dir": directory, "state": self._run.state}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues from the result of `state_dict`, here or in diffusers.

        The run continues at the next `step`, in the directory of this object if it has one.

        Args:
            state_dict: Result of `state_dict`.

        Raises:
            ValueError: If a value is not valid.
        """
        own = {key: value for key, value in state_dict.items() if key != "posthoc_ema"}
        super().load_state_dict(own)
        self._widen()
        self._holds_average = False
        run = state_dict.get("posthoc_ema") or {}
        self._run.state = run.get("state")
        if self._run.directory is None and run.get("checkpoint_dir") is not None:
            self._run.directory = Path(run["checkpoint_dir"])

    def _widen(self) -> None:
        """Converts averages of 16 bits to float32."""
        self.shadow_params = [p.float() if p.dtype in _HALF else p for p in self.shadow_params]
