"""Builds the wheel with maturin, with CUDA kernels if there is a compiler for them.

`POSTHOC_EMA_CUDA=1` demands the kernels, and `POSTHOC_EMA_CUDA=0` leaves them out. Otherwise they are built if nvcc is
found: by `NVCC`, `CUDA_HOME` or `CUDA_PATH`, on the `PATH`, or in `/usr/local/cuda`.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import maturin
from maturin import *  # noqa: F403  the hooks of PEP 517 that are not defined here


def _nvcc():
    """Returns the path of nvcc, or None."""
    if os.environ.get("NVCC"):
        return os.environ["NVCC"]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for nvcc in (Path(home, "bin", "nvcc") for home in homes if home):
        if nvcc.exists():
            return str(nvcc)
    return shutil.which("nvcc")


# Oldest nvcc with all options that the kernels are compiled with.
_OLDEST = (12, 8)


def _version(nvcc):
    """Returns the version of nvcc as two numbers, or None if it cannot be started."""
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if found else None


def _with_cuda():
    """Returns True if the kernels are to be built."""
    wanted = os.environ.get("POSTHOC_EMA_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"POSTHOC_EMA_CUDA={wanted}: must be 1 (with CUDA), 0 (without) or auto")
    if wanted != "auto":
        return wanted == "1"
    nvcc = _nvcc()
    version = _version(nvcc) if nvcc else None
    if nvcc and (version is None or version < _OLDEST):
        found = "cannot be started" if version is None else "is version {}.{}".format(*version)
        print(f"posthoc-ema: building without CUDA kernels: {nvcc} {found}, and 12.8 is needed", file=sys.stderr)
        return False
    return nvcc is not None


def _choose_features(config_settings):
    """Passes the features to build to maturin, unless the caller has chosen them."""
    arguments = os.environ.get("MATURIN_PEP517_ARGS", "")
    own = "build-args" in (config_settings or {}) or "--features" in arguments
    if own:
        if os.environ.get("POSTHOC_EMA_CUDA") == "1":
            raise SystemExit(
                "POSTHOC_EMA_CUDA=1 has no effect beside arguments for maturin: add `--features cuda` to these instead"
            )
        return
    if _with_cuda():
        print("posthoc-ema: building with CUDA kernels (POSTHOC_EMA_CUDA=0 leaves them out)", file=sys.stderr)
        os.environ["MATURIN_PEP517_ARGS"] = f"{arguments} --features cuda".strip()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _choose_features(config_settings)
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _choose_features(config_settings)
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)
