"""Average of the products of adapters in five files, beside numpy and a loop in C that adds the mapped files up."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import turns
from contenders import Absent, Checked, limit
from environment import Environment
from turns import Row

STEPS = (1, 2, 3, 4, 5)
ROUNDS = 5
SCAN = "adding the mapped files up in C"
OURS = "posthoc-ema, the program"
ONE_THREAD = "posthoc-ema, the program, one thread"
# One thread each: with more, OpenBLAS waits in loops, and takes far longer if anything else runs.
NUMPY = {
    "core": "numpy, one thread, QR of the stacked factors and SVD of the core",
    "whole": "numpy, one thread, SVD of the whole product, one pair only",
}
# Largest distance of a product, relative to its norm: roundings of the factors to f32.
LARGEST_DIFFERENCE = 1e-6


def measure(environment: Environment) -> Iterator[dict[str, Any]]:
    folder = environment.folder / "adapters"
    memory = environment.memory / "posthoc-ema-peers"
    try:
        memory.mkdir(exist_ok=True)
        environment.run(*environment.script("adapter_scripts", "make", folder, environment.size, *map(str, STEPS)))
        yield case_of(environment, [folder / f"lora-{step}.safetensors" for step in STEPS], memory)
    finally:
        for path in (folder, memory):
            shutil.rmtree(path, ignore_errors=True)


def case_of(environment: Environment, files: list[Path], memory: Path) -> dict[str, Any]:
    """Measures all contenders in turns with the limit."""
    import adapter_scripts

    check = Check(files)
    contenders = [limit(environment, SCAN, "scan", environment.threads, *files)]
    out = memory / "ours.safetensors"
    if isinstance(environment.program, str):
        contenders.append(Absent(OURS, environment.program))
    else:
        command = [environment.program, "average", *files, "--product", "svd", "--uniform", "100%", "-o", out]
        for name, threads in ((OURS, []), (ONE_THREAD, ["env", "RAYON_NUM_THREADS=1"])):
            made = turns.Command(name, [*threads, *command, "--device", "cpu"], lambda: out.unlink(missing_ok=True))
            contenders.append(Checked(made, lambda: check(out)))
    for kind, name in NUMPY.items():
        result = memory / f"{kind}.safetensors"
        script = environment.script("adapter_scripts", kind, result, *files)
        worker = turns.Worker(name, script, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
        contenders.append(Checked(worker, lambda result=result: check(result)))
    try:
        rows = turns.in_turns(contenders, environment.rounds(ROUNDS))
    finally:
        for one in contenders:
            one.close()
    rows[0]["limit"] = True
    rows[0].pop("peak_anonymous_bytes", None)
    pairs, extent, rank = adapter_scripts.SIZES[environment.size]
    read = len(files) * 4 * pairs * 2 * extent * rank
    turns.add_rates(rows, None, read)
    # The last one does not do the whole work.
    rows[-1].pop("bytes_per_second", None)
    return {
        "work": "adapters",
        "title": f"{pairs} adapters of {extent} x {extent}, rank {rank}, of {len(files)} files",
        "bytes": read,
        "limits": rows[:1],
        "rows": rows[1:],
        "note": "",
    }


class Check:
    """Compares the products of an average with those of the best factors in f64."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __call__(self, out: Path) -> Row:
        import numpy as np
        from safetensors.numpy import load_file

        import adapter_scripts

        found = load_file(out)
        largest = 0.0
        loaded = [load_file(path) for path in self.files]
        for i in range(len(found) // 2):
            up, down = adapter_scripts.names(i)
            factors = [[each[name].astype(np.float64) for each in loaded] for name in (up, down)]
            best_up, best_down = adapter_scripts.by_core(*factors)
            best = best_up @ best_down
            distance = np.linalg.norm(found[up].astype(np.float64) @ found[down].astype(np.float64) - best)
            largest = max(largest, float(distance / np.linalg.norm(best)))
            if not distance <= LARGEST_DIFFERENCE * np.linalg.norm(best):
                raise turns.Failed(f"{up} is off by {distance / np.linalg.norm(best):.1e}")
        return {"off_from_f64": largest}
