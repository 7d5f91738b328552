"""Sharded models, tracked by all ranks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from process_group import Group, outcome, sized_group
from sharded_models import LAYOUTS

import posthoc_ema._sharded_start
from posthoc_ema import PostHocEMA

OPTIONS: dict[str, Any] = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 3, "snapshot_growth": None}


def _begin(rank: int, run_dir: str, what: str) -> Any:
    model: Any = LAYOUTS["fsdp2_ignoring"][0](3)
    options = dict(OPTIONS)
    if what == "option" and rank == 1:
        options["update_every"] = 5
    if what == "bad option" and rank == 2:
        options["on_error"] = "ask"
    if what == "values" and rank == 1:
        model.norm.weight.data.add_(1)
    if what == "directory" and rank == 2:
        posthoc_ema._sharded_start.PATIENCE, posthoc_ema._sharded_start.os = 0.1, NoFiles
    try:
        return [outcome(lambda: PostHocEMA.from_model(model, run_dir, **options))]
    finally:
        posthoc_ema._sharded_start.PATIENCE, posthoc_ema._sharded_start.os = 30.0, os


class NoFiles:
    """Operating system of a rank that sees another directory under the same path."""

    @staticmethod
    def listdir(_: Path) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("option", "update_every.*:1.*update_every.*:5"),
        ("bad option", "on_error = 'ask'"),
        ("values", "`norm.weight`, with different values"),
        ("directory", "does not see the file .*needs one directory that all ranks share"),
    ],
)
def test_ranks_that_disagree_all_get_the_error(groups: list[Group], tmp_path: Path, what: str, message: str) -> None:
    errors = sized_group(groups, 3)(_begin, str(tmp_path / "ema"), what)
    assert all(re.search(message, error) for (error,) in errors), errors
    assert not list(tmp_path.glob("ema/*"))
