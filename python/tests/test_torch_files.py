"""Checkpoints as trainers write them by `torch.save`: what is beside the model does not matter."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posthoc_ema import Average, Profile, average

EVEN = Profile.uniform(fraction=1.0)


def averaged(paths: list[Path], **options: Any) -> dict[str, torch.Tensor]:
    """Returns the mean of checkpoints at the steps 1, 2, ..."""
    (found,) = average(paths, EVEN, steps=range(1, len(paths) + 1), **options)
    assert isinstance(found, Average) and found.state_dict is not None
    return found.state_dict


def assert_is_mean(found: dict[str, torch.Tensor], states: list[dict[str, torch.Tensor]]) -> None:
    """Compares with the mean in float64, rounded once; other dtypes are those of the last state."""
    assert found.keys() == states[-1].keys()
    for name, last in states[-1].items():
        exact = sum(state[name].double() for state in states) / len(states) if last.is_floating_point() else last
        assert isinstance(exact, torch.Tensor) and found[name].dtype == last.dtype
        assert torch.equal(found[name], exact.to(last.dtype)), name


class Net(torch.nn.Module):
    """Model with buffers, one of which is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        self.head = torch.nn.Linear(5, 2, bias=False)
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_buffer("scale", torch.full((1,), 2.0))


def models(count: int = 2) -> list[Net]:
    torch.manual_seed(7)
    return [Net() for _ in range(count)]


@dataclasses.dataclass
class Config:
    lr: float = 0.1


BESIDE: dict[str, Callable[[], Any]] = {
    "namespace": lambda: argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
    "dataclass": Config,
    "path": lambda: pathlib.PurePosixPath("a/b"),
    "numpy": lambda: np.float64(1.5),
    "array": lambda: np.arange(5),
    "size": lambda: torch.Size([1]),
    "dtype": lambda: torch.bfloat16,
    "device": lambda: torch.device("cpu"),
    "bytes": lambda: b"\x00\xff",
    "complex": lambda: 1 + 2j,
    "large": lambda: 2**70,
    "scheduler": lambda: torch.optim.lr_scheduler.MultiStepLR(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), [3, 6]
    ).state_dict(),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "function": lambda: np.mean,
    "itself": lambda: _loop(),
}


def _loop() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("beside", BESIDE)
def test_values_beside_the_model_do_not_matter(tmp_path: Path, beside: str, legacy: bool) -> None:
    nets = models()
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    for path, net in zip(paths, nets):
        checkpoint = {"model": net.state_dict(), beside: BESIDE[beside](), "epoch": 3}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    assert_is_mean(averaged(paths), [net.state_dict() for net in nets])


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    nets = models()
    paths = [tmp_path / f"{i}.pth.tar" for i in range(2)]
    for path, net in zip(paths, nets):
        torch.save({"state_dict": net.state_dict(), "args": Config()}, path, pickle_protocol=protocol)
    assert_is_mean(averaged(paths), [net.state_dict() for net in nets])


@pytest.mark.parametrize("save", [torch.save, lambda net, path: path.write_bytes(pickle.dumps(net))])
def test_pickled_modules_are_read_as_their_state_dict(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    nets = models()
    paths = [tmp_path / f"network-snapshot-{i}.pkl" for i in range(2)]
    for path, net in zip(paths, nets):
        save({"ema": net, "augment": None, "loss": Config()}, path)
    assert_is_mean(averaged(paths), [net.state_dict() for net in nets])
    for path, net in zip(paths, nets):
        save(net, path)
    assert_is_mean(averaged(paths), [net.state_dict() for net in nets])


def test_negated_conjugated_strided_and_tied_tensors(tmp_path: Path) -> None:
    torch.manual_seed(3)
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    states = []
    for path in paths:
        pair = torch.complex(torch.randn(4, 3), torch.randn(4, 3))
        weight = torch.randn(6, 5)
        state = {
            "neg": pair.conj().imag,
            "transposed": weight.T,
            "part": weight[1:4, ::2],
            "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "row": torch.randn(1, 3).expand(4, 3),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(2.5),
            **{f"tied.{i}": weight for i in range(12)},
        }
        assert state["neg"].is_neg()
        torch.save(state, path)
        states.append({name: tensor.resolve_neg() for name, tensor in state.items()})
    assert_is_mean(averaged(paths), states)


def test_key_chooses_among_several_models(tmp_path: Path) -> None:
    raw, ema = models(), models(4)[2:]
    paths = [tmp_path / f"{i}.pth" for i in range(2)]
    for path, *nets in zip(paths, raw, ema):
        params, average_of_it = (net.state_dict() for net in nets)
        torch.save({"params": params, "params_ema": average_of_it, "deep": {"er": params}}, path)
    with pytest.warns(UserWarning, match="the entry `params` of each checkpoint is averaged; `params_ema` hold"):
        found = averaged(paths)
    assert_is_mean(found, [net.state_dict() for net in raw])
    assert_is_mean(averaged(paths, key="params_ema"), [net.state_dict() for net in ema])
    assert_is_mean(averaged(paths, key="deep.er"), [net.state_dict() for net in raw])
    with pytest.raises(
        ValueError, match=r"no entry `none`: --key \(`key`\) must be one of `params`, `params_ema` and `d"
    ):
        averaged(paths, key="none")


def test_entries_that_are_no_tensors_are_all_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    for path in paths:
        model = {"w": torch.ones(2), "z": Config(), "a": "text", "sparse": torch.eye(2).to_sparse()}
        torch.save({"model": model}, path)
    message = (
        r"0\.pt: `z` is a Python object \(`test_torch_files\.Config`\), whose code is never run; `a` is not a tensor; "
        r"`sparse` is a tensor that is not read \(`torch\._utils\._rebuild_sparse_tensor`\): leave it out"
    )
    with pytest.raises(ValueError, match=message):
        averaged(paths)
    with pytest.warns(UserWarning, match="left out: `a`, `sparse` and `z`"):
        found = averaged(paths, leave_out=["[az]", "sparse"])
    assert_is_mean(found, [{"w": torch.ones(2)}] * 2)


def test_none_and_keys_that_are_not_texts_are_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"step_{step}.pt" for step in (1, 2)]
    for path in paths:
        torch.save({"w": torch.ones(2), "bias": None}, path)
    with pytest.warns(UserWarning, match="^None in the checkpoints, and so not in the average: `bias`$"):
        (found,) = average(paths, EVEN)
    assert found.state_dict is not None and list(found.state_dict) == ["w"]
    for key, name in [(None, "None"), (True, "True"), (1.5, "(a number)"), (("a", 0), "(a tuple)")]:
        for path in paths:
            torch.save({"model": {"w": torch.ones(2), key: torch.ones(3)}}, path)
        with pytest.raises(ValueError, match=f"a tensor is at the key {re.escape(name)}, which is not a text"):
            average(paths, EVEN)
        with pytest.warns(UserWarning, match=f"left out: `{re.escape(name)}`"):
            (found,) = average(paths, EVEN, leave_out=[name])
        assert found.state_dict is not None and list(found.state_dict) == ["w"]


def test_wrappers_of_a_model_are_looked_through(tmp_path: Path) -> None:
    nets = models(4)
    paths = [tmp_path / f"{i}.pt" for i in range(4)]
    for path, net, prefix in zip(paths, nets, ["", "_orig_mod.", "module._orig_mod.", "module."]):
        torch.save({prefix + name: tensor for name, tensor in net.state_dict().items()}, path)
    with pytest.warns(UserWarning, match=r"names its tensors as a wrapper of the model does, as in `_orig_mod\."):
        found = averaged(paths)
    assert_is_mean(found, [net.state_dict() for net in nets])


def test_coarse_and_complex_tensors_are_copied_or_left_out(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.pt" for i in range(2)]
    states = []
    for path in paths:
        state = {"w": torch.randn(3), "eight": torch.ones(3).to(torch.float8_e4m3fn), "pair": torch.randn(2) + 1j}
        torch.save(state, path)
        states.append(state)
    with pytest.raises(ValueError, match=r"tensor `(eight|pair)` is of (F8_E4M3|C64).*--copy \(`copy`\)"):
        averaged(paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = averaged(paths, copy=["eight"], leave_out=["pair"])
    assert torch.equal(found["eight"].view(torch.uint8), states[1]["eight"].view(torch.uint8))
    with pytest.raises(ValueError, match="`none` matches no tensor"):
        averaged(paths, copy=["eight", "none"], leave_out=["pair"])


def test_name_of_21_characters_is_read(tmp_path: Path) -> None:
    """Such a name hides the archive's directory from readers that look for it right before the last record."""
    nets = models()
    paths = [tmp_path / f"{'a' * 20}{i}.pt" for i in range(2)]
    for path, net in zip(paths, nets):
        torch.save(net.state_dict(), path)
    assert_is_mean(averaged(paths), [net.state_dict() for net in nets])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a pointer of Git LFS"),
        ("a.bin", b"<!DOCTYPE html><html></html>", "a web page, not a checkpoint"),
        ("a.ckpt", b"\x1f\x8b\x08" + bytes(40), "compressed with gzip"),
        ("a.pth", b"\x89HDF\r\n" + bytes(40), "an HDF5 file"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        averaged([tmp_path / name] * 2)


def test_torchscript_and_safetensors_under_another_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"rename it to end in `\.safetensors`"):
        averaged([tmp_path / "a.pt"] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "b.pt"))
    with pytest.raises(ValueError, match=r"a TorchScript program: load it with `torch\.jit\.load`"):
        averaged([tmp_path / "b.pt"] * 2)
