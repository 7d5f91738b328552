"""Helpers of the tests: models that move, and averages computed without the package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posthoc_ema import PostHocEMA, Profile


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def groups() -> Iterator[list[Any]]:
    """List of the group of the tests, which another one replaces after a hang."""
    made: list[Any] = []
    yield made
    for each in made:
        each.close()


@pytest.fixture
def group(groups: list[Any]) -> Any:
    """Processes that run functions together; see `process_group.Group`."""
    from process_group import SIZE, sized_group

    return sized_group(groups, SIZE)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Path of a run's directory that does not exist yet."""
    return tmp_path / "ema"


def shake(model: torch.nn.Module, size: float = 0.1) -> None:
    """Moves the parameters of a model in the place of an optimiser."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)


def train(ema: PostHocEMA, model: torch.nn.Module, steps: int, step: Callable[[int], None] | None = None) -> None:
    """Trains a number of steps and waits for all snapshots."""
    for i in range(1, steps + 1):
        shake(model) if step is None else step(i)
        ema.update_(model)
    ema.flush()


class DlpackOnly:
    """Array that can only be shared by DLPack."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """Returns every bit of a model's parameters and buffers, in the order of their indices."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    resolved = {name: tensor.detach().resolve_conj().resolve_neg().contiguous() for name, tensor in named}
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in resolved.items()}


def masses(profile: Profile, times: np.ndarray) -> np.ndarray:
    """Returns the share of each update in the average after the last; the first one has the time before it, too."""
    shares = np.array(profile.cumulative(times.tolist(), float(times[-1])))
    return np.diff(shares, prepend=0.0)


def exact(profile: Profile, times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the average of values of shape (updates, ...) at times, in float64, by its definition."""
    return np.tensordot(masses(profile, times), values.astype(np.float64), axes=1)


def allowance(profile: Profile, times: np.ndarray, values: np.ndarray, relative_error: float) -> np.ndarray:
    """Returns the largest difference of a blend of a relative error, by Cauchy-Schwarz over the updates.

    The weights of the blend and those of the target sum to 1, so a constant in the values has no effect.
    """
    intervals = np.diff(times, prepend=0).astype(np.float64)
    norm = np.sqrt((masses(profile, times) ** 2 / intervals).sum())
    spread = values - np.median(values, axis=0)
    return relative_error * norm * np.sqrt(np.tensordot(intervals, spread.astype(np.float64) ** 2, axes=1))


PAGES = Path(__file__).parents[2] / "docs" / "how-to"


def code_of(page: str, heading: str = "") -> list[str]:
    """Returns the Python code of a section of a how-to page; by default of what is above the first heading."""
    top, *sections = re.split(r"^## ", (PAGES / page).read_text(), flags=re.MULTILINE)
    (text,) = [section for section in sections if section.partition("\n")[0] == heading] if heading else [top]
    found = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no code under {heading!r}"
    return found


def run_code(code: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs code with names of its own, and returns all names."""
    names = dict(names)
    exec(compile(code, "page", "exec"), names)
    return names


class RecordedWeights:
    """Weights of a layer after each optimizer step, for averages computed without the package."""

    def __init__(self, layer: torch.nn.Module):
        self._layer = layer
        self.seen: list[np.ndarray] = []

    def add(self) -> None:
        """Records the weights after a step."""
        self.seen.append(self._layer.weight.detach().double().numpy().copy())

    def check(self, ema: PostHocEMA, name: str = "weight") -> None:
        """Compares averages of a run, of which each step was an update, with those of the recorded weights."""
        times = np.arange(1, len(self.seen) + 1)
        assert ema.last_update == len(self.seen) > 0
        averages = ema.synthesize(ema.profiles)
        assert len(averages) > 0
        for profile, average in zip(ema.profiles, averages):
            right = exact(profile, times, np.stack(self.seen))
            got = average[name].detach().double().numpy()
            assert np.all(np.abs(got - right) <= 4e-7), (profile, got, right)


EACH_STEP = {"update_every": 1, "update_after_step": 0, "checkpoint_every": 1000}
"""Schedule by which each step is an update."""
