"""A model on a GPU without usable kernels: averages are right, and a warning names the reason once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from posthoc_ema import PostHocEMA, _lend


class OnGpu(torch.Tensor):
    """Tensor that says that it is on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lend, "cuda_usable", lambda: False)
    _lend.warn_of_copies.cache_clear()


def test_reason_is_a_warning_once(tmp_path: Path, unusable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the NVIDIA driver supports CUDA 11.8, the kernels need 12.0: update it to version 525 or later"
    monkeypatch.setattr(_lend._native, "CUDA", True)
    monkeypatch.setattr(_lend._native, "cuda_devices", lambda: (0, reason))
    model = {"weight": torch.ones(3).as_subclass(OnGpu)}
    with pytest.warns(RuntimeWarning, match="one by one.*update it to version 525") as caught:
        ema = PostHocEMA.from_model(model, tmp_path / "run", update_every=1, update_after_step=0)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.update_(model)
        PostHocEMA.from_model(dict(model), tmp_path / "other").close()
    assert ema.synthesize([0.1])[0]["weight"].tolist() == [1, 1, 1]
    ema.close()


def test_build_without_cuda_names_its_remedy(unusable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lend._native, "CUDA", False)
    with pytest.warns(RuntimeWarning, match="POSTHOC_EMA_CUDA=1"):
        _lend.Lender([("weight", torch.ones(3).as_subclass(OnGpu))])


def test_model_in_host_memory_needs_no_warning(unusable: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _lend.Lender([("weight", torch.ones(3))])
