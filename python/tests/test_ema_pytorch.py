"""`PostHocEMA` and `KarrasEMA` of ema-pytorch: the same calls there and here, and averages compared with float64."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ema_pytorch as theirs
import numpy as np
import pytest
import torch
from conftest import bits, exact, shake

from posthoc_ema import Profile
from posthoc_ema.integrations import ema_pytorch as ours

PROFILES = {"sigma_rels": (0.05, 0.28)}


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4))


def flat(module: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.detach().double().flatten() for p in module.parameters()]).cpu().numpy()


def walk(model: torch.nn.Module, emas: Any, steps: int, call: Callable[[], None] | None = None) -> np.ndarray:
    """Trains a number of steps, and returns the parameters after each."""
    values = []
    for _ in range(steps):
        shake(model)
        values.append(flat(model))
        emas.update()
        if call is not None:
            call()
    return np.stack(values)


def relative(module: torch.nn.Module, expected: np.ndarray) -> float:
    """Returns the largest difference of a module's parameters relative to the RMS of the expected ones."""
    return float(np.abs(flat(module) - expected).max() / np.sqrt((expected**2).mean()))


def at_updates(values: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns times and values of updates at multiples of an interval."""
    times = np.arange(every, len(values) + 1, every)
    return times, values[times - 1]


@pytest.mark.parametrize("name", ["PostHocEMA", "KarrasEMA"])
def test_constructors_and_methods_are_those_of_ema_pytorch(name: str) -> None:
    there, here = getattr(theirs, name), getattr(ours, name)
    wanted = dict(inspect.signature(there).parameters)
    arguments = dict(inspect.signature(here).parameters)
    # `**kwargs` of PostHocEMA are arguments of KarrasEMA.
    if wanted.pop("kwargs", None) is not None:
        others = inspect.signature(theirs.KarrasEMA).parameters
        assert set(others) - {"model", "ema_model", "sigma_rel", "gamma"} <= set(arguments)
    assert list(arguments)[: len(wanted)] == list(wanted)
    for key, parameter in wanted.items():
        assert arguments[key].default in (parameter.default, ()) or parameter.default == set(), key
    public = {key for key in vars(there) if not key.startswith("_")}
    internal = {"get_params_iter", "get_buffers_iter", "iter_all_ema_params_and_buffers", "update_moving_average"}
    assert public - internal - {"copy_params_from_model_to_ema"} <= set(dir(here))


def ramp(module: Any, folder: Path, every: int) -> float:
    """Returns the average at sigma_rel 0.15 of a weight that goes from 0 to 1 over 4,000 steps."""
    model = torch.nn.Linear(1, 1, bias=False)
    emas = module.PostHocEMA(
        model,
        sigma_rels=(0.05, 0.28),
        update_every=every,
        checkpoint_every_num_steps=200,
        checkpoint_dtype=torch.float32,
        checkpoint_folder=str(folder),
    )
    for step in range(4000):
        with torch.no_grad():
            model.weight.fill_(step / 3999)
        emas.update()
    synthesized = emas.synthesize_ema_model(sigma_rel=0.15)
    assert isinstance(synthesized, module.KarrasEMA)
    return float(synthesized(torch.ones(1, 1)))


@pytest.mark.parametrize("every", [1, 10, 100])
def test_length_is_right_for_any_interval_here_only(tmp_path: Path, every: int) -> None:
    expected = float(exact(Profile.sigma_rel(0.15), *at_updates(np.arange(4000) / 3999, every)))
    assert ramp(ours, tmp_path / "ours", every) == pytest.approx(expected, abs=0.002)
    error = abs(ramp(theirs, tmp_path / "theirs", every) - expected)
    assert error < 0.01 if every == 1 else error > 0.4


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("given", [{"sigma_rels": (0.05, 0.28)}, {"gammas": (16.97, 6.94)}])
def test_averages_are_exact(tmp_path: Path, every: int, given: dict[str, Any]) -> None:
    model = net()
    first = flat(model)
    emas = ours.PostHocEMA(model, **given, update_every=every, checkpoint_folder=tmp_path / "run")
    assert np.array_equal(flat(emas.ema_models[0].ema_model), first) and not emas.ema_models[0].initted
    values = walk(model, emas, 200)
    assert emas.step.item() == 200 and emas.ema_models[1].initted and emas.model is model
    assert emas.gammas == pytest.approx([average.gamma for average in emas.ema_models])
    profiles = [*map(Profile.sigma_rel, given.get("sigma_rels", ())), *map(Profile.gamma, given.get("gammas", ()))]
    for average, profile in zip(emas.ema_models, profiles):
        expected = exact(profile, *at_updates(values, every))
        assert relative(average.ema_model, expected) < 1e-6
    # One of the tracked lengths, which needs no approximation, in a module of its own.
    synthesized = emas.synthesize_ema_model(gamma=emas.gammas[1])
    assert relative(synthesized.ema_model, expected) < 1e-6 and synthesized.ema_model is not average.ema_model
    outputs = emas.eval()(torch.ones(2, 8))
    assert len(outputs) == 2 and outputs[1].shape == (2, 4)
    assert torch.equal(outputs[1], average.ema_model(torch.ones(2, 8)))


@pytest.mark.parametrize("every", [1, 10])
def test_single_average_is_exact(every: int) -> None:
    model = net()
    average = ours.KarrasEMA(model, sigma_rel=0.1, update_every=every)
    values = walk(model, average, 191)
    times = np.arange(1, 192, every)
    expected = exact(Profile.sigma_rel(0.1), times, values[times - 1])
    assert relative(average.ema_model, expected) < 1e-6
    assert average.step.item() == 191 and average.initted
    assert average.beta == pytest.approx((190 / 191) ** (average.gamma + 1))
    average.copy_params_from_ema_to_model()
    assert np.array_equal(flat(model), flat(average.ema_model))
    with pytest.raises(ValueError, match="give either"):
        ours.KarrasEMA(model)


def test_names_are_ignored_or_copied(tmp_path: Path) -> None:
    model = net()
    first = bits(model)
    options = {
        "param_or_buffer_names_no_ema": {"2.bias"},
        "ignore_names": {"0.bias"},
        "ignore_startswith_names": {"1."},
    }
    emas = ours.PostHocEMA(model, **PROFILES, update_every=1, checkpoint_folder=tmp_path / "run", **options)
    single = ours.KarrasEMA(model, sigma_rel=0.28, update_every=1, **options)
    walk(model, emas, 20, single.update)
    now = bits(model)
    made = emas.synthesize_ema_model(sigma_rel=0.28)
    # As in ema-pytorch, a new module has the ignored tensors of the present model.
    for module, ignored in ((emas.ema_models[1], first), (single, first), (made, now)):
        held = bits(module.ema_model)
        assert held["0.bias"] == ignored["0.bias"] and held["1.weight"] == ignored["1.weight"]
        assert held["2.bias"] == now["2.bias"]
        assert held["0.weight"] not in (first["0.weight"], now["0.weight"])


def test_snapshots_are_stored_on_request_only(tmp_path: Path) -> None:
    model = net()
    folder = tmp_path / "run"
    emas = ours.PostHocEMA(
        model, **PROFILES, update_every=5, checkpoint_every_num_steps="manual", checkpoint_folder=folder
    )
    walk(model, emas, 4)
    with pytest.raises(RuntimeError, match="no update yet, which is due at step 5"):
        emas.checkpoint()
    walk(model, emas, 26)
    assert not list(folder.glob("*.*.safetensors"))
    emas.checkpoint()
    assert {path.name for path in folder.glob("*.*.safetensors")} == {"0.30.safetensors", "1.30.safetensors"}
    walk(model, emas, 20)
    emas.checkpoint()
    emas.checkpoint()
    assert len(list(folder.glob("*.*.safetensors"))) == 4
    assert bits(emas.synthesize_ema_model(sigma_rel=0.28, step=30).ema_model)


def test_average_of_another_process_is_made_from_the_folder(tmp_path: Path) -> None:
    model = net()
    emas = ours.PostHocEMA(model, **PROFILES, update_every=1, checkpoint_folder=tmp_path / "run")
    walk(model, emas, 30)
    expected = bits(emas.synthesize_ema_model(sigma_rel=0.28).ema_model)
    emas.checkpoint()
    emas.posthoc.close()
    fresh = ours.PostHocEMA(net(), **PROFILES, checkpoint_folder=tmp_path / "run", checkpoint_dtype=None)
    made = fresh.synthesize_ema_model(sigma_rel=0.28).ema_model
    # Snapshots are stored in 16 bits.
    for name, tensor in net().state_dict().items():
        stored = np.frombuffer(bits(made)[name], np.float32 if tensor.is_floating_point() else np.int64)
        own = np.frombuffer(expected[name], stored.dtype)
        assert np.allclose(stored, own, rtol=2**-10, atol=2**-14), name
    with pytest.raises(ValueError, match="already contains checkpoints"):
        fresh.update()
    with pytest.raises(FileNotFoundError):
        ours.PostHocEMA(net(), **PROFILES, checkpoint_folder=tmp_path / "none").synthesize_ema_model(sigma_rel=0.1)


class Trainer(torch.nn.Module):
    """Module that holds the averages, as the trainers of ema-pytorch's author do."""

    def __init__(self, folder: Path, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.net = net()
        if kind == "PostHocEMA":
            self.ema: Any = ours.PostHocEMA(
                self.net, **PROFILES, update_every=3, checkpoint_every_num_steps=20, checkpoint_folder=folder
            )
        else:
            self.ema = ours.KarrasEMA(self.net, sigma_rel=0.1, update_every=3)

    def walk(self, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            shake(self.net)
            self.ema.update()


def test_training_continues_from_a_state_dict_with_the_same_bits(tmp_path: Path) -> None:
    undisturbed = Trainer(tmp_path / "undisturbed", "PostHocEMA")
    undisturbed.walk(range(70))
    trainer = Trainer(tmp_path / "run", "PostHocEMA")
    trainer.walk(range(31))
    torch.save(trainer.state_dict(), tmp_path / "trainer.pt")
    # Further than the next snapshot, before the training goes back; then once more within the same process.
    trainer.walk(range(31, 50))
    trainer.ema.posthoc.close()
    resumed = Trainer(tmp_path / "run", "PostHocEMA")
    for _ in range(2):
        resumed.load_state_dict(torch.load(tmp_path / "trainer.pt", weights_only=True))
        assert resumed.ema.step.item() == 31
        resumed.walk(range(31, 70))
    one, other = (each.state_dict() for each in (resumed, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in other if not name.endswith("_extra_state"))
    for each in (resumed, undisturbed):
        each.ema.checkpoint()
    made = [each.ema.synthesize_ema_model(sigma_rel=0.15).ema_model for each in (resumed, undisturbed)]
    assert bits(made[0]) == bits(made[1])
    files = [sorted(path.name for path in (tmp_path / name).glob("*.*.safetensors")) for name in ("run", "undisturbed")]
    assert files[0] == files[1] and "1.69.safetensors" in files[0]


def test_single_average_continues_from_a_state_dict(tmp_path: Path) -> None:
    undisturbed = Trainer(tmp_path, "KarrasEMA")
    undisturbed.walk(range(70))
    trainer = Trainer(tmp_path, "KarrasEMA")
    trainer.walk(range(31))
    torch.save(trainer.state_dict(), tmp_path / "trainer.pt")
    resumed = Trainer(tmp_path, "KarrasEMA")
    resumed.load_state_dict(torch.load(tmp_path / "trainer.pt", weights_only=True))
    resumed.walk(range(31, 70))
    assert resumed.ema.step.item() == 70
    assert relative(resumed.ema.ema_model, flat(undisturbed.ema.ema_model)) < 1e-6


def test_state_dict_of_ema_pytorch_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = net()
    there = theirs.PostHocEMA(model, **PROFILES, checkpoint_folder=str(tmp_path / "theirs"))
    here = ours.PostHocEMA(model, **PROFILES, checkpoint_folder=tmp_path / "run")
    with pytest.raises(RuntimeError, match="no state of a run.*import_run"):
        here.load_state_dict(there.state_dict())


def test_keys_of_the_state_dict_are_those_of_ema_pytorch(tmp_path: Path) -> None:
    model = net()
    there = theirs.PostHocEMA(model, **PROFILES, checkpoint_folder=str(tmp_path / "theirs"))
    here = ours.PostHocEMA(model, **PROFILES, checkpoint_folder=tmp_path / "run")
    assert set(here.state_dict()) - set(there.state_dict()) == {"_extra_state"}
    assert set(there.state_dict()) <= set(here.state_dict())
    assert set(ours.KarrasEMA(model, sigma_rel=0.1).state_dict()) == set(
        theirs.KarrasEMA(model, sigma_rel=0.1).state_dict()
    )


def test_averaged_modules_may_be_moved(tmp_path: Path) -> None:
    model = torch.nn.Conv2d(2, 3, 2)
    emas = ours.PostHocEMA(model, **PROFILES, update_every=1, checkpoint_folder=tmp_path / "run")
    single = ours.KarrasEMA(model, sigma_rel=0.28, update_every=1)
    values = walk(model, emas, 5, single.update)
    for each in (emas, single):
        # Elements of another order in memory, and of another dtype.
        each.to(memory_format=torch.channels_last).double()
    more = walk(model, emas, 5, single.update)
    expected = exact(Profile.sigma_rel(0.28), np.arange(1, 11), np.concatenate([values, more]))
    for average in (emas.ema_models[1], single):
        assert relative(average.ema_model, expected) < 1e-6
        assert average.ema_model.weight.dtype == torch.float64
        assert average.ema_model.weight.is_contiguous(memory_format=torch.channels_last)


def test_modules_that_cannot_be_copied_are_given(tmp_path: Path) -> None:
    class Single(torch.nn.Linear):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("no copies")

    def new() -> torch.nn.Module:
        return Single(3, 2)

    model = new()
    emas = ours.PostHocEMA(model, ema_model=new, **PROFILES, update_every=1, checkpoint_folder=tmp_path / "run")
    single = ours.KarrasEMA(model, sigma_rel=0.28, ema_model=new(), update_every=1)
    values = walk(model, emas, 5, single.update)
    expected = exact(Profile.sigma_rel(0.28), np.arange(1, 6), values)
    for average in (emas.ema_models[1], single, emas.synthesize_ema_model(sigma_rel=0.28)):
        assert relative(average.ema_model, expected) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either sigma_rels or gammas"),
        ({"sigma_rels": (0.05, 0.28), "gammas": (1.0, 2.0)}, "give either sigma_rels or gammas"),
        ({"sigma_rels": (0.05,)}, "at least two profiles that differ"),
        ({"gammas": (1.0, 1.0)}, "at least two profiles that differ"),
        ({"sigma_rels": (0.05, 0.5)}, "0.288675"),
        ({"sigma_rels": (0.05, 0.28), "ema_model": net()}, "each average needs its own"),
    ],
)
def test_invalid_profiles_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.PostHocEMA(net(), checkpoint_folder=tmp_path / "run", **options)


def test_frozen_averages_keep_the_first_values(tmp_path: Path) -> None:
    model = net()
    first = bits(model)
    emas = ours.PostHocEMA(model, **PROFILES, update_every=1, frozen=True, checkpoint_folder=tmp_path / "run")
    walk(model, emas, 5)
    assert bits(emas.ema_models[0].ema_model) == first and emas.step.item() == 5
    assert not (tmp_path / "run").exists()


def test_no_other_framework_is_imported() -> None:
    frameworks = {"ema_pytorch", "diffusers", "transformers", "accelerate", "lightning", "timm"}
    program = (
        "import sys, posthoc_ema.integrations; assert 'torch' not in sys.modules\n"
        f"import posthoc_ema.integrations.ema_pytorch; print(sorted({frameworks!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_example_continues_and_prints_losses(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "ema_pytorch_digits.py"
    out = tmp_path / "two"

    def run(folder: Path, steps: int) -> str:
        command = [sys.executable, "-W", "error", str(script), "--out", str(folder), "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # A step with a snapshot: the end of a process stores one.
    run(out, 500)
    resumed = run(out, 500)
    assert resumed.startswith("step 1000, ") and len(resumed.splitlines()) == 6
    assert resumed == run(tmp_path / "one", 1000)


def test_killed_training_continues_from_its_folder(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_ema_pytorch import Trainer
from pathlib import Path
trainer = Trainer(Path("run"), "PostHocEMA")
trainer.walk(range(47))
trainer.ema.posthoc.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    undisturbed = Trainer(tmp_path / "undisturbed", "PostHocEMA")
    undisturbed.walk(range(60))
    model = Trainer(tmp_path / "unused", "PostHocEMA").net
    emas = ours.PostHocEMA(
        model,
        **PROFILES,
        update_every=3,
        checkpoint_every_num_steps=20,
        checkpoint_folder=tmp_path / "run",
        resume=True,
    )
    first = emas.step.item()
    assert 40 <= first <= 47
    # A trainer loads the model of this step. Here it is trained once more.
    for step in range(60):
        torch.manual_seed(step)
        shake(model)
        if step >= first:
            emas.update()
            assert emas.step.item() == step + 1
    for here, there in zip(emas.ema_models, undisturbed.ema.ema_models):
        assert bits(here.ema_model) == bits(there.ema_model)
