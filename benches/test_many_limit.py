"""Test of the limit for many targets against numpy."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

LIMIT = Path(__file__).parent / "peers" / "limits" / "many.c"
ELEMENTS = 1000
SOURCES = 3
TARGETS = 9


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("limit") / "many"
    subprocess.run([shutil.which("gcc") or "cc", "-O1", "-march=native", "-pthread", "-o", built, LIMIT], check=True)
    return built


def test_results_are_the_weighted_sums(program: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(TARGETS, SOURCES))
    values = generator.normal(size=(SOURCES, ELEMENTS)).astype(np.float16)
    files = [tmp_path / f"{source}.safetensors" for source in range(SOURCES)]
    for path, each in zip(files, values):
        save_file({"a": each[:7], "b": each[7:]}, path)
    (tmp_path / "weights.txt").write_text("".join(" ".join(map(repr, row.tolist())) + "\n" for row in weights))
    out = tmp_path / "out"
    out.mkdir()
    command = [program, "2", tmp_path / "weights.txt", out, *files]
    done = subprocess.run(command, input="go\ngo\n", capture_output=True, text=True, check=True)
    assert [json.loads(line).keys() for line in done.stdout.splitlines()] == [{"seconds", "sum"}] * 2
    for target in range(TARGETS):
        found = load_file(out / f"{target}.safetensors")
        expected = weights[target] @ values.astype(np.float64)
        got = np.concatenate([found["a"], found["b"]]).astype(np.float64)
        np.testing.assert_allclose(got, expected, rtol=1.1 * 2**-11, atol=1e-6)
