"""`EMAModel` beside that of diffusers: averages, files, a real training script, and resumes."""

from __future__ import annotations

import gc
import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import exact, shake
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel as Reference

from posthoc_ema import PostHocEMA, Profile
from posthoc_ema.integrations.diffusers import EMAModel

EXAMPLE = Path(__file__).parents[1] / "examples" / "diffusers_unet.py"
SIZES = ("--max_train_steps", "60", "--checkpointing_steps", "20", "--train_batch_size", "4")
TRACKED = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 20}


def unet() -> UNet2DModel:
    torch.manual_seed(1)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
    )


def flat(parameters: Any) -> np.ndarray:
    return torch.cat([p.detach().double().flatten() for p in parameters]).numpy()


def decay_at(step: int, options: dict[str, Any]) -> float:
    """Returns the decay of an update, from the formulas in the documentation of diffusers."""
    steps = max(0, step - options.get("update_after_step", 0) - 1)
    if steps == 0:
        return 0.0
    if options.get("use_ema_warmup"):
        value = 1.0 - (1.0 + steps / options.get("inv_gamma", 1.0)) ** -options.get("power", 2 / 3)
    else:
        value = (1 + steps) / (10 + steps)
    return max(min(value, options.get("decay", 0.9999)), options.get("min_decay", 0.0))


def relative(difference: np.ndarray, values: np.ndarray) -> float:
    """Returns the largest difference relative to the RMS of values."""
    return float(np.abs(difference).max() / np.sqrt((values**2).mean()))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 0.9},
        {"update_after_step": 30, "decay": 0.99},
        {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75, "min_decay": 0.5},
    ],
)
def test_average_has_the_bits_of_diffusers_and_is_exact(tmp_path: Path, options: dict[str, Any], foreach: bool) -> None:
    model = unet()
    model.conv_in.bias.requires_grad_(False)
    parameters = list(model.parameters())
    ours = EMAModel(
        parameters, foreach=foreach, checkpoint_dir=tmp_path / "run", model=model, posthoc=TRACKED, **options
    )
    theirs = Reference(parameters, foreach=foreach, **options)
    oracle = flat(parameters)
    for step in range(1, 201):
        shake(model, 0.01)
        ours.step(model.parameters())
        theirs.step(model.parameters())
        decay = decay_at(step, options)
        oracle = decay * oracle + (1 - decay) * flat(parameters)
        assert ours.cur_decay_value == theirs.cur_decay_value == pytest.approx(decay, rel=1e-12)
    assert all(map(torch.equal, ours.shadow_params, theirs.shadow_params))
    frozen = [p.requires_grad for p in parameters].index(False)
    assert torch.equal(ours.shadow_params[frozen], parameters[frozen])
    trained = [i for i in range(len(parameters)) if i != frozen]
    error = flat(ours.shadow_params[i] for i in trained) - _without(oracle, parameters, frozen)
    assert relative(error, oracle) < 1e-5
    assert ours.optimization_step == theirs.optimization_step == 200


def _without(values: np.ndarray, parameters: list[Any], index: int) -> np.ndarray:
    """Leaves a parameter out of flat values: diffusers copies one that does not train."""
    ends = np.cumsum([p.numel() for p in parameters])
    return np.delete(values, slice(ends[index] - parameters[index].numel(), ends[index]))


@pytest.mark.parametrize("foreach", [False, True])
def test_average_of_16_bits_is_exact_here_only(tmp_path: Path, foreach: bool) -> None:
    model = torch.nn.Linear(64, 64).bfloat16()
    # The decay is high from the second step on.
    options: dict[str, Any] = {"decay": 0.999, "min_decay": 0.999}
    ours = EMAModel(model.parameters(), foreach=foreach, checkpoint_dir=tmp_path / "run", model=model, **options)
    theirs = Reference(model.parameters(), foreach=foreach, **options)
    oracle = flat(model.parameters())
    for step in range(1, 301):
        if step == 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
        ours.step(model.parameters())
        theirs.step(model.parameters())
        decay = decay_at(step, options)
        oracle = decay * oracle + (1 - decay) * flat(model.parameters())
    assert relative(flat(ours.shadow_params) - oracle, oracle) < 1e-5
    assert relative(flat(theirs.shadow_params) - oracle, oracle) > 0.1


def test_every_length_can_be_made(tmp_path: Path) -> None:
    model = unet()
    ema = EMAModel(
        model.parameters(),
        model_cls=UNet2DModel,
        model_config=model.config,
        checkpoint_dir=tmp_path / "run",
        posthoc=TRACKED,
    )
    assert ema.checkpoint_dir == tmp_path / "run"
    with pytest.raises(RuntimeError, match="opened at the first `step`"):
        _ = ema.posthoc
    values = []
    for _ in range(200):
        shake(model, 0.01)
        ema.step(model.parameters())
        values.append(flat(model.parameters()))
    times = np.arange(1, 201)
    for tracked in (0.05, 0.28):
        average = ema.posthoc.synthesize([tracked])[0]
        assert list(average) == [name for name, _ in model.named_parameters()]
        expected = exact(Profile.sigma_rel(tracked), times, np.stack(values))
        assert relative(flat(average.values()) - expected, expected) < 1e-6
    between = exact(Profile.sigma_rel(0.15), times, np.stack(values))
    with ema.posthoc.model(model, 0.15) as averaged:
        assert relative(flat(averaged.parameters()) - between, between) < 0.02
        averaged.save_pretrained(tmp_path / "averaged")
    assert np.array_equal(flat(model.parameters()), values[-1])
    saved = UNet2DModel.from_pretrained(tmp_path / "averaged")
    assert relative(flat(saved.parameters()) - between, between) < 0.02


# Names.


def names_of(ema: EMAModel) -> list[str]:
    return list(ema.posthoc.synthesize([0.1])[0])


def test_parameters_without_a_module_are_numbered(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    ema = EMAModel(model.parameters(), checkpoint_dir=tmp_path / "run", posthoc=TRACKED)
    ema.step(model.parameters())
    assert names_of(ema) == ["0000", "0001"]
    with ema.posthoc.state_dict(0.1) as state_dict:
        assert torch.equal(state_dict["0000"], model.weight)


def test_parameters_are_named_by_their_module(tmp_path: Path) -> None:
    model = unet()
    # Some of the parameters, as of an adapter, in another order.
    some = [model.conv_out.bias, model.conv_in.weight]
    ema = EMAModel(some, model=model, checkpoint_dir=tmp_path / "run", posthoc=TRACKED)
    ema.step(some)
    assert sorted(names_of(ema)) == ["conv_in.weight", "conv_out.bias"]
    with pytest.raises(ValueError, match=r"parameter 1, of shape \(2, 3\), is not one of model=UNet2DModel"):
        EMAModel([model.conv_out.bias, torch.nn.Parameter(torch.ones(2, 3))], model=model)
    other = EMAModel(some, model_cls=UNet2DModel, model_config=model.config, checkpoint_dir=tmp_path / "other")
    with pytest.warns(UserWarning, match="not those of UNet2DModel.*pass `model=`"):
        other.step(some)


def test_tied_parameters_have_all_their_names(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    ema = EMAModel(model.parameters(), model=model, checkpoint_dir=tmp_path / "run", posthoc=TRACKED)
    for _ in range(3):
        shake(model)
        ema.step(model.parameters())
    with ema.posthoc.state_dict(0.1) as state_dict:
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).load_state_dict(state_dict)
        assert state_dict["0.weight"] is state_dict["1.weight"]


def test_mistakes_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    ema = EMAModel(model.parameters(), checkpoint_dir=tmp_path / "run", posthoc=TRACKED)
    ema.step(model.parameters())
    with pytest.raises(ValueError, match="step got 1 parameters, and this average has 2"):
        ema.step([model.weight])
    before = model.weight.detach().clone()
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    with pytest.raises(RuntimeError, match="call `restore` before `step`"):
        ema.step(model.parameters())
    ema.restore(model.parameters())
    assert torch.equal(model.weight, before)
    ema.step(model.parameters())
    assert ema.optimization_step == ema.posthoc.step == 2
    with pytest.raises(ValueError, match="`model_cls` was defined"):
        ema.save_pretrained(tmp_path / "saved")
    other = EMAModel(model.parameters(), checkpoint_dir=tmp_path / "run")
    with pytest.raises((ValueError, RuntimeError), match="already contains checkpoints|writing"):
        other.step(model.parameters())


# Files and states.


def trained(directory: Path, steps: int) -> tuple[UNet2DModel, EMAModel]:
    model = unet()
    ema = EMAModel(
        model.parameters(),
        decay=0.9,
        model_cls=UNet2DModel,
        model_config=model.config,
        checkpoint_dir=directory,
        posthoc=TRACKED,
    )
    walk(model, ema, range(steps))
    return model, ema


def walk(model: UNet2DModel, ema: EMAModel, steps: range) -> None:
    """Trains; a step depends on its number only."""
    for step in steps:
        torch.manual_seed(step)
        shake(model, 0.01)
        ema.step(model.parameters())


def test_saved_folder_is_that_of_diffusers_with_the_run(tmp_path: Path) -> None:
    model, ema = trained(tmp_path / "run", 30)
    ema.save_pretrained(tmp_path / "ours")
    plain = Reference(model.parameters(), decay=0.9, model_cls=UNet2DModel, model_config=model.config)
    plain.load_state_dict({**ema.state_dict()})
    plain.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ours", "theirs")
    )
    assert {name: ours[name] for name in theirs} == theirs
    assert set(ours) - set(theirs) == {"posthoc-ema.safetensors", "posthoc-ema.json"}
    # Diffusers' class reads the folder, and ours reads that of diffusers.
    with pytest.warns(FutureWarning, match="from_config"):
        back = Reference.from_pretrained(tmp_path / "ours", UNet2DModel)
    assert all(map(torch.equal, back.shadow_params, ema.shadow_params)) and back.optimization_step == 30
    here = EMAModel.from_pretrained(tmp_path / "theirs", UNet2DModel, checkpoint_dir=tmp_path / "new", posthoc=TRACKED)
    assert all(map(torch.equal, here.shadow_params, ema.shadow_params)) and here.optimization_step == 30
    shake(model, 0.01)
    with pytest.warns(UserWarning, match="continues from step 30 without the state of a run"):
        here.step(model.parameters())
    here.step(model.parameters())
    assert here.posthoc.step == here.optimization_step == 32


def _by_folder(ema: EMAModel, folder: Path) -> EMAModel:
    """Saves and restores an average as the hooks of diffusers' scripts do, with a second object in between."""
    ema.save_pretrained(folder)
    fresh = EMAModel(unet().parameters(), model_cls=UNet2DModel, model_config=unet().config, posthoc=TRACKED)
    loaded = EMAModel.from_pretrained(folder, UNet2DModel)
    fresh.load_state_dict(loaded.state_dict())
    return fresh


def _by_state_dict(ema: EMAModel, folder: Path) -> EMAModel:
    """Saves and restores an average as accelerate does for a registered object."""
    folder.mkdir()
    torch.save(ema.state_dict(), folder / "state.pt")
    fresh = EMAModel(unet().parameters(), model_cls=UNet2DModel, model_config=unet().config, posthoc=TRACKED)
    fresh.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return fresh


@pytest.mark.parametrize("store", [_by_folder, _by_state_dict])
def test_rewound_training_has_the_bits_of_an_undisturbed_one(
    tmp_path: Path, store: Callable[[EMAModel, Path], EMAModel]
) -> None:
    undisturbed_model, undisturbed = trained(tmp_path / "undisturbed", 70)
    model, ema = trained(tmp_path / "run", 30)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    resumed = store(ema, tmp_path / "saved")
    # The training goes on, further than the next snapshot, before it goes back.
    walk(model, ema, range(30, 55))
    ema.posthoc.close()
    model.load_state_dict(weights)
    walk(model, resumed, range(30, 70))
    assert resumed.checkpoint_dir == (tmp_path / "run").absolute()
    assert all(map(torch.equal, resumed.shadow_params, undisturbed.shadow_params))
    for ours, theirs in zip(resumed.posthoc.synthesize([0.05, 0.28]), undisturbed.posthoc.synthesize([0.05, 0.28])):
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for each in (resumed, undisturbed):
        each.posthoc.finish()
    one, other = (PostHocEMA.from_path(tmp_path / name).synthesize([0.1, 0.2]) for name in ("run", "undisturbed"))
    for ours, theirs in zip(one, other):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_state_and_model_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model, ema = trained(tmp_path / "run", 30)
    ema.save_pretrained(tmp_path / "saved")
    loaded = EMAModel.from_pretrained(tmp_path / "saved", UNet2DModel, checkpoint_dir=tmp_path / "other")
    loaded.optimization_step = 25
    with pytest.raises(ValueError, match="at step 30.*from step 25"):
        loaded.step(model.parameters())


def test_process_that_ends_leaves_the_newest_average(tmp_path: Path) -> None:
    program = """
import torch
from posthoc_ema.integrations.diffusers import EMAModel
model = torch.nn.Linear(3, 2)
ema = EMAModel(model.parameters(), model=model)
for _ in range(150):
    ema.step(model.parameters())
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", program], cwd=tmp_path, check=True)
    (run,) = (tmp_path / "posthoc-ema").iterdir()
    assert run.name.startswith("model-")
    assert set(PostHocEMA.from_path(run).synthesize([0.1])[0]) == {"weight", "bias"}


def test_data_parallel_processes_track_one_run(tmp_path: Path) -> None:
    program = """
import json, sys
import torch
from diffusers import UNet2DModel
from posthoc_ema.integrations.diffusers import EMAModel
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2] + "/store", rank=rank, world_size=2)
torch.manual_seed(0)
model = UNet2DModel(sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
wrapped = torch.nn.parallel.DistributedDataParallel(model)
def new():
    options = {"checkpoint_every": 20}
    return EMAModel(wrapped.parameters(), model_cls=UNet2DModel, model_config=model.config, posthoc=options)
def train(ema, steps):
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        ema.step(wrapped.parameters())
first = new()
train(first, 30)
if rank == 0:
    first.save_pretrained("saved")
torch.distributed.barrier()
first.posthoc.close()
ema = new()
ema.load_state_dict(EMAModel.from_pretrained("saved", UNet2DModel).state_dict())
torch.distributed.barrier()
train(ema, 25)
if rank == 0:
    with ema.posthoc.local.model(model, 0.28):
        alone = float(model.conv_in.weight.double().sum())
with ema.posthoc.model(wrapped, 0.28):
    total = float(model.conv_in.weight.double().sum())
assert rank == 1 or alone == total
print(json.dumps([ema.optimization_step, ema.posthoc.step, total]))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-c", program]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    one, other = (json.loads(output) for output in outputs)
    assert one == other and one[:2] == [55, 55]
    (run,) = (tmp_path / "posthoc-ema").iterdir()
    assert PostHocEMA.from_path(run).step == 50 or PostHocEMA.from_path(run).step == 55


# A real script.


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Runs the example, which follows a training script of diffusers, in the folder of the test."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    monkeypatch.chdir(tmp_path)

    def run(path: Path, *options: str) -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        monkeypatch.setattr(sys, "argv", [str(path), *SIZES, *options])
        runpy.run_path(str(path), run_name="__main__")
        # Accelerator and hooks hold each other, and the run.
        gc.collect()

    yield run


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return UNet2DModel.from_pretrained(folder).state_dict()


def test_training_script_changes_one_import(script: Callable[..., None], tmp_path: Path, capsys: Any) -> None:
    original = tmp_path / "original.py"
    imports = "from posthoc_ema.integrations.diffusers import EMAModel"
    text = EXAMPLE.read_text().replace("Path(__file__).resolve().parents[2]", f"Path({str(EXAMPLE.parents[2])!r})")
    assert text.count(imports) == 1
    original.write_text(text.replace(imports, "from diffusers.training_utils import EMAModel"))
    script(original, "--out", "theirs")
    seen: list[np.ndarray] = []
    own_step = EMAModel.step

    def step(self: EMAModel, parameters: Any) -> None:
        listed = list(parameters)
        seen.append(flat(listed))
        own_step(self, listed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMAModel, "step", step)
        script(EXAMPLE, "--out", "ours")
    assert "sigma_rel 0.1" in capsys.readouterr().out
    for name, tensor in weights_in(tmp_path / "theirs" / "unet").items():
        assert torch.equal(weights_in(tmp_path / "ours" / "unet")[name], tensor)
    # Accumulation: two batches a step. With the defaults, the first update is at step 60 at the latest.
    assert len(seen) == 60
    run = PostHocEMA.from_path(
        json.loads(Path("ours/checkpoint-60/unet_ema/posthoc-ema.json").read_text())["checkpoint_dir"]
    )
    assert run.step == 60


def test_killed_training_script_resumes_with_the_same_bits(script: Callable[..., None], tmp_path: Path) -> None:
    script(EXAMPLE, "--out", "whole")
    program = f"""
import os, runpy, signal, sys
from posthoc_ema.integrations.diffusers import EMAModel
own_step = EMAModel.step
def step(self, parameters):
    own_step(self, parameters)
    if self.optimization_step == 50:
        os.kill(os.getpid(), signal.SIGKILL)
EMAModel.step = step
sys.argv = {["killed", *SIZES, "--out", "killed"]!r}
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for checkpoint in ("latest", "checkpoint-20"):
        script(EXAMPLE, "--out", "killed", "--resume_from_checkpoint", checkpoint)
        for folder in ("unet", "unet-0.05", "unet-0.1", "unet-0.2"):
            whole = weights_in(tmp_path / "whole" / folder)
            resumed = weights_in(tmp_path / "killed" / folder)
            assert all(torch.equal(resumed[name], whole[name]) for name in whole), (checkpoint, folder)
    # Two trainings, two runs.
    assert len(list((tmp_path / "posthoc-ema").iterdir())) == 2
