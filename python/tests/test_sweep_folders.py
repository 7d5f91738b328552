"""Sweeps whose averages are files and folders that the model's own library loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_like import EVEN, assert_is_average, assert_loads, llama, state_of, tracked

from posthoc_ema import PostHocEMA, Profile, average

LENGTHS = [Profile.uniform(fraction=fraction) for fraction in (0.5, 1.0)]


class Evaluation:
    """Score of a folder: the negative window of its average, which the metadata have."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def __call__(self, path: Path, second: Path | None = None) -> float:
        self.paths.append(path)
        for folder in filter(None, (path, second)):
            assert_loads(pytest.importorskip("transformers").AutoModelForCausalLM, folder)
        return float(len(self.paths))


def test_evaluation_gets_a_folder_that_transformers_load(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "like")
    ema = tracked(tmp_path / "ema", model, steps=6)
    for out in (None, tmp_path / "sweep"):
        evaluate = Evaluation()
        options: dict[str, Any] = dict(like=tmp_path / "like", refine=0, out=out, name="loads", progress=False)
        swept = ema.sweep(evaluate, [EVEN, LENGTHS[0]], **options)
        assert [trial.error for trial in swept.results] == [None, None]
        assert swept.best.profile == EVEN
        # A folder exists for its evaluation only, whether there is a directory of the sweep or not.
        assert len(set(evaluate.paths)) == 2 and not any(path.exists() for path in evaluate.paths)
        assert swept.best.path == (out and out / "best")
    best = assert_loads(pytest.importorskip("transformers").AutoModelForCausalLM, tmp_path / "sweep" / "best")
    assert_is_average(state_of(best), ema)
    assert {path.name for path in (tmp_path / "sweep").iterdir() if not path.name.startswith(".")} == {
        "best",
        "sweep.json",
    }
    # The same call evaluates nothing again, and another form is another sweep.
    assert ema.sweep(evaluate, [EVEN, LENGTHS[0]], **options).best.profile == EVEN and len(evaluate.paths) == 2
    with pytest.raises(ValueError, match="has another form"):
        ema.sweep(evaluate, [EVEN, LENGTHS[0]], **{**options, "shard_size": "10KB"})
    (tmp_path / "sweep" / "evaluating").mkdir()
    (tmp_path / "sweep" / "evaluating" / "mine").write_text("")
    assert ema.sweep(evaluate, [EVEN, LENGTHS[0]], **options).best.profile == EVEN
    assert (tmp_path / "sweep" / "evaluating" / "mine").exists()


def test_averages_of_two_runs_are_folders_of_their_own(tmp_path: Path) -> None:
    main, guide = llama(), llama(tied=False)
    for model, name in ((main, "main"), (guide, "guide")):
        model.save_pretrained(tmp_path / name)
    runs = [tracked(tmp_path / f"{name}-ema", model) for model, name in ((main, "main"), (guide, "guide"))]
    options: dict[str, Any] = dict(with_run=runs[1], refine=0, rounds=1, out=tmp_path / "sweep", name="both")
    with pytest.raises(ValueError, match="would not load"):
        runs[0].sweep(Evaluation(), LENGTHS, like=tmp_path / "main", **options)
    swept = runs[0].sweep(Evaluation(), LENGTHS, like=tmp_path / "main", with_like=tmp_path / "guide", **options)
    assert all(trial.error is None for trial in swept.results)
    assert (swept.best.path, swept.best.with_path) == (tmp_path / "sweep/best", tmp_path / "sweep/best-with")
    loader = pytest.importorskip("transformers").AutoModelForCausalLM
    assert not assert_loads(loader, tmp_path / "sweep/best-with").config.tie_word_embeddings
    assert_loads(loader, tmp_path / "sweep/best")


def test_files_in_a_form_and_refused_forms(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    ema = tracked(tmp_path / "ema", model)
    names: list[set[str]] = []

    def evaluate(path: Path) -> float:
        names.append(set(load_file(path)))
        return 1.0

    swept = ema.sweep(evaluate, LENGTHS, rename="s/^/net./", refine=0, out=tmp_path / "sweep", name="files")
    assert names == [{"net.weight", "net.bias"}] * 2
    assert swept.best.path is not None and set(load_file(swept.best.path)) == {"net.weight", "net.bias"}
    with pytest.raises(ValueError, match="changes no name"):
        ema.sweep(evaluate, LENGTHS, rename="s/q/r/")
    with pytest.raises(ValueError, match="it goes with `with_run`"):
        ema.sweep(evaluate, LENGTHS, with_like=tmp_path)
    live = PostHocEMA.from_model(model, tmp_path / "live", update_every=1, update_after_step=0)
    live.update_(model)
    with pytest.raises(ValueError, match="give the `step` of a snapshot"):
        live.sweep(evaluate, LENGTHS, rename="s/^/net./")
    live.close()


def test_tensors_that_only_the_folder_has_are_left_out_of_checkpoints(tmp_path: Path) -> None:
    """A model with a task head becomes the folder of checkpoints without one."""
    transformers = pytest.importorskip("transformers")
    model = llama(tied=False)
    model.save_pretrained(tmp_path / "like")
    paths = []
    for step in (1, 2):
        state = {name: tensor * step for name, tensor in state_of(model).items() if name != "lm_head.weight"}
        paths.append(tmp_path / f"step_{step}.pt")
        torch.save(state, paths[-1])
    options: dict[str, Any] = dict(like=tmp_path / "like")
    with pytest.raises(ValueError, match=r"the average has no `lm_head.weight`"):
        average(paths, EVEN, tmp_path / "refused", **options)
    with pytest.warns(UserWarning, match="left out, though the folder .* has it: `lm_head.weight`"):
        average(paths, EVEN, tmp_path / "out", leave_out=["lm_head.*"], **options)
    loaded = assert_loads(transformers.AutoModel, tmp_path / "out")
    assert torch.equal(loaded.norm.weight, 1.5 * model.model.norm.weight)
    with pytest.raises(ValueError, match="`head.*` matches no tensor"):
        average(paths, EVEN, tmp_path / "other", leave_out=["head.*"], **options)
