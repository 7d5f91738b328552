"""The rank of this process among those that a launcher has started."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ._lend import torch_module


class Launched(NamedTuple):
    """Place of this process among those of one training."""

    rank: int
    """0 on exactly one process. Positive on all others, if their exact rank is not known either."""
    size: int
    """Number of processes."""
    source: str
    """Source of the numbers, for messages: `torch.distributed`, a variable, or an empty text if nothing is known."""


# Rank and number of processes by launchers other than torchrun, from the innermost.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMIX_RANK", "PMIX_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)

# Rank of this process's machine: by Lightning and users, by torchrun, by Slurm.
_NODE_RANKS = ("NODE_RANK", "GROUP_RANK")


def distributed() -> Any | None:
    """Returns `torch.distributed` if its default process group is initialised."""
    module = getattr(torch_module(), "distributed", None)
    return module if module is not None and module.is_available() and module.is_initialized() else None


def launched() -> Launched:
    """Returns rank and number of processes.

    They come from `torch.distributed` if it is initialised. Otherwise they come from the environment: `RANK`, else the
    variables of Open MPI, MVAPICH, PMIx, PMI and Slurm, and `LOCAL_RANK`. Without `RANK` only a process that is rank 0
    by all of them is rank 0.

    Raises:
        ValueError: If a variable is not a number, or two contradict each other. The message names them.
    """
    group = distributed()
    if group is not None:
        return Launched(int(group.get_rank()), int(group.get_world_size()), "torch.distributed")
    rank = _number("RANK")
    others = [*_of_launchers(), *_of_slurm()]
    if rank is not None:
        _check_local_rank(rank)
        size = _number("WORLD_SIZE") or 1
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            _check_agreement(Launched(rank, size, "RANK"), others)
        return Launched(rank, size, "RANK")
    found = [*others, *_of_local_rank()]
    positive = [each for each in found if each.rank > 0]
    first = (positive or found or [Launched(0, 1, "")])[0]
    return first._replace(size=max([1, *(each.size for each in found)]))


def _number(variable: str) -> int | None:
    """Returns the value of a variable; None if it is missing, empty or -1, by which some launchers say so."""
    text = os.environ.get(variable, "").strip()
    if text in ("", "-1"):
        return None
    if not text.isdecimal():
        raise ValueError(f"the variable {variable} is {text!r}, and must be a whole number: set it right, or unset it")
    return int(text)


def _of_launchers() -> list[Launched]:
    ranks = [(_number(rank), _number(size), rank) for rank, size in _LAUNCHERS]
    return [Launched(rank, size or 1, name) for rank, size, name in ranks if rank is not None]


def _of_slurm() -> list[Launched]:
    """Returns the place among the tasks of a step of Slurm.

    A shell within an allocation has rank 0 of one task, and a batch script has that of a step that is not one.
    """
    rank = _number("SLURM_PROCID")
    tasks = _number("SLURM_STEP_NUM_TASKS") or _number("SLURM_NTASKS") or 1
    # The step of a batch script, which srun has not started: 0xfffffffb, or the older 0xfffffffe.
    is_batch = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID")) in ("4294967291", "4294967294")
    if rank is None or tasks < 2 or (is_batch and rank == 0):
        return []
    return [Launched(rank, tasks, "SLURM_PROCID")]


def _of_local_rank() -> list[Launched]:
    """Returns the place by a rank within a machine, which needs the rank of the machine."""
    local = _number("LOCAL_RANK")
    if local is None:
        return []
    per_node = _number("LOCAL_WORLD_SIZE")
    size = _number("WORLD_SIZE") or per_node or 1
    node = next((number for number in map(_number, _NODE_RANKS) if number is not None), None)
    if node is None and per_node is not None and size > per_node and not [*_of_launchers(), *_of_slurm()]:
        raise ValueError(
            f"LOCAL_RANK={local} counts the processes of one machine, and there are several (LOCAL_WORLD_SIZE="
            f"{per_node}, WORLD_SIZE={size}): set RANK or NODE_RANK, or call torch.distributed.init_process_group first"
        )
    # Without the number of processes on a machine it is enough that the rank is positive on all machines but one.
    return [Launched((node or 0) * (per_node or 1) + local, size, "LOCAL_RANK")]


def _check_local_rank(rank: int) -> None:
    """Refuses a rank that is smaller than the one within the machine.

    Raises:
        ValueError: If they contradict each other.
    """
    local = _number("LOCAL_RANK")
    if local is not None and local > rank:
        raise ValueError(
            f"RANK={rank} contradicts LOCAL_RANK={local}: set RANK to the rank among all processes, or unset it"
        )


def _check_agreement(by_rank: Launched, others: list[Launched]) -> None:
    """Refuses another launcher that counts as many processes and gives this one another rank.

    One that counts another number has started a launcher instead of the training, such as a task for each machine.

    Raises:
        ValueError: If they contradict each other.
    """
    for other in others:
        if other.size == by_rank.size and other.size > 1 and other.rank != by_rank.rank:
            raise ValueError(
                f"RANK={by_rank.rank} contradicts {other.source}={other.rank}, both of {other.size} processes: "
                f"unset the one that is left over, or call torch.distributed.init_process_group first"
            )
