"""Test of the count of bytes in flight on short pieces of machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The build and the tests take every file beside the kernels for one of theirs.
sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
import in_flight  # noqa: E402


def load(register: int, width: str = ".128") -> tuple[str, str]:
    return f"LDG.E.EF{width}", f" R{register}, desc[UR4][R2.64]"


def test_loads_before_the_first_use_are_in_flight() -> None:
    use = ("FFMA", " R20, R8, R9, R10")
    assert in_flight.batches([load(8), load(12), load(16, ".64"), use]) == [40]
    assert in_flight.batches([load(8), use, load(12), load(16), ("DFMA", " R20, R18, R4, R6")]) == [16, 32]


def test_a_load_that_others_follow_leaves_them_in_flight() -> None:
    assert in_flight.batches([load(8), load(12), ("FADD", " R20, R8, R8"), load(16), ("FADD", " R20, R12, R16")]) == [
        32,
        32,
    ]


@pytest.mark.parametrize(
    ("registers", "arch", "blocks"),
    [(62, 90, 4), (64, 90, 4), (65, 90, 3), (80, 90, 3), (128, 90, 2), (32, 75, 4), (32, 90, 8), (40, 120, 6)],
)
def test_blocks_fit_registers_and_threads(registers: int, arch: int, blocks: int) -> None:
    assert in_flight.blocks(registers, arch) == blocks


def test_the_wait_with_the_fewest_bytes_counts_in_the_worst_of_the_loops() -> None:
    use = ("FADD", " R20, R8, R12")
    full, half = [load(8), load(12), use], [load(8), use]
    assert in_flight.per_multiprocessor([half, full, half], 1, 64, 90) == 32
    assert in_flight.per_multiprocessor([half, full], 2, 64, 90) == 16
    assert in_flight.per_multiprocessor([full], 2, 64, 90) == 0
