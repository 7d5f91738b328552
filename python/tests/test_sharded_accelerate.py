"""Accelerate's checkpoints of a sharded model hold the live state of each rank's averages."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import Group, outcome, sized_group
from sharded_models import LAYOUTS, optimizer_of, step, whole
from test_sharded import OPTIONS, values

from posthoc_ema import PostHocEMA
from posthoc_ema.integrations._trainer_run import saved_state

pytest.importorskip("accelerate")
import posthoc_ema.integrations.accelerate  # noqa: E402


@contextmanager
def _accelerator(rank: int) -> Iterator[Any]:
    """Yields the accelerator of a rank, whose state it removes."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    warnings.simplefilter("ignore")
    try:
        yield Accelerator(cpu=True)
    finally:
        for name in (*place, "MASTER_ADDR"):
            os.environ.pop(name, None)
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()


def _rewind(rank: int, folder: str) -> Any:
    from posthoc_ema.integrations.accelerate import attach

    with _accelerator(rank) as accelerator:
        model = LAYOUTS["fsdp2"][0](3)
        optimizer = accelerator.prepare(optimizer_of(model, "fsdp2"))
        ema = PostHocEMA.from_model(model, f"{folder}/ema", **OPTIONS)
        attach(accelerator, ema, model, optimizer)
        for number in range(4):
            step(model, optimizer, number)
        with ema.model(model, 0.28):
            saved = values(whole(model))
        accelerator.save_state(f"{folder}/checkpoint")
        for number in range(4, 7):
            step(model, optimizer, number)
        accelerator.load_state(f"{folder}/checkpoint")
        with ema.model(model, 0.28):
            loaded = values(whole(model))
        at = ema.step
        ema.close()
    return loaded == saved, at


def test_load_state_rewinds_the_averages_of_all_ranks(groups: list[Group], tmp_path: Path) -> None:
    assert sized_group(groups, 3)(_rewind, str(tmp_path)) == [(True, 4)] * 3
    assert len(list(tmp_path.glob("checkpoint/posthoc-ema-part-*.safetensors"))) == 3


def _without_state(rank: int, folder: str, layout: str) -> tuple[str]:
    from posthoc_ema.integrations.accelerate import attach

    with _accelerator(rank) as accelerator:
        is_sharded = layout == "fsdp2"
        model = LAYOUTS[layout][0](3) if is_sharded else torch.nn.Linear(3, 5)
        optimizer = accelerator.prepare(optimizer_of(model, layout))
        ema = PostHocEMA.from_model(model, f"{folder}/ema", rank_zero_only=not is_sharded, **OPTIONS)
        with attach(accelerator, ema, model, optimizer):
            accelerator.save_state(f"{folder}/checkpoint")
            accelerator.wait_for_everyone()
            if rank == (1 if is_sharded else 0):
                # The rank that looks sees none of the files.
                posthoc_ema.integrations.accelerate.saved_state = lambda _: None
            error = outcome(lambda: accelerator.load_state(f"{folder}/checkpoint"))
        posthoc_ema.integrations.accelerate.saved_state = saved_state
        ema.close()
    return (error,)


@pytest.mark.parametrize(("layout", "failing"), [("fsdp2", 1), ("ddp", 0)])
def test_checkpoint_without_a_state_is_an_error_on_all_ranks(
    groups: list[Group], tmp_path: Path, layout: str, failing: int
) -> None:
    errors = sized_group(groups, 3)(_without_state, str(tmp_path), layout)
    for rank, (error,) in enumerate(errors):
        assert error.startswith(f"FileNotFoundError: {'' if rank == failing else f'rank {failing}: '}{tmp_path}")
        assert "the checkpoint holds no state of the averages" in error
