"""Blocks of several models, threads and tasks, in any order."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch
from block_model import check_works, everything, trained
from conftest import bits


def test_blocks_of_several_models_do_not_touch_each_other(tmp_path: Path) -> None:
    first, one = trained(tmp_path / "1")
    second, two = trained(tmp_path / "2")
    states = everything(one), everything(two)
    with first.model(one, 0.1), second.model(two, 0.28), first.model(one, 0.28):
        with second.model(one, 0.2):
            pass
        two.half()
        assert everything(one)["bits"] != states[0]["bits"]
    assert (everything(one), everything(two)) == states


def test_blocks_that_end_in_another_order_restore_the_model(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before = everything(model)
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [2, 1, 0]):
        blocks = [ema.model(model, length) for length in (0.1, 0.2, 0.28)]
        for block in blocks:
            block.__enter__()
            model.half() if block is blocks[1] else None
        for i in order[:-1]:
            blocks[i].__exit__(None, None, None)
            with pytest.raises(RuntimeError, match="averages of averages"):
                ema.update_(model)
        blocks[order[-1]].__exit__(None, None, None)
        assert everything(model) == before, order
    check_works(ema, model)


def test_moved_model_that_holds_an_average_is_not_averaged(run_dir: Path) -> None:
    ema, model = trained(run_dir, torch.nn.Conv2d(3, 3, 3))
    with ema.model(model, 0.1):
        model.to(memory_format=torch.channels_last)
        with pytest.raises(RuntimeError, match="averages of averages"):
            ema.update_(model)


def test_another_thread_is_refused_while_a_block_is_open(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    other, spare = trained(run_dir.parent / "other")
    before, errors, scores = everything(model), [], []

    def evaluate(length: float) -> None:
        try:
            with ema.model(model, length):
                scores.append(length)
        except RuntimeError as error:
            errors.append(str(error))

    def elsewhere() -> None:
        with other.model(spare, 0.1):
            scores.append("other")

    with ema.model(model, 0.1):
        held = bits(model)
        for act in (lambda: evaluate(0.28), elsewhere):
            thread = threading.Thread(target=act)
            thread.start()
            thread.join()
        assert bits(model) == held
    assert len(errors) == 1 and "another thread or task has put an average into this model" in errors[0]
    assert scores == ["other"] and everything(model) == before
    evaluate(0.28)
    assert scores == ["other", 0.28]


def test_many_threads_leave_the_model_as_it_was(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before, wanted, bad, refused = everything(model), {}, [], []
    for length in (0.1, 0.2, 0.28):
        with ema.model(model, length):
            wanted[length] = bits(model)

    def evaluate(length: float) -> None:
        for _ in range(40):
            try:
                with ema.model(model, length):
                    if bits(model) != wanted[length]:
                        bad.append(length)
            except RuntimeError as error:
                refused.append("another thread or task" in str(error))

    threads = [threading.Thread(target=evaluate, args=(length,)) for length in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not bad and all(refused)
    assert everything(model) == before


def test_tasks_of_asyncio_are_refused_like_threads(run_dir: Path) -> None:
    ema, model = trained(run_dir)
    before = everything(model)

    async def evaluate(length: float) -> bool:
        with ema.model(model, length):
            held = bits(model)
            await asyncio.sleep(0.01)
            return bits(model) == held

    async def both() -> list[object]:
        return await asyncio.gather(evaluate(0.1), evaluate(0.28), return_exceptions=True)

    results = asyncio.run(both())
    assert results[0] is True and isinstance(results[1], RuntimeError)
    assert everything(model) == before
