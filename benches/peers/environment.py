"""Environment of a measurement: virtual environments, the other packages, ours, and the limits in C."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TARGET = ROOT / "target" / "peers"
VENV = ROOT / "target" / "peers-venv"
# Packages that the workers need beside ours.
NEEDED = ("torch", "numpy", "safetensors", "matplotlib", "pillow", "tqdm", "timm")
# Packages in a folder of their own: the first has our import name.
APART = ("pytorch-posthoc-ema", "ema-pytorch")
LIMITS = ("update", "scan", "peak", "many", "mean")
FLAGS = ("-O3", "-march=native", "-pthread")


@dataclass
class Environment:
    """Paths and sizes of a measurement."""

    python: Path
    # The program, or why there is none.
    program: Path | str
    # Folder of pytorch-posthoc-ema and ema-pytorch; None if they are left out.
    peers: Path | None
    # The command mergekit-pytorch, or why there is none.
    mergekit: Path | str
    # The Python of an environment with OLMo-core, or why there is none.
    olmo: Path | str
    # For snapshots on a disk.
    folder: Path
    # For files that should not wait for a disk.
    memory: Path
    size: str
    device: str
    threads: int = len(os.sched_getaffinity(0))
    limits: dict[str, Path | str] = field(default_factory=dict)
    # Processes that wanted to run in the minute before the measurement.
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])

    @property
    def quick(self) -> bool:
        return self.size == "quick"

    def rounds(self, full: int) -> int:
        return min(full, 2) if self.quick else full

    def run(self, *command: str | Path) -> str:
        """Runs a command of ours and returns its output; a failure ends the benchmark."""
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stderr}")
        return done.stdout

    def script(self, name: str, *arguments: str | Path) -> list[str | Path]:
        """Returns the command that runs a module of this folder."""
        return [self.python, HERE / f"{name}.py", *arguments]


def venv_python() -> Path:
    return VENV / "bin" / "python"


def install() -> None:
    """Makes the virtual environment, and installs the packages from PyPI and ours."""
    if not venv_python().exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    pip = [venv_python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *NEEDED], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", ROOT / "python"], check=True)
    # A failure is not fatal: the package's rows say that it is missing.
    subprocess.run([*pip, "--upgrade", "--no-deps", "--target", packages(), *APART])


def packages() -> Path:
    return TARGET / "packages"


def build_program() -> Path | str:
    """Builds the program as a user does."""
    if shutil.which("cargo") is None:
        return "cargo was not found"
    subprocess.run(["cargo", "build", "--release", "--quiet", "-p", "posthoc-ema-cli"], cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return (target if target.is_absolute() else ROOT / target) / "release" / "posthoc-ema"


def install_apart(package: str, command: str) -> Path | str:
    """Installs a package that pins other versions in a virtual environment of its own. Returns one of its commands."""
    venv = TARGET / package
    installed = venv / "installed"
    if not installed.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip = [venv / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", package]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode != 0:
            return f"pip install {package}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}"
        installed.touch()
    return venv / "bin" / command


def build_limits() -> dict[str, Path | str]:
    """Builds the limits. Each is a program, or the reason why there is none."""
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        return dict.fromkeys(LIMITS, f"the C compiler {compiler} was not found: set CC")
    TARGET.mkdir(parents=True, exist_ok=True)
    built: dict[str, Path | str] = {}
    for name in LIMITS:
        program = TARGET / f"limit-{name}"
        command = [compiler, *FLAGS, "-o", program, HERE / "limits" / f"{name}.c"]
        done = subprocess.run(command, capture_output=True, text=True)
        built[name] = program if done.returncode == 0 else f"{compiler}: {done.stderr.strip().splitlines()[-1]}"
    return built


def about(environment: Environment) -> dict[str, Any]:
    """Describes the machine and all versions."""
    return {"machine": machine(environment.device), "versions": versions(environment)}


def machine(device: str) -> dict[str, Any]:
    """Describes the machine."""
    cpu = next((v for k, v in pairs("/proc/cpuinfo") if k == "model name"), platform.machine())
    memory = next((v for k, v in pairs("/proc/meminfo") if k == "MemTotal"), "")
    described: dict[str, Any] = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(memory.split()[0]) * 1024 if memory else None,
        "kernel": platform.release(),
        "system": platform.system(),
    }
    if device != "cpu":
        import torch

        described["device"] = torch.cuda.get_device_name(device)
    return described


def pairs(path: str) -> list[tuple[str, str]]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return []
    split = (line.split(":", 1) for line in lines if ":" in line)
    return [(key.strip(), value.strip()) for key, value in split]


def versions(environment: Environment) -> dict[str, str]:
    script = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    installed = json.loads(environment.run(environment.python, "-c", script))
    found = {"python": platform.python_version()}
    found |= {name: installed[name] for name in ("torch", "numpy", "safetensors", "timm") if name in installed}
    apart = importlib.metadata.distributions(path=[str(environment.peers)] if environment.peers else [])
    found |= {each.name: each.version for each in apart if each.name in APART}
    for package, command in (("mergekit", environment.mergekit), ("ai2-olmo-core", environment.olmo)):
        if isinstance(command, Path):
            script = f"import importlib.metadata as m; print(m.version('{package}'))"
            found[package] = environment.run(command.with_name("python"), "-c", script).strip()
    if isinstance(environment.program, Path):
        found["posthoc-ema"] = environment.run(environment.program, "--version").split()[-1]
    else:
        script = "import posthoc_ema._native as n; print(n.__version__)"
        found["posthoc-ema"] = environment.run(environment.python, "-c", script).strip()
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler):
        found[compiler] = environment.run(compiler, "-dumpfullversion").strip()
    return found
