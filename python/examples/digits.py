# %% [markdown]
# # How long should the average have been?
#
# Trains a small network that draws handwritten digits and tracks two averages of its weights. After the training it
# synthesizes averages of 32 lengths from their snapshots, evaluates each on held-out digits, and prints the best. Run
# it with `python python/examples/digits.py`, or cell by cell. It needs matplotlib.
#
# The digits are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, UCI,
# doi:10.24432/C50P49, CC BY 4.0), as distributed with scikit-learn: 1,797 images of 8 by 8 pixels.

# %%
from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional

from posthoc_ema import Plan, PostHocEMA

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
DATA = HERE.parents[1] / "candle" / "examples" / "digits" / "digits.csv.gz"

STEPS = 10_000
BATCH = 64
LEARNING_RATE = 0.003
TRAINED_ON = 1_400

PIXELS, CLASSES = 64, 10
WIDTH, BLOCKS, FREQUENCIES = 192, 3, 8

# Steps between updates of the averages, and snapshots of a training.
UPDATE_EVERY, SNAPSHOTS = 10, 20
# Lengths that are stored, lengths that are synthesized from them, and lengths that are tracked directly, to compare.
STORED = (0.05, 0.28)
LENGTHS = np.geomspace(0.01, 0.288, 32).tolist()
DIRECT = (0.10, 0.15, 0.20)

# %% [markdown]
# ## Data and network
#
# Flow matching: the network learns the velocity on the straight line from noise (t = 0) to an image (t = 1).


# %%
@dataclass
class Batch:
    """Inputs and target of one step, one row for each image."""

    x_t: torch.Tensor  # (rows, PIXELS): the point at time t between noise and image
    t: torch.Tensor  # (rows, 1), in [0, 1)
    digit: torch.Tensor  # (rows,), int64
    velocity: torch.Tensor  # (rows, PIXELS): image less noise


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images, `(1797, PIXELS)` in [-1, 1], and their digits, in shuffled order."""
    rows = torch.from_numpy(np.loadtxt(DATA, delimiter=",", dtype=np.int64))
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[:, :PIXELS].float() / 8.0 - 1.0, rows[:, PIXELS]


def draw(images: torch.Tensor, digits: torch.Tensor, random: torch.Generator) -> Batch:
    """Moves each image to a random time on a line from noise."""
    t = torch.rand(len(images), 1, generator=random)
    noise = torch.randn(images.shape, generator=random)
    return Batch((1.0 - t) * noise + t * images, t, digits, images - noise)


class Network(nn.Module):
    """Residual multilayer perceptron for the velocity, given the point, the time and the digit to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(PIXELS, WIDTH)
        self.time = nn.Linear(2 * FREQUENCIES, WIDTH, bias=False)
        self.digit = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.velocity = nn.Linear(WIDTH, PIXELS)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, digit: torch.Tensor) -> torch.Tensor:
        phase = t * (math.pi * torch.arange(1, FREQUENCIES + 1))
        hidden = self.image(x_t) + self.time(torch.cat([phase.sin(), phase.cos()], dim=1)) + self.digit(digit)
        for block in self.blocks:
            hidden = hidden + functional.silu(block(hidden))
        return self.velocity(hidden)


def loss_of(network: nn.Module, batch: Batch) -> torch.Tensor:
    """Returns the flow-matching loss, mean over rows and pixels."""
    return functional.mse_loss(network(batch.x_t, batch.t, batch.digit), batch.velocity)


# %% [markdown]
# ## Training, tracked
#
# Two lines concern averages: `from_model` before the training, `update_` after each step. The second tracker and the
# `Trajectory` only check the result; a training does not need them.


# %%
@dataclass
class Trajectory:
    """Moments of each weight over the updates, which bound the error of a synthesis."""

    times: list[int] = field(default_factory=list)
    origin: torch.Tensor | None = None
    sum: torch.Tensor | float = 0.0
    squares: torch.Tensor | float = 0.0
    largest: torch.Tensor | float = 0.0

    def add(self, step: int, network: nn.Module) -> None:
        weights = flat(network.state_dict())
        self.origin = weights if self.origin is None else self.origin
        interval = step - (self.times[-1] if self.times else 0)
        # Distances from the first value lose fewer digits than the values.
        distance = weights - self.origin
        self.sum = self.sum + interval * distance
        self.squares = self.squares + interval * distance**2
        self.largest = torch.maximum(torch.as_tensor(self.largest), weights.abs())
        self.times.append(step)

    def norms(self) -> torch.Tensor:
        """Returns `sqrt(sum_k delta_k (p_k - c)^2)` of each weight: delta_k steps since the last update, c the mean."""
        return (self.squares - self.sum**2 / self.times[-1]).clamp(min=0.0).sqrt()


def flat(state_dict: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns all weights as one float64 vector, in the order of their names."""
    return torch.cat([tensor.detach().double().flatten() for _, tensor in sorted(state_dict.items())])


@dataclass
class Training:
    """Results of a training."""

    network: Network
    run: Path
    direct: list[dict[str, torch.Tensor]]
    trajectory: Trajectory


def train(images: torch.Tensor, digits: torch.Tensor, steps: int, out: Path) -> Training:
    """Trains with Adam at a constant rate, which leaves the last weights noisy."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    run = Path(tempfile.mkdtemp(prefix="run-", dir=out))
    # Evenly spaced snapshots alone: this training is long enough for them.
    options = {"update_every": UPDATE_EVERY, "update_after_step": 0, "snapshot_growth": None}
    every = max(steps // SNAPSHOTS // UPDATE_EVERY, 1) * UPDATE_EVERY
    ema = PostHocEMA.from_model(
        network, run / "ema", max_checkpoints=2 * SNAPSHOTS, sigma_rels=STORED, checkpoint_every=every, **options
    )
    # No snapshot is due before the end; `finish` stores one.
    tracked = PostHocEMA.from_model(
        network, run / "direct", sigma_rels=DIRECT, checkpoint_every=steps + UPDATE_EVERY, **options
    )
    trajectory = Trajectory()
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (BATCH,), generator=random)
        optimizer.zero_grad()
        loss_of(network, draw(images[rows], digits[rows], random)).backward()
        optimizer.step()
        ema.update_(network)
        tracked.update_(network)
        if step % UPDATE_EVERY == 0:
            trajectory.add(step, network)
    ema.finish()
    direct = tracked.synthesize(DIRECT)
    tracked.finish()
    return Training(network, run, direct, trajectory)


# %% [markdown]
# ## All lengths, in one pass over the snapshots
#
# Every average is loaded into a copy of the network and evaluated on the same draws of noise and time.


# %%
@dataclass
class Average:
    """A synthesized average and its held-out loss."""

    sigma_rel: float
    plan: Plan
    loss: float


class HeldOut:
    """Held-out images with noise and times drawn once, so that all averages are evaluated on the same draws."""

    def __init__(self, images: torch.Tensor, digits: torch.Tensor, draws: int = 16):
        random = torch.Generator().manual_seed(2)
        self.batches = [draw(images, digits, random) for _ in range(draws)]

    @torch.no_grad()
    def loss(self, network: nn.Module) -> float:
        """Returns the flow-matching loss, mean over images and draws."""
        return sum(loss_of(network, batch).item() for batch in self.batches) / len(self.batches)


def sweep(run: PostHocEMA, network: Network, held_out: HeldOut) -> list[Average]:
    """Synthesizes an average of each length and evaluates it."""
    averaged = copy.deepcopy(network)
    start = time.perf_counter()
    synthesized = run.synthesize(LENGTHS)
    print(f"synthesized {len(LENGTHS)} averages in {time.perf_counter() - start:.2f} s")
    averages = []
    for sigma_rel, plan, state_dict in zip(LENGTHS, run.plan(LENGTHS), synthesized):
        averaged.load_state_dict(state_dict)
        averages.append(Average(sigma_rel, plan, held_out.loss(averaged)))
    return averages


# %% [markdown]
# ## Is the synthesis right?
#
# A synthesis gives update k, with weights p_k, the factor x_k; the target gives it r_k. Both factors sum to 1, so a
# constant c can be subtracted from p_k. Cauchy-Schwarz then bounds the difference of every single weight:
#
#     |sum_k (x_k - r_k) (p_k - c)| <= ||x - r|| sqrt(sum_k delta_k (p_k - c)^2),  ||a||^2 = sum_k a_k^2 / delta_k
#
# Here delta_k is the number of steps since the update before. A plan predicts ||x - r|| / ||r||.


# %%
def target_norm(plan: Plan, times: list[int]) -> float:
    """Returns `||r||`; the factor r_k is the mass of the target's profile since the update before."""
    masses = np.diff(plan.profile.cumulative(times, plan.at), prepend=0.0)
    return math.sqrt(np.sum(masses**2 / np.diff(times, prepend=0)))


def allowed(plan: Plan, trajectory: Trajectory) -> torch.Tensor:
    """Returns the bound for each weight: the profile's error, and the rounding of snapshots and results to float32."""
    roundings = 2.0 + sum(abs(weight.weight) for weight in plan.weights)
    rounding = 0.5 * torch.finfo(torch.float32).eps * roundings
    error = plan.relative_error * target_norm(plan, trajectory.times)
    return error * trajectory.norms() + rounding * trajectory.largest


def check_agreement(run: PostHocEMA, training: Training) -> None:
    """Compares averages that are synthesized from the stored lengths with those that were tracked directly."""
    last = flat(training.network.state_dict())
    print("\nsigma_rel  synthesized to tracked  allowed   (as fractions of the distance of the last weights)")
    for sigma_rel, direct, synthesized, plan in zip(DIRECT, training.direct, run.synthesize(DIRECT), run.plan(DIRECT)):
        tracked = flat(direct)
        difference = (flat(synthesized) - tracked).abs()
        bound = allowed(plan, training.trajectory)
        shares = [(each.norm() / (last - tracked).norm()).item() for each in (difference, bound)]
        print(f"{sigma_rel:9.2f}  {shares[0]:22.3%}  {shares[1]:7.2%}")
        assert (difference <= bound).all(), f"sigma_rel {sigma_rel}: the difference is larger than its bound"


# %% [markdown]
# ## Table and picture

# %%
INK, FAINT, CURVE, LAST = "#222222", "#e1e1e1", "#005aa0", "#be461e"
# Relative error of a profile above which an average is drawn as a rough one.
ROUGH = 0.05


def print_table(averages: list[Average], best: Average, last: float) -> None:
    print("\nsigma_rel  held-out loss   change  profile error")
    for average in averages:
        if average is best or averages.index(average) % 4 == 3:
            mark = "  <- best" if average is best else ""
            change = average.loss / last - 1.0
            error = average.plan.relative_error
            print(f"{average.sigma_rel:9.4f}  {average.loss:13.4f}  {change:+7.1%}  {error:13.2%}{mark}")
    print(f"     last  {last:13.4f}")


def draw_losses(path: Path, averages: list[Average], best: Average, last: float) -> None:
    """Draws the held-out loss over the length of the average, and that of the last weights as a dashed line."""
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.axhline(last, color=LAST, linestyle=(0, (5, 4)), linewidth=1.5, label=f"last weights: {last:.3f}")
    lengths = [a.sigma_rel for a in averages]
    losses = [a.loss for a in averages]
    axes.plot(lengths, losses, color=CURVE, linewidth=1.5, zorder=2)
    axes.scatter(lengths, losses, s=18, color=CURVE, zorder=3, label="synthesized averages")
    rough = [(a.sigma_rel, a.loss) for a in averages if a.plan.relative_error > ROUGH]
    if rough:
        note = f"predicted profile error above {ROUGH:.0%}"
        axes.scatter(*zip(*rough), s=18, color="white", edgecolors=CURVE, zorder=3, label=note)
    name = f"best, σ_rel {best.sigma_rel:.3f}: {best.loss:.3f} ({best.loss / last - 1.0:+.1%})"
    axes.scatter(best.sigma_rel, best.loss, s=60, color=CURVE, zorder=4, label=name)
    style(axes)
    FigureCanvasAgg(figure).print_png(path)


def style(axes) -> None:
    axes.set_xscale("log")
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.288]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("length of the average, σ_rel", color=INK, fontsize=12)
    axes.set_ylabel("held-out flow-matching loss", color=INK, fontsize=12)
    axes.margins(y=0.15)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10)


# %%
def main(steps: int, out: Path) -> None:
    start = time.perf_counter()
    # For matrices of this size a second thread costs more than it gains.
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    images, digits = load_digits()
    held_out = HeldOut(images[TRAINED_ON:], digits[TRAINED_ON:])

    training = train(images[:TRAINED_ON], digits[:TRAINED_ON], steps, out)
    print(f"trained {steps} steps in {time.perf_counter() - start:.0f} s; the run is in {training.run}")

    run = PostHocEMA.from_path(training.run / "ema")
    averages = sweep(run, training.network, held_out)
    best = min(averages, key=lambda average: average.loss)
    last = held_out.loss(training.network)
    print_table(averages, best, last)
    draw_losses(out / "loss.png", averages, best, last)
    check_agreement(run, training)
    assert best.loss < last, f"the best average has a loss of {best.loss:.4f}, the last weights one of {last:.4f}"
    print(f"\n{out / 'loss.png'}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Chooses the length of averaged weights after the training.")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of training, default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/digits-torch"), help="folder, default %(default)s")
    options = parser.parse_args()
    main(options.steps, options.out)
