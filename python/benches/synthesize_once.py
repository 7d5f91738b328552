"""One state dict from 40 f16 snapshots, in a process of its own, by the `posthoc_ema` that is found first.

    synthesize_once.py make RUN PARAMETERS      trains nothing, and stores two profiles at 20 steps
    synthesize_once.py time RUN PARAMETERS      prints seconds, memory and whether the answer is right as JSON

Works with this package and with pytorch-posthoc-ema, which has the same import name.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

import posthoc_ema
from posthoc_ema import PostHocEMA

SNAPSHOTS, REPEATS = 20, 5
SIGMA_RELS, TARGET = (0.05, 0.28), 0.15
TENSORS, WINDOW = 64, 1000
OURS = hasattr(posthoc_ema, "Profile")


def model_of(parameters: int) -> nn.Module:
    """Values in [-1, 1), of which f16 holds all."""
    values = torch.arange(parameters // TENSORS) % 251 / 128 - 1
    return nn.ParameterDict({f"p{i}": values.clone() for i in range(TENSORS)})


def make(run: str, parameters: int) -> None:
    """At step t the parameters are t/20 of the last ones."""
    model = model_of(parameters)
    last = [parameter.detach().clone() for parameter in model.parameters()]
    every = {"update_every": 1, "checkpoint_every": 1, "update_after_step": 0}
    dtype = torch.float16
    ema = PostHocEMA.from_model(model, run, SNAPSHOTS, SIGMA_RELS, checkpoint_dtype=dtype, **every)
    for step in range(1, SNAPSHOTS + 1):
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), torch._foreach_mul(last, step / SNAPSHOTS))
        ema.update_(model)
    if OURS:
        ema.finish()


def measure(run: str, parameters: int) -> None:
    if OURS:
        ema = PostHocEMA.from_path(run)
    else:
        ema = PostHocEMA.from_path(run, model_of(parameters), SNAPSHOTS, SIGMA_RELS)
    with Memory() as memory, ema.state_dict(TARGET) as state_dict:
        check(ema, run, state_dict)
    del state_dict
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        with ema.state_dict(TARGET) as state_dict:
            seconds.append(time.perf_counter() - start)
        del state_dict
    print(json.dumps({"seconds_median": statistics.median(seconds), "seconds_all": seconds, **memory.peaks()}))


class Memory:
    """The most memory above that at the beginning, with mapped files and without (Linux)."""

    def __enter__(self) -> Memory:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before, self.anonymous = self._read("VmRSS"), 0
        self.anonymous_before = self._read("RssAnon")
        self.running = True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.peak = self._read("VmHWM")

    def peaks(self) -> dict[str, int]:
        """Bytes."""
        mapped_too, anonymous = self.peak - self.before, self.anonymous - self.anonymous_before
        return {"peak_bytes": mapped_too, "peak_anonymous_bytes": anonymous}

    def _sample(self) -> None:
        # The kernel keeps no peak of this one.
        while self.running:
            self.anonymous = max(self.anonymous, self._read("RssAnon"))
            time.sleep(0.001)

    @staticmethod
    def _read(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise SystemExit(f"/proc/self/status has no {key}")


def check(ema: PostHocEMA, run: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Every tensor against what it should be, all of which are alike."""
    wanted, tolerance = (right_answer if OURS else own_blend)(ema, run)
    for i in range(TENSORS):
        difference = (state_dict[f"p{i}"].flatten()[:WINDOW].double() - wanted).abs().max().item()
        if not difference <= tolerance:
            raise SystemExit(f"p{i} is {difference:.1e} away from the right answer, allowed {tolerance:.1e}")


def right_answer(ema: PostHocEMA, _: str) -> tuple[torch.Tensor, float]:
    """The average of t/20 by the target's profile, and what plan and roundings to f16 allow."""
    (plan,) = ema.plan([TARGET])
    steps = range(1, SNAPSHOTS + 1)
    shares = torch.tensor([0.0, *plan.profile.cumulative(list(steps), SNAPSHOTS)], dtype=torch.float64).diff()
    factor = (shares * torch.tensor(list(steps)) / SNAPSHOTS).sum()
    roundings = torch.finfo(torch.float16).eps * sum(abs(weight.weight) for weight in plan.weights)
    return first_values() * factor, plan.relative_error + roundings


def own_blend(_: PostHocEMA, run: str) -> tuple[torch.Tensor, float]:
    """pytorch-posthoc-ema's own weights over its own snapshots in f64: its decays are others."""
    from posthoc_ema.utils import sigma_rel_to_gamma, solve_weights

    places = [(index, step) for index in (0, 1) for step in range(1, SNAPSHOTS + 1)]
    gammas = torch.tensor([sigma_rel_to_gamma(SIGMA_RELS[index]) for index, _ in places])
    times = torch.tensor([float(step) for _, step in places])
    weights = solve_weights(gammas, times, sigma_rel_to_gamma(TARGET), target_sigma_rel=TARGET)
    blend = torch.zeros(WINDOW, dtype=torch.float64)
    for (index, step), weight in zip(places, weights.double()):
        snapshot = torch.load(Path(run) / f"{index}.{step}.pt", weights_only=True, mmap=True)
        blend += weight * snapshot["p0"].flatten()[:WINDOW].double()
    return blend, torch.finfo(torch.float16).eps


def first_values() -> torch.Tensor:
    return model_of(TENSORS * WINDOW)["p0"].detach().double()


if __name__ == "__main__":
    {"make": make, "time": measure}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
