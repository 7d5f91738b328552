"""Updates of two averages: all trackers, and a fused loop in C that moves the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import models
import turns
from contenders import Absent, limit, packages_of
from environment import Environment
from turns import Row

# Names of the rows, by the keys of trackers.KINDS.
NAMES = {
    "plain": "posthoc-ema",
    "compensated": "posthoc-ema, compensated",
    "device-plain": "posthoc-ema, on the device",
    "device-compensated": "posthoc-ema, on the device, compensated",
    "compiled-flat": "torch.compile, fused, one flat tensor",
    "compiled": "torch.compile, fused, the list",
    "foreach": "torch._foreach_lerp_, lists kept",
    "foreach-gathered": "torch._foreach_lerp_, listed at each update (torchtitan's way)",
    "foreach-floats": "torch._foreach_lerp_ of p.float()",
    "timm": "timm ModelEmaV3",
    "timm-f32": "timm ModelEmaV3(dtype=torch.float32)",
    "pytorch-posthoc-ema": "pytorch-posthoc-ema",
    "ema-pytorch": "ema-pytorch",
    "copy": "a copy of the parameters, no averages",
}
PEERS = ("compiled-flat", "compiled", "foreach", "foreach-gathered", "timm", "pytorch-posthoc-ema", "ema-pytorch")
PACKAGES = ("timm", "pytorch-posthoc-ema", "ema-pytorch")
# A compiler may take minutes for a long list; it is stopped then.
COMPILING_SECONDS = 60.0
ROUNDS, NOT_DUE_CALLS = 15, 1000


class Ready:
    """Tracker whose updates are checked. `held` is the memory of its averages, without the parameters."""

    def __init__(self, worker: turns.Worker, held: int, checked: Row):
        self.worker = worker
        self.name = worker.name
        self.held = held
        self.checked = checked

    def first(self) -> Row:
        row = self.worker.first()
        # The worker's peak is only the memory that an update takes beside the averages.
        row["peak_anonymous_bytes"] = max(0, row["peak_anonymous_bytes"] + self.held)
        return {**row, **self.checked}

    def once(self) -> float:
        return self.worker.once()

    def close(self) -> None:
        self.worker.close()


@dataclass(frozen=True)
class Case:
    """Model, dtype and trackers that are measured together."""

    title: str
    model: str
    dtype: str
    # Kind of limits/update.c, and the bytes that it moves for each parameter.
    limit: str
    bytes_each: int
    kinds: tuple[str, ...]
    note: str = ""


CASES = (
    Case("f32 parameters, plain averages", "150 tensors", "float32", "plain", 20, ("plain", *PEERS)),
    Case(
        "f32 parameters, compensated averages",
        "150 tensors",
        "float32",
        "compensated",
        28,
        ("compensated",),
        "None of the other packages measured here has compensated averages.",
    ),
    Case(
        "bf16 parameters, plain f32 averages",
        "150 tensors",
        "bfloat16",
        "bf16",
        18,
        ("plain", "compiled-flat", "compiled", "foreach", "foreach-floats", "timm-f32", *PACKAGES),
        "The last column shows averages of bf16: they take half the memory, and lose late updates.",
    ),
    Case("f32 parameters, plain averages", "2,000 tensors", "float32", "plain", 20, ("plain", *PEERS)),
)
NOT_DUE = ("plain", "pytorch-posthoc-ema", "ema-pytorch")


class Trackers:
    """Processes of all trackers, kept from case to case because importing PyTorch is slow."""

    def __init__(self, environment: Environment):
        self.environment = environment
        self.workers = dict[str, turns.Worker]()

    def contender(self, kind: str, **about: Any) -> turns.Contender:
        packages = packages_of(self.environment, kind)
        if isinstance(packages, str):
            return Absent(NAMES[kind], packages)
        try:
            worker = self._worker(kind, packages)
            worker.ask("ready")
            patience = COMPILING_SECONDS if kind.startswith("compiled") else turns.PATIENCE_SECONDS
            before = turns.anonymous_bytes(worker.process.pid)
            prepared = worker.ask("prepare", patience, size=self.environment.size, **about)
            held = turns.anonymous_bytes(worker.process.pid) - before - prepared.pop("model_bytes")
        except turns.Failed as why:
            self.forget(kind)
            return Absent(NAMES[kind], str(why))
        return Ready(worker, held, prepared)

    def _worker(self, kind: str, packages: list) -> turns.Worker:
        if kind not in self.workers:
            self.workers[kind] = turns.Worker(NAMES[kind], self.environment.script("trackers", kind, *packages))
        return self.workers[kind]

    def drop(self) -> None:
        """Makes all workers free the case's memory."""
        for kind, worker in list(self.workers.items()):
            try:
                worker.ask("drop")
            except turns.Failed:
                self.forget(kind)

    def forget(self, kind: str) -> None:
        worker = self.workers.pop(kind, None)
        if worker is not None:
            worker.close()

    def close(self) -> None:
        for kind in list(self.workers):
            self.forget(kind)


def measure(environment: Environment) -> Iterator[dict[str, Any]]:
    """Measures all cases, and calls at which nothing is due."""
    trackers = Trackers(environment)
    try:
        for case in CASES:
            yield update(environment, trackers, case)
        yield not_due(environment, trackers)
    finally:
        trackers.close()


def update(environment: Environment, trackers: Trackers, case: Case) -> dict[str, Any]:
    """Measures calls that update both averages."""
    on_device = environment.device != "cpu"
    kinds = [kind for ours in case.kinds for kind in kinds_on(ours, on_device)]
    count = models.parameters(models.MODELS[case.model][environment.size])
    about = {"model": case.model, "dtype": case.dtype, "device": environment.device, "due": True}
    # Several in a row on a device, since the host only queues them.
    contenders = [trackers.contender(kind, **about, calls=5 if on_device else 1) for kind in kinds]
    if on_device:
        loop = trackers.contender("copy", **about, calls=5)
        limit_bytes = 2 * count * (4 if case.dtype == "float32" else 2)
    else:
        loop = limit(environment, "a fused loop in C", "update", case.limit, count, environment.threads)
        limit_bytes = case.bytes_each * count
    limit_row, *rows = turns.in_turns([loop, *contenders], environment.rounds(ROUNDS))
    trackers.drop()
    if on_device:
        # The host does not see memory on the device.
        for row in rows:
            row.pop("peak_anonymous_bytes", None)
    else:
        loop.close()
    bytes_ = case.bytes_each * count
    turns.add_rates([limit_row], None, limit_bytes)
    limit_row.pop("peak_anonymous_bytes", None)
    # The time that the limit would take for the bytes of an update.
    scaled = scale(limit_row, bytes_ / limit_bytes)
    turns.add_rates(rows, scaled, bytes_)
    return {
        "work": "update",
        "title": f"Update, {case.title}",
        "model": case.model,
        "parameters": count,
        "tensors": len(models.MODELS[case.model][environment.size]),
        "bytes": bytes_,
        "limits": [limit_row],
        "rows": rows,
        "note": case.note,
    }


def kinds_on(kind: str, device: bool) -> tuple[str, ...]:
    """Returns the kinds to measure: on a device, ours has averages on the host and on the device."""
    return (kind, f"device-{kind}") if device and kind in ("plain", "compensated") else (kind,)


def scale(row: Row, factor: float) -> Row:
    return {**row, "seconds_median": row["seconds_median"] * factor} if "seconds_median" in row else row


def not_due(environment: Environment, trackers: Trackers) -> dict[str, Any]:
    """Measures the calls of training steps that update nothing."""
    about = {"model": "150 tensors", "dtype": "float32", "device": environment.device, "due": False}
    contenders = [trackers.contender(kind, **about, calls=NOT_DUE_CALLS) for kind in NOT_DUE]
    rows = turns.in_turns(contenders, environment.rounds(ROUNDS))
    trackers.drop()
    for row in rows:
        row.pop("peak_anonymous_bytes", None)
    return {
        "work": "not due",
        "title": "A call at which nothing is due",
        "model": "150 tensors",
        "limits": [],
        "rows": rows,
        "note": "",
    }
