"""The program of the package: `python -m posthoc_ema` and the console script."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import posthoc_ema
from posthoc_ema import PostHocEMA

MODULE = [sys.executable, "-m", "posthoc_ema"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODULE, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Returns the run of a training of 40 steps."""
    arrays = {"w": np.zeros(5, dtype=np.float32)}
    ema = PostHocEMA.from_model(arrays, tmp_path / "run", update_every=1, update_after_step=0, checkpoint_every=4)
    for step in range(40):
        arrays["w"][:] = np.sin(np.arange(5) + step)
        ema.update_(arrays)
    ema.finish()
    return tmp_path / "run"


def test_module_is_the_program() -> None:
    assert run("--version").stdout == f"posthoc-ema {posthoc_ema.__version__}\n"
    assert "Usage: posthoc-ema " in run("--help").stdout
    done = run("profile", "--sigma-rel", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_console_script_is_the_program() -> None:
    installed = distribution("posthoc-ema")
    if Path(str(installed.locate_file("posthoc_ema"))).resolve() != Path(posthoc_ema.__file__).parent.resolve():
        pytest.skip("the package under test is not the installed one")
    scripts = installed.entry_points.select(group="console_scripts")
    assert [(script.name, script.value) for script in scripts] == [("posthoc-ema", "posthoc_ema.__main__:main")]
    script = Path(sys.executable).with_name("posthoc-ema")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"posthoc-ema {posthoc_ema.__version__}\n"), done.stderr


def test_average_is_that_of_the_python_functions(tiny: Path, tmp_path: Path) -> None:
    written = tmp_path / "average.safetensors"
    done = run("synthesize", str(tiny), "--sigma-rel", "0.15", "-o", str(written))
    assert done.returncode == 0, done.stderr
    planned = run("plan", str(tiny), "--sigma-rel", "0.15", "--json")
    ema = PostHocEMA.from_path(tiny)
    with ema.state_dict(sigma_rel=0.15) as expected:
        assert np.array_equal(load_file(written)["w"], np.asarray(expected["w"]))
    assert [each["at"] for each in json.loads(planned.stdout)["targets"]] == [40]


def test_exit_status_is_that_of_the_program() -> None:
    failed = run("inspect", "/nonexistent")
    assert failed.returncode == 1 and failed.stderr.startswith("error: "), failed.stderr
    unknown = run("nothing")
    assert unknown.returncode == 2 and "Usage: posthoc-ema " in unknown.stderr, unknown.stderr


def sweep_that_waits(tiny: Path, tmp_path: Path) -> subprocess.Popen[bytes]:
    """Starts a sweep, and returns once its evaluation runs."""
    started = tmp_path / "started"
    evaluation = f"touch {started}; exec sleep 60; : {{}}"
    out = tmp_path / "sweep"
    command = ["sweep", str(tiny), "--sigma-rel", "0.15", "--eval", evaluation, "--out-dir", str(out)]
    pipe = subprocess.PIPE
    # A shell may have started the tests with SIGINT ignored, which a process inherits.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        process = subprocess.Popen([*MODULE, *command], stdout=subprocess.DEVNULL, stderr=pipe)
    finally:
        signal.signal(signal.SIGINT, before)
    end = time.monotonic() + 60
    while not started.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_program_at_once(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = sweep_that_waits(tiny, tmp_path)
    try:
        process.send_signal(number)
        # The pipe closes once the evaluation has ended, too.
        _, messages = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == -number
    assert b"Traceback" not in messages
    # The average in evaluation is whole, and nothing else is left of it.
    files = list((tmp_path / "sweep" / "evaluating").iterdir())
    assert [file.suffix for file in files] == [".safetensors"] and load_file(files[0])["w"].shape == (5,)


def test_reader_that_went_away_is_no_error() -> None:
    shell = shutil.which("sh")
    assert shell is not None
    script = '{ sleep 1; "$0" -m posthoc_ema completions bash; echo "status $?" >&2; } | :'
    done = subprocess.run([shell, "-c", script, sys.executable], capture_output=True, text=True, timeout=60)
    assert done.stderr == "status 0\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_left_to_other_files(closed: str) -> None:
    code = (
        "import os; from posthoc_ema.__main__ import _open_missing_streams; _open_missing_streams(); "
        "raise SystemExit(not all(os.get_inheritable(number) for number in range(3)))"
    )
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], timeout=60)
    assert done.returncode == 0
    program = ["sh", "-c", f'exec "$0" -m posthoc_ema profile --sigma-rel 0.1 {closed}', sys.executable]
    assert subprocess.run(program, timeout=60, stdout=subprocess.DEVNULL).returncode == 0
