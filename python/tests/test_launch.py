"""The rank that launchers give a process before there is a process group."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from posthoc_ema._collective_reader import _rank_remedy
from posthoc_ema._launch import launched
from posthoc_ema._lifetime import StepCounter

VARIABLES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE NODE_RANK GROUP_RANK TORCHELASTIC_RUN_ID SLURM_PROCID SLURM_NTASKS "
    "SLURM_STEP_NUM_TASKS SLURM_STEP_ID SLURM_STEPID OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE PMI_RANK PMI_SIZE "
    "PMIX_RANK PMIX_SIZE MV2_COMM_WORLD_RANK MV2_COMM_WORLD_SIZE"
).split()


def set_variables(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for pair in text.split():
        monkeypatch.setenv(*pair.split("=", 1))


@pytest.mark.parametrize(
    ("text", "rank", "size"),
    [
        ("", 0, 1),
        ("RANK=3 WORLD_SIZE=8 LOCAL_RANK=3", 3, 8),
        ("RANK=8 WORLD_SIZE=16 LOCAL_RANK=0 LOCAL_WORLD_SIZE=8 GROUP_RANK=1", 8, 16),
        # One task of Slurm for each machine, which starts torchrun.
        ("RANK=0 WORLD_SIZE=16 LOCAL_RANK=0 SLURM_PROCID=1 SLURM_NTASKS=2 TORCHELASTIC_RUN_ID=a", 0, 16),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 SLURM_PROCID=1 SLURM_NTASKS=2 TORCHELASTIC_RUN_ID=a", 0, 2),
        # A training within an allocation of several tasks, which is not one of them.
        ("SLURM_PROCID=0 SLURM_NTASKS=1", 0, 1),
        ("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=1", 0, 1),
        ("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_STEP_ID=4294967291", 0, 1),
        ("SLURM_NTASKS=8", 0, 1),
        ("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_STEP_ID=0", 0, 8),
        ("SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_STEP_ID=0", 5, 8),
        ("SLURM_PROCID=5 SLURM_NTASKS=8 PMI_RANK=5 PMI_SIZE=8", 5, 8),
        ("OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1", 3, 4),
        # mpirun within a batch script.
        ("OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 SLURM_PROCID=0 SLURM_NTASKS=4", 3, 4),
        ("PMI_RANK=2 PMI_SIZE=4", 2, 4),
        ("PMIX_RANK=2", 2, 1),
        ("MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_SIZE=2", 1, 2),
        ("LOCAL_RANK=0", 0, 1),
        ("LOCAL_RANK=1", 1, 1),
        ("LOCAL_RANK=1 WORLD_SIZE=2", 1, 2),
        ("LOCAL_RANK=0 NODE_RANK=1 WORLD_SIZE=4", 1, 4),
        ("LOCAL_RANK=0 NODE_RANK=0 WORLD_SIZE=4", 0, 4),
        ("LOCAL_RANK=1 GROUP_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2", 3, 4),
        # A task of Slurm for each machine, whose own launcher counts on the machine only.
        ("LOCAL_RANK=0 SLURM_PROCID=1 SLURM_NTASKS=2", 1, 2),
        ("LOCAL_RANK=1 SLURM_PROCID=0 SLURM_NTASKS=2", 1, 2),
        ("LOCAL_RANK=0 LOCAL_WORLD_SIZE=8 WORLD_SIZE=16 SLURM_PROCID=0 SLURM_NTASKS=2", 0, 16),
        ("LOCAL_RANK=-1 RANK=", 0, 1),
    ],
)
def test_rank_is_zero_on_one_process_only(monkeypatch: pytest.MonkeyPatch, text: str, rank: int, size: int) -> None:
    set_variables(monkeypatch, text)
    assert launched()[:2] == (rank, size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RANK=one", "RANK is 'one', and must be a whole number"),
        ("LOCAL_RANK=1.5", "LOCAL_RANK is '1.5'"),
        ("RANK=0 LOCAL_RANK=3", "RANK=0 contradicts LOCAL_RANK=3"),
        ("RANK=0 WORLD_SIZE=8 SLURM_PROCID=3 SLURM_NTASKS=8", "RANK=0 contradicts SLURM_PROCID=3, both of 8 processes"),
        ("LOCAL_RANK=0 LOCAL_WORLD_SIZE=8 WORLD_SIZE=16", "LOCAL_RANK=0 counts the processes of one machine"),
    ],
)
def test_contradictions_are_refused(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    set_variables(monkeypatch, text)
    with pytest.raises(ValueError, match=message):
        launched()


@pytest.mark.parametrize(
    ("variables", "message"), [("", "init_process_group before from_model$"), ("RANK=0", "first$")]
)
def test_second_process_of_unknown_rank_learns_the_remedy(
    monkeypatch: pytest.MonkeyPatch, variables: str, message: str
) -> None:
    set_variables(monkeypatch, variables)
    with pytest.raises(RuntimeError, match=f"another tracker is writing this run: stop it.*{message}"), _rank_remedy():
        raise RuntimeError("ema: another tracker is writing this run: stop it first")


def test_counter_follows_the_schedule() -> None:
    schedule = {"update_every": 4, "update_after_step": 7, "checkpoint_every": 10}
    by_steps, by_times = StepCounter(schedule=schedule), StepCounter(schedule=schedule)
    for step in range(1, 100):
        due = by_steps.is_due(step)
        assert due == (step >= 7 and (step % 4 == 0 or step % 10 == 0))
        assert by_steps() and (by_steps.last_update == step) == due
        by_times.count_to(step)
        assert vars(by_times) == vars(by_steps)
    # A clock that jumps over several multiples.
    by_times.count_to(150)
    assert by_times.last_update == 150 and not by_times.is_due(151) and by_times.is_due(152)


@pytest.mark.parametrize("variables", ["LOCAL_RANK={} WORLD_SIZE=2", "SLURM_PROCID={} SLURM_NTASKS=2"])
def test_ranks_open_one_run_before_the_process_group(tmp_path: Path, variables: str) -> None:
    program = """
        import sys
        import numpy as np
        from posthoc_ema import PostHocEMA
        model = {"a": np.zeros(3, np.float32)}
        ema = PostHocEMA.from_model(model, sys.argv[1], rank_zero_only=True)
        print(ema._tracker is not None, flush=True)
        sys.stdin.read()
    """
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "ema")],
            env=clean | dict(pair.split("=") for pair in variables.format(rank).split()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    tracks = [process.stdout.readline().strip() for process in processes if process.stdout]
    for process in processes:
        process.communicate("", timeout=60)
    assert tracks == ["True", "False"]
