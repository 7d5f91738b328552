"""Imports of checkpoints of other tools."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import allowance, exact

from posthoc_ema import PostHocEMA, Profile, import_run

FILES = Path(__file__).resolve().parents[2] / "tests" / "data" / "foreign"


def test_ramp_of_pytorch_posthoc_ema_gives_exact_averages(tmp_path: Path) -> None:
    reported: list[tuple[int, int | None]] = []
    imported = import_run(
        FILES / "ramp",
        tmp_path / "run",
        sigma_rels=(0.05, 0.28),
        update_every=10,
        progress=lambda done, total: reported.append((done, total)),
    )
    assert imported.snapshots == 40 and imported.steps == tuple(range(1000, 20_001, 1000))
    assert imported.bytes == sum(path.stat().st_size for path in (tmp_path / "run").glob("*.safetensors"))
    assert reported[-1][0] > 0 and reported[-1][1] is not None
    run = PostHocEMA.from_path(tmp_path / "run")
    times = np.arange(100, 20_001, 10)
    for sigma_rel in (0.05, 0.10, 0.15, 0.20, 0.25):
        profile, (average,), (plan,) = Profile.sigma_rel(sigma_rel), run.synthesize([sigma_rel]), run.plan([sigma_rel])
        right = exact(profile, times, times / 20_000)
        # The profile's error, and the float32 rounding of the tool's averages as the blend amplifies it.
        allowed = allowance(profile, times, times / 20_000, plan.relative_error) + 1e-6 * plan.noise_gain
        assert plan.relative_error < 0.03
        assert abs(average["weight"][0].item() - right) <= allowed, (sigma_rel, average, right, allowed)
    assert abs(run.synthesize([0.15])[0]["weight"][0].item() - 0.820) < 0.002


@pytest.mark.parametrize(
    ("tool", "folder", "options", "noise"),
    [
        ("ema-pytorch", "ema", {}, 1e-3),
        ("nitrous-ema", "nitrous", {}, 1e-5),
        ("nitrous-ema", "corrected", {"step_size_correction": True}, 1e-5),
    ],
)
def test_other_tools_give_exact_averages(
    tmp_path: Path, tool: str, folder: str, options: dict[str, bool], noise: float
) -> None:
    imported = import_run(FILES / folder, tmp_path / "run", tool, sigma_rels=(0.05, 0.28), update_every=10, **options)
    assert imported.steps == (201, 401, 611, 811)
    run = PostHocEMA.from_path(tmp_path / "run")
    times = np.arange(1, 812, 10)
    values = np.sin(times / 100)
    (average,), (plan,) = run.synthesize([0.15]), run.plan([0.15])
    right = exact(Profile.sigma_rel(0.15), times, values)
    allowed = allowance(Profile.sigma_rel(0.15), times, values, plan.relative_error) + noise * plan.noise_gain
    assert abs(average["weight"][0, 0].item() - right) <= allowed


def test_remarks_are_warnings(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="`norm.running_mean` is the same"):
        imported = import_run(FILES / "prefixed", tmp_path / "run", sigma_rels=(0.05, 0.28), update_every=10)
    (warning,) = imported.warnings
    assert warning.startswith("`norm.running_mean` is the same")


def test_broken_link_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "old"
    shutil.copytree(FILES / "ema", source)
    (source / "model.pt").symlink_to(tmp_path / "nothing")
    with pytest.warns(UserWarning, match="model.pt is left out"):
        import_run(
            source,
            tmp_path / "run",
            "ema-pytorch",
            sigma_rels=(0.05, 0.28),
            update_every=10,
            progress=lambda done, total: None,
        )


def command(trap: Path) -> bytes:
    """Returns the pickle of an object that runs a command, without header and end."""
    buffer = pickle.dumps(Hostile(trap), protocol=2)
    return buffer[2:-1]


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.path}",)


def hostile(path: Path, trap: Path) -> None:
    """Writes a checkpoint in PyTorch's format whose pickle runs a command."""
    torch.save({"weight": torch.zeros(2), "initted": torch.tensor(True), "step": torch.tensor(901)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            if name.endswith("data.pkl"):
                # The pickle ends with a dict and `.`: the entry goes into that dict, beside the sound ones.
                data = data[:-1] + b"X\x06\0\0\0config" + command(trap) + b"s."
            archive.writestr(name, data)


def test_hostile_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    source, trap = tmp_path / "old", tmp_path / "trap"
    source.mkdir()
    for index in (0, 1):
        hostile(source / f"{index}.1000.pt", trap)
    with pytest.raises(ValueError, match=r"0\.1000\.pt: `config` is a Python object \(`posix\.system`\)"):
        import_run(source, tmp_path / "run", sigma_rels=(0.05, 0.28), update_every=10)
    assert not trap.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sigma_rels": (0.05,)}, "this is an average of profile 1, counted from 0, and 1 are given"),
        ({"sigma_rels": (0.05, 0.1, 0.28)}, "3"),
        ({"sigma_rels": (0.05, 0.28), "update_after_step": 50}, "update_after_step"),
        ({"sigma_rels": (0.05, 0.4)}, "sigma_rel = 0.4"),
        ({"sigma_rels": (0.05, 0.28), "tool": "torch"}, "cannot import from `torch`"),
        ({"sigma_rels": (0.05, 0.28), "step_size_correction": True}, "step_size_correction"),
    ],
)
def test_options_that_contradict_the_files_are_refused(
    tmp_path: Path, options: dict[str, object], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        import_run(FILES / "ramp", tmp_path / "run", update_every=10, **options)
    assert not list(tmp_path.iterdir())


def test_source_is_unchanged_and_target_must_be_new(tmp_path: Path) -> None:
    source = tmp_path / "old"
    shutil.copytree(FILES / "ramp", source)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    import_run(source, tmp_path / "run", sigma_rels=(0.05, 0.28), update_every=10)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before
    with pytest.raises(FileExistsError, match="already holds a run"):
        import_run(source, tmp_path / "run", sigma_rels=(0.05, 0.28), update_every=10)
    with pytest.raises((OSError, ValueError), match="nowhere"):
        import_run(tmp_path / "nowhere", tmp_path / "other", sigma_rels=(0.05, 0.28), update_every=10)
