"""The linear case: how many distilled images a linear model needs, by experiment and by its bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from etflayers.checks import require
from etflayers.distill import SGD, LinearTask, UnrolledInnerLoop
from lab.data import ImageData, load
from lab.figures import BLUE, GREEN, ORANGE, RED, new_figure
from lab.files import Row, kept
from lab.options import Count, Distinct, Free, Positive
from lab.results import Results, grouped, make_table
from lab.settings import DataName, DataSettings
from lab.training import threads

CaseName = Literal["one-step", "repeated", "in-turn", "known-start"]

LABELS: dict[CaseName, str] = {
    "one-step": "one step on all images",
    "repeated": "several steps, all images in each",
    "in-turn": "a step on each image",
    "known-start": "one step, known start",
}
# Colors, and markers that can be seen below others.
STYLES: dict[CaseName, tuple[str, str, int]] = {
    "one-step": (BLUE, "o", 9),
    "repeated": (ORANGE, "s", 5),
    "in-turn": (RED, "x", 6),
    "known-start": (GREEN, "^", 6),
}


@dataclass(frozen=True, kw_only=True)
class LinearSettings(DataSettings):
    """Distil images for a linear model with a random start, and compare with the least possible excess.

    The real points are training images; the target is whether their class is odd. Finished trainings are kept
    for `--resume`: one takes seconds.
    """

    default_out: ClassVar[str] = "runs/distill-linear"

    data: DataName = "digits"
    """Whose training images are the real points: as for the other studies."""
    device: Literal["cpu"] = "cpu"
    """These problems are too small for another."""
    side: Count = 3
    """Images are averaged to so many pixels a side: D = side^2 for grey ones."""
    deviation: Positive = 1.0
    """Standard deviation s of the entries of a random start."""
    cases: Free[Distinct[CaseName]] = ("one-step", "repeated", "in-turn", "known-start")
    """one-step: all images in one step; repeated: in each of several steps; in-turn: each image has a step of
    its own; known-start: one step, from one start that is always the same."""
    images: Free[Distinct[Count] | None] = None
    """Numbers of images M (default: from 1 to D + 1)."""
    repeats: Count = 3
    """Steps of the case `repeated`, each with a rate of its own."""

    steps: Count = 1000
    """Steps of the outer training."""
    starts: Count = 32
    """Random starts in each of them."""
    lr: Positive = 0.1
    """Of Adam, which learns images, targets and the logarithms of the rates; it falls to 0 as a cosine."""


def linear_case(settings: LinearSettings, console: Console) -> list[Row]:
    """Learn images for every case, number of images and seed; write a table and a figure."""
    results, data = Results(settings.folder, console), load(settings)
    task = make_task(settings, data)
    results.say(
        f"linear model on {settings.data}: {len(task.inputs)} points of {task.dim} numbers, expected excess "
        f"before training {task.untrained:.4g}"
    )
    rows: list[Row] = []
    with threads(1):
        for case in settings.cases:
            for count in settings.images or tuple(range(1, task.dim + 2)):
                found = [_row(case, count, seed, task, settings, data) for seed in settings.seeds]
                rows += found
                excess, bound = _short(fmean(row["excess"] for row in found)), _short(found[-1]["bound"])
                results.say(f"{LABELS[case]}, images: {count}: excess {excess}, bound {bound}")
    title = f"Linear model on {settings.data}, D = {task.dim}"
    results.csv("linear", rows)
    results.json("linear", {"settings": settings.fingerprint(), "rows": rows})
    results.figures({"linear": partial(excess_figure, task, rows, title)})
    console.print(summary_table(rows, f"{title}: expected excess loss"))
    results.tell()
    return rows


def make_task(settings: LinearSettings, data: ImageData) -> LinearTask:
    """Averaged training images and the parity of their classes, both of mean 0 and mean square 1."""
    train = data.train
    require(
        settings.side <= min(train.images.shape[-2:]),
        f"--side {settings.side} is more than the {min(train.images.shape[-2:])} pixels of the images",
    )
    inputs = F.adaptive_avg_pool2d(train.images.double(), settings.side).flatten(1)
    inputs = inputs - inputs.mean(0)
    targets = (train.targets % 2).double()
    targets = targets - targets.mean()
    return LinearTask(inputs / _rms(inputs), targets / _rms(targets), settings.deviation)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


class LinearSet(nn.Module):
    """Images ``(M, D)``, targets ``(M,)`` and rates of a case, as what the inner loop takes."""

    def __init__(
        self, case: CaseName, count: int, dim: int, repeats: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.batches = count if case == "in-turn" else 1
        self.epochs = repeats if case == "repeated" else 1
        self.images = nn.Parameter(torch.randn(count, dim, generator=generator, dtype=torch.float64))
        self.targets = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        # A first step of about the size of the error, however many images share it or steps follow it.
        self.log_rates = nn.Parameter(
            torch.full((self.batches * self.epochs,), -math.log(dim), dtype=torch.float64)
        )

    def train_from(self, theta: Tensor) -> Tensor:
        """theta_T from each of the starts ``(n, D)``: n models side by side, each on its own."""
        model = nn.Linear(theta.shape[1], len(theta), bias=False, dtype=theta.dtype)
        loop = UnrolledInnerLoop(model, loss=squared_errors, optimizer=SGD(), epochs=self.epochs)
        images = self.images.view(self.batches, -1, theta.shape[1])
        targets = self.targets.view(self.batches, -1)
        trained = loop(images, targets, lr=self.log_rates.exp(), params={"weight": theta})
        return trained.params["weight"]

    @torch.no_grad()
    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Matrix and offset of ``theta_0 -> theta_T``, which steps on a squared error make affine."""
        dim = self.images.shape[1]
        zero, units = torch.zeros(1, dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
        trained = self.train_from(torch.cat([zero, units]))
        return (trained[1:] - trained[0]).mT, trained[0]


def squared_errors(model: Any, images: Tensor, targets: Tensor) -> Tensor:
    """Half the mean squared error on a batch, summed over the models side by side."""
    error: Tensor = model(images) - targets.unsqueeze(-1)
    return 0.5 * error.square().mean(0).sum()


def learn(case: CaseName, count: int, seed: int, task: LinearTask, settings: LinearSettings) -> float:
    """Learn a set by Adam from random starts, and return its expected excess, exact over all starts."""
    generator = torch.Generator().manual_seed(seed)
    known = task.deviation * torch.randn(1, task.dim, generator=generator, dtype=torch.float64)
    learned = LinearSet(case, count, task.dim, settings.repeats, generator)
    optimizer = torch.optim.Adam(learned.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in range(settings.steps):
        random = torch.randn(settings.starts, task.dim, generator=generator, dtype=torch.float64)
        starts = known if case == "known-start" else task.deviation * random
        optimizer.zero_grad()
        task.excess(learned.train_from(starts)).mean().backward()
        optimizer.step()
        schedule.step()
    matrix, offset = learned.affine_map()
    if case == "known-start":
        return float(task.excess(matrix @ known[0] + offset))
    return task.expected_excess(matrix, offset)


def _row(
    case: CaseName, count: int, seed: int, task: LinearTask, settings: LinearSettings, data: ImageData
) -> Row:
    """What :func:`learn` reaches, now or in an earlier run, and what could be reached."""
    own = {"case": case, "images": count, "seed": seed}
    excess = kept(
        settings.checkpoint(f"{case}-M{count}-seed{seed}"),
        settings.fingerprint() | data.fingerprint | own,
        lambda: learn(case, count, seed, task, settings),
        resume=settings.resume,
    )
    known = case == "known-start"
    bounds = {
        "bound": 0.0 if known else task.bound(count),
        "principal": 0.0 if known else task.principal(count),
    }
    return {**own, "excess": excess, **bounds, "untrained": task.untrained}


def summary_table(rows: Sequence[Row], title: str) -> Table:
    """The bound, what principal images reach, and the mean excess of each case over the seeds."""
    cases = dict.fromkeys(row["case"] for row in rows)
    headings = ["bound", *(case.replace("-", "\n") for case in cases), "principal"]
    table = make_table(title, ["images"], headings)
    for (count,), same in sorted(grouped(rows, "images").items()):
        limit = next((row for row in same if row["case"] != "known-start"), same[0])
        reached = {case: [row["excess"] for row in same if row["case"] == case] for case in cases}
        cells = (_short(fmean(values)) if values else "–" for values in reached.values())
        table.add_row(str(count), _short(limit["bound"]), *cells, _short(limit["principal"]))
    return table


def _short(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.0e}"


def excess_figure(task: LinearTask, rows: Sequence[Row], title: str) -> Figure:
    """Expected excess by number of images: the bound as a line, what was reached as points."""
    figure = new_figure(10.5, 4, title)
    left, right = figure.subplots(1, 2)
    counts = range(max(row["images"] for row in rows) + 1)
    for axes in (left, right):
        axes.axvline(task.dim, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlabel("distilled images M")
        axes.set_xticks(list(counts))
    bounds = [task.bound(count) for count in counts]
    left.plot(counts, bounds, color="black", label="bound, any number of steps")
    below = [count for count in counts if 0 < count < task.dim]
    ratios = [task.principal(count) / task.bound(count) for count in below]
    right.axhline(1, color="black")
    right.plot(below, ratios, color="#999999", linestyle="--", label="principal images")
    for (case,), same in grouped(rows, "case").items():
        color, marker, size = STYLES[case]
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": size, "linestyle": "none"}
        if marker != "x":
            style["markerfacecolor"] = "none"
        reached = [(row["images"], row["excess"]) for row in same]
        left.plot(*zip(*reached, strict=True), label=LABELS[case], **style)
        over = [(row["images"], row["excess"] / row["bound"]) for row in same if row["bound"] > 1e-9]
        if over:
            right.plot(*zip(*over, strict=True), **style)
    left.set(title="Expected excess loss", ylim=(-0.03 * task.untrained, 1.03 * task.untrained))
    right.set(title="Excess over the bound, M < D")
    left.legend()
    right.legend()
    return figure
