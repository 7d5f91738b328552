"""Start of a run that all ranks track together, each its own parts of the model."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from . import _native
from ._launch import distributed
from ._lend import Lender
from ._lifetime import Resume, open_tracker
from ._parts import is_sharded
from ._ranks import Call, RankGroup, open_alone

PATIENCE = 30.0
"""Seconds in which a file of rank 0 must appear on the other ranks; network file systems keep listings for a while."""


class ShardedStart:
    """Opening of a run by all ranks.

    Args:
        call: Call of all ranks.
    """

    def __init__(self, call: Call):
        self._call = call

    def open(self, directory: Path, lender: Lender, options: dict[str, Any], resume: Resume) -> _native.Tracker:
        """Opens the run on this rank, once all have described the same model and see the same directory.

        The rank that stores the first part opens before the others, and repairs what an interrupted training left.

        Raises:
            Exception: On all ranks, if it failed on one. The message names the rank.
        """
        role = self._agree(directory, lender, options)
        self._check_directory(directory)
        options = {**options, "role": role}
        act = partial(open_tracker, directory, lender, options, resume)
        is_first = role["rank"] == 0
        first, _ = self._call.part(lambda: (act() if is_first else None, None))
        other, _ = self._call.part(lambda: (None if is_first else act(), None))
        tracker = first or other
        assert tracker is not None
        self._call.gather(lambda: tracker.step, _check_steps)
        return tracker

    def _agree(self, directory: Path, lender: Lender, options: dict[str, Any]) -> dict[str, Any]:
        """Returns the role of this rank, once rank 0 has compared what all track."""

        def describe() -> str:
            with lender.reading() as (addresses, streams):
                lent = (lender.layout, addresses, streams)
                return _native.shard_manifest(self._call.rank, str(directory), json.dumps(options), *lent)

        role: dict[str, Any] = json.loads(self._call.gather(describe, _native.agree))
        return role

    def _check_directory(self, directory: Path) -> None:
        """Checks that all ranks see the directory of rank 0, by a file that it writes there for a moment.

        Raises:
            ValueError: On all ranks, if one does not see it.
        """
        token = directory / f".posthoc-ema-{uuid.uuid4().hex}"
        made: list[Path] = []
        try:
            _, name = self._call.part(lambda: (None, self._write(token, made)))
            self._call.do(lambda: _wait_for(directory / name))
        except BaseException:
            if self._call.rank == 0:
                token.unlink(missing_ok=True)
                for each in made:
                    each.rmdir()
            raise
        if self._call.rank == 0:
            token.unlink(missing_ok=True)

    def _write(self, token: Path, made: list[Path]) -> str:
        """Writes an empty file as rank 0, makes its directory, and returns the name.

        Args:
            token: File to write.
            made: Receives the directories that were missing, from the innermost.
        """
        if self._call.rank == 0:
            missing = [each for each in (token.parent, *token.parent.parents) if not each.exists()]
            token.parent.mkdir(parents=True, exist_ok=True)
            made += missing
            token.touch()
        return token.name


def _check_steps(steps: list[int]) -> list[None]:
    """Checks that all ranks continue from the same step."""
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise ValueError(
                f"rank {rank} continues from step {step}, and rank 0 from step {steps[0]}: pass the same `resume` on "
                f"all ranks, and a directory that all share"
            )
    return [None] * len(steps)


def _wait_for(token: Path) -> None:
    """Waits until a file of rank 0 is there.

    Raises:
        ValueError: If it does not appear.
    """
    end = time.monotonic() + PATIENCE
    # A listing makes a network file system look again.
    while not (token.parent.is_dir() and token.name in os.listdir(token.parent)):
        if time.monotonic() > end:
            raise ValueError(
                f"{token.parent.absolute()}: this rank does not see the file {token.name} that rank 0 has written "
                f"there: a sharded run needs one directory that all ranks share (a network file system, mounted at the "
                f"same path), and `checkpoint_dir` must name it on all of them"
            )
        time.sleep(0.01)


@contextmanager
def sharded_start(model: Any, rank_zero_only: bool) -> Iterator[ShardedStart | None]:
    """Yields the start of a run that all ranks track, for a block that opens it; None if one process tracks alone.

    An error of the block on one rank ends it on all.

    Raises:
        RuntimeError: If the process group is missing.
    """
    group = distributed()
    if rank_zero_only or group is None or group.get_world_size() == 1:
        yield None
        return
    if not is_sharded(model):
        open_alone(group)
        yield None
        return
    call = RankGroup().call("from_model")
    assert call is not None
    with call:
        call.do(_ready)
        yield ShardedStart(call)
        call.do(_ready, is_last=True)


def _ready() -> None:
    """Does nothing in a part in which all ranks wait for each other."""
