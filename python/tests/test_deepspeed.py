"""Checkpoints of DeepSpeed, recorded by `data/deepspeed.py`, are averaged without it."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posthoc_ema import Profile, average

EVEN = Profile.uniform(fraction=1.0)
ARCHIVE = Path(__file__).parent / "data/deepspeed.tar.xz"
MASTERS = "the f32 weights of DeepSpeed's optimizer are averaged"
SHAPES = {
    "count": (),
    "first.bias": (5,),
    "first.weight": (5, 7),
    "frozen.bias": (3,),
    "frozen.weight": (3, 3),
    "norm.bias": (5,),
    "norm.weight": (5,),
    "scale": (1,),
    "second.weight": (3, 5),
    "table": (3,),
    "tied.weight": (3, 5),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def runs(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "runs"))


def mean(paths: list[Path], key: str | None = None) -> dict[str, torch.Tensor]:
    (found,) = average(paths, EVEN, key=key)
    assert [weight.step for weight in found.weights] == [2, 4]
    assert found.state_dict is not None
    return dict(found.state_dict)


def assert_is_mean(found: dict[str, torch.Tensor], states: list[dict[str, torch.Tensor]]) -> None:
    for name, tensor in found.items():
        exact = (states[0][name].double() + states[1][name].double()) / 2
        assert tensor.shape == SHAPES[name], name
        expected = exact.to(tensor.dtype) if tensor.is_floating_point() else states[1][name]
        assert torch.equal(tensor, expected.to(tensor.dtype)), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_of_the_optimizer_are_what_deepspeeds_script_finds(recorded: Path, stage: int) -> None:
    states = [load_file(recorded / f"expected/stage{stage}-{step}.safetensors") for step in (2, 4)]
    with pytest.warns(UserWarning, match=MASTERS):
        found = mean([recorded / f"stage{stage}"])
    assert found.keys() == SHAPES.keys()
    if stage == 1:
        # The script forgets frozen parameters in stage 1.
        frozen = {name: found.pop(name) for name in ("frozen.weight", "frozen.bias")}
        module = torch.load(next(recorded.glob("stage1/global_step4/mp_rank_00_*")), weights_only=False)["module"]
        assert all(torch.equal(tensor, module[name]) for name, tensor in frozen.items())
    assert found.keys() == states[0].keys()
    trained = [name for name in found if not name.startswith(("frozen", "count"))]
    assert all(found[name].dtype == torch.float32 for name in trained)
    assert_is_mean(found, states)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weights_of_the_module_can_be_chosen(recorded: Path, stage: int) -> None:
    files = [recorded / f"stage{stage}/global_step{step}/mp_rank_00_model_states.pt" for step in (2, 4)]
    states = [torch.load(file, weights_only=False)["module"] for file in files]
    found = mean([recorded / f"stage{stage}"], key="module")
    assert found.keys() == SHAPES.keys()
    assert found["first.weight"].dtype == torch.bfloat16
    assert_is_mean(found, states)


def test_without_the_optimizers_files_the_module_is_averaged(runs: Path) -> None:
    run = runs / "stage2"
    for path in run.glob("*/*_optim_states.pt"):
        path.unlink()
    with pytest.warns(UserWarning, match="the folder lacks the files of DeepSpeed's optimizer"):
        found = mean([run])
    assert found["first.weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"`\*_optim_states.pt`, which have the weights in f32, are missing"):
        mean([run], key="fp32")
    assert mean([runs / "stage0"])["first.weight"].dtype == torch.bfloat16


def test_folders_of_trainers_lead_to_the_latest_checkpoint(runs: Path) -> None:
    for step in (2, 4):
        folder = runs / f"hf/checkpoint-{step}"
        shutil.copytree(runs / f"stage3/global_step{step}", folder / f"global_step{step}")
        (folder / "latest").write_text(f"global_step{step}")
    with pytest.warns(UserWarning, match=MASTERS):
        expected = mean([runs / "stage3"])
        for paths in ([runs / "hf"], [runs / "hf/checkpoint-2", runs / "hf/checkpoint-4"]):
            found = mean(paths)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    (runs / "hf/checkpoint-4/latest").write_text("global_step6")
    with pytest.raises(ValueError, match="it names `global_step6`, where no checkpoint of DeepSpeed is"):
        mean([runs / "hf/checkpoint-2", runs / "hf/checkpoint-4"])


@pytest.mark.parametrize(
    ("stage", "missing", "message"),
    [
        (2, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", ", but --key module"),
        (3, "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", ""),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt", ""),
    ],
)
def test_missing_files_are_named(runs: Path, stage: int, missing: str, message: str) -> None:
    (runs / f"stage{stage}/global_step4/{missing}").unlink()
    expected = f"global_step4: `{missing}` of 3 processes is missing: the checkpoint is incomplete{message}"
    with pytest.raises(ValueError, match=expected):
        mean([runs / f"stage{stage}"])


def test_files_of_other_checkpoints_are_refused(runs: Path) -> None:
    first = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shutil.copy(runs / f"stage3/global_step2/{first}", runs / f"stage2/global_step2/{first}")
    with pytest.raises(ValueError, match="it is of another stage of ZeRO than the module's state"):
        mean([runs / "stage2"])
    for stage, key in [(1, "single_partition_of_fp32_groups"), (3, "fp32_flat_groups")]:
        path = next((runs / f"stage{stage}/global_step2").glob("*rank_1*optim*"))
        for size, message in [(90, "the files are of different checkpoints"), (1, "leads out of the processes' parts")]:
            groups = [torch.ones(size), torch.ones(size)]
            torch.save({"optimizer_state_dict": {"zero_stage": stage, "partition_count": 3, key: groups}}, path)
            with pytest.raises(ValueError, match=message):
                mean([runs / f"stage{stage}"])


def test_models_in_parts_are_refused(runs: Path) -> None:
    run = runs / "stage1"
    folder = run / "global_step2"
    for name, message in [
        ("mp_rank_01_model_states.pt", "is of a second model-parallel rank"),
        ("layer_01-model_00-model_states.pt", "holds layers of a pipeline or experts"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "holds layers of a pipeline or experts"),
    ]:
        shutil.copy(folder / "mp_rank_00_model_states.pt", folder / name)
        with pytest.raises(ValueError, match=f"`{name}` {message}"):
            mean([run])
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"stage 3 of ZeRO stores no whole weights of the module: --key"):
        mean([runs / "stage3"], key="module")
    with pytest.raises(ValueError, match=r"it has no entry `ema`: --key \(`key`\) may be `module` or `fp32`"):
        mean([run], key="ema")


def test_left_out_tensors_are_named(recorded: Path) -> None:
    with pytest.warns(UserWarning, match=MASTERS), pytest.warns(UserWarning, match="left out: `count` and `first.w"):
        (found,) = average([recorded / "stage3"], EVEN, leave_out=["count", "first.w*"])
    assert found.state_dict is not None
    assert found.state_dict.keys() == SHAPES.keys() - {"count", "first.weight"}


def test_shapes_that_differ_from_the_list_are_refused(runs: Path) -> None:
    path = runs / "stage2/global_step2/mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    group = next(shapes for shapes in state["param_shapes"] if "first.weight" in shapes)
    group["first.weight"] = torch.Size([7, 5])
    torch.save(state, path)
    message = r"`first.weight` has the shape \[7, 5\] in the list of shapes, but the shape \[5, 7\] in `module`: "
    with pytest.raises(ValueError, match=message):
        mean([runs / "stage2"])
    for path in (runs / "stage3/global_step2").glob("*_model_states.pt"):
        state = torch.load(path, weights_only=False)
        state["frozen_param_shapes"]["frozen.weight"] = torch.Size([2, 2])
        torch.save(state, path)
    message = r"`frozen.weight` has the shape \[2, 2\] in the list of shapes, but 9 elements in its parts: the files"
    with pytest.raises(ValueError, match=message):
        mean([runs / "stage3"])
