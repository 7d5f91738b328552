"""Builds the wheel with maturin, with CUDA kernels inside where there is a compiler for them.

`POSTHOC_EMA_CUDA=1` demands them, `POSTHOC_EMA_CUDA=0` leaves them out; otherwise they are built where nvcc is found: by
`NVCC`, `CUDA_HOME` or `CUDA_PATH`, on the `PATH`, or in `/usr/local/cuda`.
"""

import os
import shutil
import sys
from pathlib import Path

import maturin
from maturin import *  # noqa: F403  the hooks of PEP 517 that are not wrapped here


def _nvcc():
    """The path of nvcc, or None."""
    if os.environ.get("NVCC"):
        return os.environ["NVCC"]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for nvcc in (Path(home, "bin", "nvcc") for home in homes if home):
        if nvcc.exists():
            return str(nvcc)
    return shutil.which("nvcc")


def _with_cuda():
    wanted = os.environ.get("POSTHOC_EMA_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"POSTHOC_EMA_CUDA={wanted}: it is 1 (with CUDA), 0 (without) or auto")
    return wanted == "1" or (wanted == "auto" and _nvcc() is not None)


def _choose():
    """Tells maturin which features to build, unless the caller has."""
    arguments = os.environ.get("MATURIN_PEP517_ARGS", "")
    if "--features" not in arguments and _with_cuda():
        print("posthoc-ema: building with CUDA kernels (POSTHOC_EMA_CUDA=0 leaves them out)", file=sys.stderr)
        os.environ["MATURIN_PEP517_ARGS"] = f"{arguments} --features cuda".strip()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _choose()
    return maturin.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _choose()
    return maturin.build_editable(wheel_directory, config_settings, metadata_directory)
