"""Averages in a training loop with accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .._ranks import on_all_ranks
from .._swap import check_own_weights
from ..posthoc_ema import PostHocEMA
from ._trainer_run import STATE_FILE, saved_state

__all__ = ["AcceleratorAttachment", "attach"]


class AcceleratorAttachment:
    """Hooks of an optimizer and of an accelerator, until they are removed; also a context manager."""

    def __init__(self, handles: list[Any]):
        self._handles = handles

    def remove(self) -> None:
        """Ends the updates, the saving and the loading; may be called again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> AcceleratorAttachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(accelerator: Accelerator, ema: PostHocEMA, model: Any, optimizer: Any) -> AcceleratorAttachment:
    """Updates averages after each step of an optimizer, and lets them follow the accelerator's checkpoints.

    Micro-batches of `gradient_accumulation_steps` do not count, nor do steps that a GradScaler skips.
    `accelerator.save_state` stores the live state of the averages in its folder. `accelerator.load_state` takes them
    back to it: `ema` continues with the same bits as a training that never stopped, and snapshots of steps that are not
    reached yet do not count any more.

    To be called after `accelerator.prepare`, and before `load_state`.

    Args:
        accelerator: Accelerator of the training.
        ema: Averages of `PostHocEMA.from_model`; with several processes, tracked with `rank_zero_only=True` unless the
            model is sharded.
        model: Model that trains, as `prepare` returned it.
        optimizer: Its optimizer, as `prepare` returned it.

    Returns:
        Handle whose `remove` ends all of this.

    Raises:
        TypeError: If the optimizer calls no hooks after its steps.
        ValueError: If the optimizer trains none of the model's parameters.
        RuntimeError: If the averages are attached already. Within `save_state`: if the model holds an average.
    """

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        check_own_weights(tensor for each in models for tensor in each.parameters())
        ema.save(folder)

    def load(models: list[Any], folder: str) -> None:
        tracks = accelerator.is_main_process or ema._is_sharded
        path = saved_state(folder)

        def check() -> None:
            if tracks and path is None:
                raise FileNotFoundError(
                    f"{Path(folder) / STATE_FILE}: the checkpoint holds no state of the averages in "
                    f"{ema.checkpoint_dir}: load one that was saved with them attached, or attach after load_state to "
                    f"begin a new run there"
                )

        on_all_ranks("load_state", check)
        # The other ranks count from the step of rank 0.
        ema._rewind(path if tracks else False)

    updates = ema.attach(optimizer, model)
    saving = accelerator.register_save_state_pre_hook(save)
    return AcceleratorAttachment([updates, saving, accelerator.register_load_state_pre_hook(load)])
