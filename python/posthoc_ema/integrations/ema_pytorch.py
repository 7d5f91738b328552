"""`PostHocEMA` and `KarrasEMA` with the constructors and methods of ema-pytorch, which need not be installed.

In a training script, one import changes:

    from posthoc_ema.integrations.ema_pytorch import PostHocEMA    # was: from ema_pytorch import PostHocEMA
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import torch

from .. import posthoc_ema
from .._later_run import LaterRun
from .._model import ModuleTensors
from .._profiles import Profile
from .._spectral import refresh_spectral_norms
from .._tracked_average import named_tensors
from ._shown_averages import KarrasEMA, ShownAverage, module_for

__all__ = ["KarrasEMA", "PostHocEMA"]

# Interval after which a snapshot is never due.
_NEVER = 2**62

# Number of snapshots that no training stores.
_ALL = 1_000_000


def _schedule(checkpoint_every_num_steps: int | str) -> dict[str, Any]:
    """Returns the options of snapshots at an interval, or of none for "manual"."""
    if checkpoint_every_num_steps == "manual":
        return {"checkpoint_every": _NEVER, "snapshot_growth": None}
    return {"checkpoint_every": checkpoint_every_num_steps}


class _TrackedEMA(ShownAverage):
    """One of the running averages of a `PostHocEMA`.

    Args:
        index: Number of the average.
        run: Run that tracks it.
        model: Module that trains.
        module: Module that receives the average.
        profile: Profile of the average.
        follows_model: Move the module to the model's device when it is asked for.
    """

    def __init__(self, index: int, run: LaterRun, model: Any, module: Any, profile: Profile, follows_model: bool):
        super().__init__(model, module, profile, follows_model)
        self._index = index
        self._run = run

    @property
    def _is_idle(self) -> bool:
        return self._run.ema is not None and self._run.ema.ema_models is None

    def _refresh(self) -> None:
        if self._run.ema is not None and self._run.ema.ema_models is not None:
            self._run.ema.ema_models[self._index].show_in(self._modules["ema_model"])


class PostHocEMA(torch.nn.Module):  # type: ignore[misc]
    """Running averages of a module, their snapshots, and averages of other lengths.

    The run in `checkpoint_folder` is that of `posthoc_ema.PostHocEMA`, and available as `posthoc`. It is opened at the
    first `update`, so that `load_state_dict` may come before, and finished at the end of the process. Under data
    parallelism rank 0 tracks.

    The decay follows from `update_every`; in ema-pytorch it is that of one step, whatever the interval.

    Args:
        model: Module to average; every call of `update` reads it.
        ema_model: Function that returns a module of the model's structure; default copies of the model.
        sigma_rels: Profiles to track, by relative standard deviation.
        gammas: Profiles to track, by exponent, instead.
        checkpoint_every_num_steps: Steps between snapshots, or "manual" for `checkpoint` only.
        checkpoint_folder: Directory of the run.
        checkpoint_dtype: Dtype of averages in snapshots.
        update_every: Steps between updates.
        frozen: Make no updates: averages hold the model's first values.
        param_or_buffer_names_no_ema: Names to copy from the newest update instead of averaging them.
        ignore_names: Names to leave out: averages hold the model's first values.
        ignore_startswith_names: Prefixes of names to leave out.
        allow_different_devices: As for `KarrasEMA`.
        move_ema_to_online_device: As for `KarrasEMA`.
        **posthoc: Further options of `posthoc_ema.PostHocEMA.from_model`. All snapshots are kept by default, as in
            ema-pytorch; `max_checkpoints=20` keeps those that serve all lengths best.

    Raises:
        ValueError: If not exactly one of `sigma_rels` and `gammas` is given, or a value is not valid.
    """

    def __init__(
        self,
        model: Any,
        ema_model: Callable[[], Any] | None = None,
        sigma_rels: Collection[float] | None = None,
        gammas: Collection[float] | None = None,
        checkpoint_every_num_steps: int | Literal["manual"] = 1000,
        checkpoint_folder: str | os.PathLike[str] = "./post-hoc-ema-checkpoints",
        checkpoint_dtype: Any = torch.float16,
        *,
        update_every: int = 100,
        frozen: bool = False,
        param_or_buffer_names_no_ema: Collection[str] = (),
        ignore_names: Collection[str] = (),
        ignore_startswith_names: Collection[str] = (),
        allow_different_devices: bool = False,
        move_ema_to_online_device: bool = False,
        **posthoc: Any,
    ):
        super().__init__()
        if (sigma_rels is None) == (gammas is None):
            raise ValueError(f"sigma_rels = {sigma_rels}, gammas = {gammas}: give either sigma_rels or gammas")
        profiles = [*map(Profile.sigma_rel, sigma_rels or ()), *map(Profile.gamma, gammas or ())]
        if isinstance(ema_model, torch.nn.Module):
            raise ValueError("ema_model is a module, and each average needs its own: give a function that returns one")
        if len(set(profiles)) < max(2, len(profiles)):
            raise ValueError(f"{', '.join(map(str, profiles))}: give at least two profiles that differ")
        self._model = [model]
        self._new_module = ema_model
        self.gammas = tuple(profile.to_dict()["gamma"] for profile in profiles)
        self.num_ema_models = len(profiles)
        self.checkpoint_every_num_steps = checkpoint_every_num_steps
        self.checkpoint_dtype = checkpoint_dtype
        self._frozen = frozen
        self._options: dict[str, Any] = {
            "update_every": update_every,
            "param_or_buffer_names_no_ema": param_or_buffer_names_no_ema,
            "ignore_names": ignore_names,
            "ignore_startswith_names": ignore_startswith_names,
            "move_ema_to_online_device": move_ema_to_online_device,
        }
        options = {
            "profiles": [*profiles, *map(Profile.beta, posthoc.pop("betas", ())), *posthoc.pop("profiles", ())],
            "update_every": update_every,
            "update_after_step": 0,
            "max_checkpoints": _ALL,
            "checkpoint_dtype": checkpoint_dtype,
            "copy": self._names(lambda name: name in param_or_buffer_names_no_ema),
            "leave_out": self._names(
                lambda name: name in ignore_names or name.startswith(tuple(ignore_startswith_names))
            ),
        }
        self._run = LaterRun(checkpoint_folder, {**options, **_schedule(checkpoint_every_num_steps), **posthoc})
        self.ema_models = torch.nn.ModuleList(
            _TrackedEMA(i, self._run, model, module_for(model, ema_model), profile, move_ema_to_online_device)
            for i, profile in enumerate(profiles)
        )
        for average in self.ema_models:
            average.step.fill_(self._run.saved_step())
        self.register_load_state_dict_post_hook(PostHocEMA._check_loaded)

    def _names(self, is_wanted: Callable[[str], bool]) -> list[str]:
        """Returns the names of the model's tensors that are wanted."""
        return [name for name in ModuleTensors(self.model).names if is_wanted(name)]

    @property
    def model(self) -> Any:
        """Module that trains."""
        return self._model[0]

    @property
    def posthoc(self) -> posthoc_ema.PostHocEMA:
        """Run of this training, or before the first `update` the run in the folder, opened to synthesize from.

        Raises:
            FileNotFoundError: If there is none.
        """
        return self._run.ema or posthoc_ema.PostHocEMA.from_path(self.checkpoint_folder)

    @property
    def checkpoint_folder(self) -> Path:
        """Directory of the run."""
        assert self._run.directory is not None
        return self._run.directory

    @property
    def step(self) -> torch.Tensor:
        """Calls of `update` so far, from which a resumed training continues; a tensor without dimensions."""
        return self.ema_models[0].step

    @property
    def device(self) -> torch.device:
        """Device of this object's own buffers."""
        return self.step.device

    def update(self) -> None:
        """Updates the averages and stores snapshots when they are due; to be called once after each training step.

        Raises:
            ValueError: As for `posthoc_ema.PostHocEMA.update_`; at the first call also if the folder holds a run and
                neither `resume=True` nor a state dict continues it.
            RuntimeError: As for `posthoc_ema.PostHocEMA.update_`.
            OSError: As for `posthoc_ema.PostHocEMA.update_`.
        """
        if not self._frozen:
            ema = self._run.ema or self._open()
            ema.update_(self.model)
        for average in self.ema_models:
            average.step += 1
            if not self._frozen:
                average.initted.fill_(ema.has_average)

    def _open(self) -> posthoc_ema.PostHocEMA:
        """Opens the run and shows its averages in the modules."""
        ema = self._run.open(self.model)
        if ema.ema_models is not None:
            ema.check_step(int(self.step))
        for average in self.ema_models:
            # Another rank than the one that tracks may not see the files.
            average.step.fill_(ema.step)
            average._refresh()
        return ema

    def checkpoint(self) -> None:
        """Stores a snapshot of the newest update; does nothing on a process that leaves the tracking to another rank.

        Raises:
            RuntimeError: If there was no update yet.
            OSError: If a file cannot be written.
        """
        if self.ema_models[0]._is_idle:
            return
        if self._run.ema is None or not self._run.ema.has_average:
            every = self._options["update_every"]
            raise RuntimeError(f"there was no update yet, which is due at step {every}: lower `update_every`")
        self._run.ema.finish()

    def synthesize_ema_model(
        self, gamma: float | None = None, sigma_rel: float | None = None, step: int | None = None
    ) -> KarrasEMA:
        """Makes the average of another length, in a module of its own.

        Args:
            gamma: Exponent of the average.
            sigma_rel: Relative standard deviation of the average, instead.
            step: Step of the average; default the newest update during training, otherwise the newest snapshot.

        Returns:
            A callable whose `ema_model` is the average.

        Raises:
            ValueError: If not exactly one of `gamma` and `sigma_rel` is given, a value is not valid, or the step is
                outside the run.
            RuntimeError: If there was no update yet.
            FileNotFoundError: If the folder holds no run.
        """
        made = KarrasEMA(self.model, sigma_rel, gamma, ema_model=self._new_module, **self._options)
        held = named_tensors(made.ema_model)
        average = self.posthoc.local.synthesize([Profile.gamma(made.gamma)], step)[0]
        for name, tensor in average.items():
            held[name].data.copy_(tensor)
        refresh_spectral_norms(made._modules["ema_model"])
        return made

    def copy_params_from_ema_to_model(self) -> None:
        """Copies the last of the averages into the model that trains."""
        self.ema_models[-1].copy_params_from_ema_to_model()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the averaged modules, and returns a tuple of their results."""
        return tuple(average(*args, **kwargs) for average in self.ema_models)

    # States. Those of the modules are for other readers: the run continues from the extra state, with the same bits.

    def get_extra_state(self) -> Any:
        """Returns the live state of the run as a tensor of bytes."""
        return self._run.state

    def set_extra_state(self, state: Any) -> None:
        """Continues the run at the next `update` from a live state."""
        self._run.state = state

    @staticmethod
    def _check_loaded(self: Any, incompatible: Any) -> None:
        """Refuses a state dict without a live state."""
        if any(key.endswith("_extra_state") for key in incompatible.missing_keys):
            raise RuntimeError(
                "this state dict holds no state of a run, from which to continue all averages (ema_pytorch's own does "
                "not): import its checkpoints with `posthoc_ema.import_run`, and begin a new run in another folder"
            )
