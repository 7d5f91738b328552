"""Averages that are swapped into a model for a block, and the state that the model has after it."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import bits, shake, train

from posthoc_ema import PostHocEMA

OPTIONS = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 10}


class Tied(torch.nn.Module):
    """Embedding that shares its elements with the output layer, and a transposed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 5)
        self.output = torch.nn.Linear(5, 7, bias=False)
        self.output.weight = self.embedding.weight
        self.transposed = torch.nn.Parameter(torch.randn(4, 6).t())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.embedding(tokens))


def models() -> dict[str, torch.nn.Module]:
    convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout())
    mixed = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    mixed[0].to(torch.bfloat16)
    many = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(i % 5)) for i in range(2000)])
    return {
        "plain": torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout()),
        "channels_last": convolution.to(memory_format=torch.channels_last),
        "tied": Tied(),
        "bf16": torch.nn.Linear(6, 6, dtype=torch.bfloat16),
        "mixed": mixed,
        "2,000 tensors": many,
    }


@pytest.fixture(params=list(models()))
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return models()[request.param]


def trained(model: torch.nn.Module, run_dir: Path, steps: int = 25) -> PostHocEMA:
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    train(ema, model, steps)
    return ema


def layouts(model: torch.nn.Module) -> list[tuple[object, ...]]:
    tensors = [*model.parameters(), *model.buffers()]
    return [(id(t), t.data_ptr(), t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors]


def test_block_holds_the_average_and_restores_every_bit(model: torch.nn.Module, run_dir: Path) -> None:
    ema = trained(model, run_dir)
    for i, part in enumerate(model.modules()):
        part.training = i % 2 == 0
    flags, before, places = [part.training for part in model.modules()], bits(model), layouts(model)
    with ema.state_dict(0.15) as state_dict:
        pass
    with ema.model(model, sigma_rel=0.15) as averaged:
        assert averaged is model
        assert not any(part.training for part in model.modules())
        held = model.state_dict()
        assert list(held) == list(state_dict)
        assert all(torch.equal(held[name], tensor) for name, tensor in state_dict.items())
        assert layouts(model) == places
        assert bits(model) != before
    assert bits(model) == before
    assert layouts(model) == places
    assert [part.training for part in model.modules()] == flags


def test_state_dict_is_new_and_loads_strictly(model: torch.nn.Module, run_dir: Path) -> None:
    ema = trained(model, run_dir)
    before = bits(model)
    with ema.state_dict(sigma_rel=0.1) as state_dict:
        for name, tensor in model.state_dict().items():
            assert state_dict[name].dtype == tensor.dtype and state_dict[name].shape == tensor.shape, name
        for tensor in state_dict.values():
            tensor.zero_()
    assert bits(model) == before
    with ema.state_dict(sigma_rel=0.1) as again:
        assert any(tensor.any() for tensor in again.values())
    model.load_state_dict(again)
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_block_that_raises_restores_every_bit(model: torch.nn.Module, run_dir: Path) -> None:
    ema = trained(model, run_dir)
    before = bits(model)
    with pytest.raises(ZeroDivisionError):
        with ema.model(model, 0.2):
            shake(model, 100.0)
            raise ZeroDivisionError
    assert bits(model) == before and model.training


def test_nested_blocks_restore_in_order(run_dir: Path) -> None:
    model = torch.nn.Linear(4, 4)
    ema = trained(model, run_dir)
    before = bits(model)
    with ema.model(model, 0.1):
        outer = bits(model)
        with ema.model(model, 0.25):
            assert bits(model) not in (outer, before)
        assert bits(model) == outer and not model.training
    assert bits(model) == before and model.training


def test_abandoned_block_restores_every_bit(run_dir: Path) -> None:
    model = torch.nn.Linear(4, 4)
    ema = trained(model, run_dir)
    before = bits(model)

    def evaluate():
        with ema.model(model, 0.1):
            yield bits(model)

    generator = evaluate()
    assert next(generator) != before
    generator.close()
    assert bits(model) == before


@pytest.mark.parametrize("move", ["half", "double", "meta", "channels_last", "replaced", "removed"])
def test_changes_to_the_model_in_a_block_are_undone(run_dir: Path, move: str) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    ema = trained(model, run_dir)
    before, places = bits(model), layouts(model)
    with ema.model(model, 0.1):
        if move == "half":
            model.half()
        elif move == "double":
            model.double()
        elif move == "meta":
            model.to("meta")
        elif move == "channels_last":
            model.to(memory_format=torch.channels_last)
        elif move == "replaced":
            model[0].weight = torch.nn.Parameter(torch.zeros(1))
        else:
            del model[0].bias
    assert bits(model) == before
    assert [entry[0] for entry in layouts(model)] == [entry[0] for entry in places]


def test_updates_in_a_block_are_refused_and_not_counted(run_dir: Path) -> None:
    model = torch.nn.Linear(4, 4)
    ema = trained(model, run_dir)
    with ema.model(model, 0.1):
        with pytest.raises(RuntimeError, match="averages of averages"):
            ema.update_(model)
        with pytest.raises(RuntimeError, match="averages of averages"):
            PostHocEMA.from_model(model, run_dir.parent / "other")
    assert ema.step == 25
    ema.update_(model)


def test_new_model_takes_all_tensors_of_the_average(run_dir: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    ema = PostHocEMA.from_model(model, run_dir, **OPTIONS)
    for _ in range(20):
        model(torch.randn(8, 3))
        shake(model)
        ema.update_(model)
    ema.finish()
    fresh = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    before = bits(fresh)
    run = PostHocEMA.from_path(run_dir, fresh)
    with run.model(fresh, 0.1):
        assert fresh[1].num_batches_tracked.item() == 20
        assert fresh[1].running_mean.abs().max() > 0
        with ema.model(model, 0.1):
            assert bits(fresh) == bits(model)
    assert bits(fresh) == before


def test_model_of_another_shape_is_refused_and_unchanged(run_dir: Path) -> None:
    ema = trained(torch.nn.Linear(4, 4), run_dir)
    other = torch.nn.Linear(4, 5)
    before = bits(other)
    with pytest.raises(ValueError, match=r"tensor `weight`: its shape is \[5, 4\], but was \[4, 4\] in the run"):
        with ema.model(other, 0.1):
            pytest.fail("the block must not run")
    assert bits(other) == before and other.training
    ema.update_(torch.nn.Linear(4, 4))  # the run continues with a model that fits


def test_averages_at_earlier_steps_come_from_snapshots(run_dir: Path) -> None:
    model = torch.nn.Linear(4, 4)
    ema = trained(model, run_dir, steps=20)
    with ema.state_dict(0.1, step=20) as then:
        pass
    train(ema, model, 25)
    with ema.state_dict(0.1, step=20) as stored, ema.state_dict(0.1) as newest:
        assert torch.allclose(stored["weight"], then["weight"], rtol=0, atol=1e-6)
        assert not torch.equal(stored["weight"], newest["weight"])
    assert ema.plan([0.1])[0].at == 45 and ema.plan([0.1], step=45)[0].at == 45
    assert ema.plan([0.1], step=33)[0].at == 33
    with pytest.raises(ValueError, match="46 is after the last snapshot"):
        ema.plan([0.1], step=46)
    with pytest.raises(ValueError, match="3 is before the first snapshot"):
        ema.plan([0.1], step=3)


def test_synthesis_before_the_first_update_is_refused(run_dir: Path) -> None:
    model = torch.nn.Linear(4, 4)
    ema = PostHocEMA.from_model(model, run_dir)
    for act in (lambda: ema.synthesize([0.1]), lambda: ema.switch_(model, 0.1), lambda: ema.plan([0.1])):
        with pytest.raises(RuntimeError, match="no update yet"):
            act()


MEMORY = """
    import resource, sys, torch, posthoc_ema
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    megabyte = 2**20
    size = 4 * 40 * megabyte
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(megabyte)) for _ in range(40)])
    ema = posthoc_ema.PostHocEMA.from_path(sys.argv[1])
    # A small job sets up everything that the first use sets up.
    small = posthoc_ema.PostHocEMA.from_path(sys.argv[2])
    small.synthesize([0.1])
    # Only anonymous memory counts: pages of mapped files that were read are resident, too.
    def anonymous():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
    import threading, time
    most, stop = [anonymous()], threading.Event()
    def watch():
        while not stop.is_set():
            most[0] = max(most[0], anonymous())
            time.sleep(0.001)
    before = anonymous()
    threading.Thread(target=watch).start()
    if sys.argv[3] == "model":
        with ema.model(model, 0.1):
            most[0] = max(most[0], anonymous())
    else:
        with ema.state_dict(0.1) as state_dict:
            most[0] = max(most[0], anonymous())
    stop.set()
    print((most[0] - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured by /proc")
def test_memory_holds_at_most_one_copy_of_the_model(tmp_path: Path) -> None:
    for name, elements, count in [("large", 2**20, 40), ("small", 8, 2)]:
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(elements)) for _ in range(count)])
        ema = PostHocEMA.from_model(model, tmp_path / name, update_every=1, update_after_step=0, checkpoint_every=2)
        train(ema, model, 4)
        ema.finish()
        del ema, model
    gc.collect()
    for what in ("model", "state_dict"):
        arguments = [str(tmp_path / "large"), str(tmp_path / "small"), what]
        program = [sys.executable, "-c", textwrap.dedent(MEMORY), *arguments]
        copies = float(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
        # Beside the copy 40 MB of working memory, a quarter of the model.
        assert 0.9 < copies < 1.25, (what, copies)
