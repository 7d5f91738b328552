"""Accelerate's checkpoints of a sharded model hold the live state of each rank's averages."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from process_group import Group, sized_group
from sharded_models import LAYOUTS, optimizer_of, step, whole
from test_sharded import OPTIONS, values

from posthoc_ema import PostHocEMA

pytest.importorskip("accelerate")


def _rewind(rank: int, folder: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from posthoc_ema.integrations.accelerate import attach

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    warnings.simplefilter("ignore")
    try:
        accelerator = Accelerator(cpu=True)
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
    finally:
        for name in (*place, "MASTER_ADDR"):
            os.environ.pop(name, None)
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
    return loaded == saved, at


def test_load_state_rewinds_the_averages_of_all_ranks(groups: list[Group], tmp_path: Path) -> None:
    assert sized_group(groups, 3)(_rewind, str(tmp_path)) == [(True, 4)] * 3
    assert len(list(tmp_path.glob("checkpoint/posthoc-ema-part-*.safetensors"))) == 3
