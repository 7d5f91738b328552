"""Sharded runs that continue with another number of ranks, another sharding, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from process_group import Group, outcome, sized_group
from sharded_models import LAYOUTS, plain

from posthoc_ema import PostHocEMA
from posthoc_ema._model import tensors_of

# A layout of FSDP1 has the frozen weight as a buffer.
OPTIONS: dict[str, Any] = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 2, "leave_out": ["frozen"]}
TARGETS = [0.05, 0.2, 0.28]


def weights(number: int) -> dict[str, torch.Tensor]:
    """Returns the whole tensors of a model at a step."""
    model = plain("fsdp2")
    torch.manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.statistics.running_mean += number
    model.statistics.num_batches_tracked += number
    return dict(model.state_dict())


def put(model: Any, number: int) -> None:
    """Gives this process's parts the weights of a step."""
    tensors = weights(number)
    lender = tensors_of(model, leave_out=["frozen"], in_parts=True).lender()
    with torch.no_grad():
        for name, local in zip(lender.names, lender.tensors):
            part = lender.parts.get(name)
            if part is None:
                local.data.copy_(tensors[name])
                continue
            grid = (tensors[name].numel(),) if part.is_range else part.shape
            place = tuple(slice(start, start + n) for start, n in zip(part.offset, local.shape))
            local.detach().copy_(tensors[name].reshape(grid)[place])


def train(ema: PostHocEMA, model: Any, steps: range) -> None:
    """Tracks the weights of some steps, from the one that the run continues from."""
    assert ema.step == steps.start - 1
    for number in steps:
        put(model, number)
        ema.update_(model)


def _continue(rank: int, layout: str, size: int, folder: str, steps: range, resume: Any, saved: str) -> list[str]:
    model = LAYOUTS[layout][0](size)
    put(model, steps.start - 1)
    ema = PostHocEMA.from_model(model, f"{folder}/ema", resume=resume, **OPTIONS)
    train(ema, model, steps)
    if saved:
        ema.save(saved)
        train(ema, model, range(steps.stop, steps.stop + 3))
    ema.close()
    return []


def averages(folder: Path) -> list[dict[str, bytes]]:
    """Returns the bits of averages at the newest snapshot."""
    made = PostHocEMA.from_path(folder).synthesize(TARGETS)
    return [{name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in each.items()} for each in made]


def undisturbed(folder: Path, last: int) -> list[dict[str, bytes]]:
    """Returns the averages of one process that tracked all steps."""
    model = plain("fsdp2")
    ema = PostHocEMA.from_model(model, folder, **OPTIONS)
    train(ema, model, range(1, last + 1))
    ema.finish()
    ema.close()
    return averages(folder)


def test_run_continues_at_other_numbers_of_ranks(groups: list[Group], tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    course = [
        ("fsdp_over_tp", 4, range(1, 6), False, str(saved)),
        ("fsdp1", 3, range(6, 8), str(saved), ""),
        ("fsdp2", 3, range(8, 10), True, ""),
        ("tensor_parallel", 2, range(10, 11), True, ""),
    ]
    for layout, size, steps, resume, path in course:
        sized_group(groups, size)(_continue, layout, size, str(tmp_path), steps, resume, path)
    model = plain("fsdp2")
    ema = PostHocEMA.from_model(model, tmp_path / "ema", resume=True, **OPTIONS)
    train(ema, model, range(11, 13))
    ema.finish()
    ema.close()
    assert averages(tmp_path / "ema") == undisturbed(tmp_path / "twin", 12)


def _unlike(rank: int, folder: str) -> list[str]:
    model = LAYOUTS["fsdp2"][0](3)
    directory = f"{folder}/ema"
    first = PostHocEMA.from_model(model, directory, **OPTIONS)
    put(model, 1)
    first.update_(model)
    first.close()
    again = outcome(lambda: PostHocEMA.from_model(model, directory, **OPTIONS))
    on_one = outcome(lambda: PostHocEMA.from_model(model, directory, resume=rank != 1, **OPTIONS))
    ema = PostHocEMA.from_model(model, directory, resume=True, **OPTIONS)
    step = ema.step
    ema.close()
    return [again, on_one, str(step)]


def test_resume_must_be_equal_on_all_ranks(groups: list[Group], tmp_path: Path) -> None:
    for again, on_one, step in sized_group(groups, 3)(_unlike, str(tmp_path)):
        assert "already contains checkpoints: continue it with `resume=True`" in again
        assert "already contains checkpoints" in on_one
        assert step == "1"
