"""The linear case: how many distilled images a linear model needs, by experiment and by its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from comparison import checkpoints, data
from comparison.figures import draw_figures
from comparison.progress import threads
from comparison.reporting import make_table, write_csv, write_json
from comparison.settings import DataName
from comparison.settings import Settings as DataSettings
from distillation.linear.theory import LinearTask
from etflayers.checks import require
from etflayers.distill import SGD, UnrolledInnerLoop

CaseName = Literal["one-step", "repeated", "in-turn", "known-start"]
Row = dict[str, Any]

LABELS: dict[CaseName, str] = {
    "one-step": "one step on all images",
    "repeated": "several steps, all images in each",
    "in-turn": "a step on each image",
    "known-start": "one step, known start",
}
# Colors of Okabe and Ito, which the color-blind can tell apart, and a marker that can be seen below others.
STYLES: dict[CaseName, tuple[str, str, int]] = {
    "one-step": ("#0072B2", "o", 9),
    "repeated": ("#E69F00", "s", 5),
    "in-turn": ("#D55E00", "x", 6),
    "known-start": ("#009E73", "^", 6),
}


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """Distil images for a linear model with a random start, and compare with the least possible excess."""

    data: DataName = "digits"
    """Whose training images are the real points; the target is whether the class is odd."""
    data_dir: Path | None = None
    """As for the other commands."""
    side: int = 3
    """Images are averaged to so many pixels a side: D = side^2 for grey ones."""
    deviation: float = 1.0
    """Standard deviation s of the entries of a random start."""
    cases: tuple[CaseName, ...] = get_args(CaseName)
    """one-step: all images in one step; repeated: in each of several steps; in-turn: each image has a step of
    its own; known-start: one step, from one start that is always the same."""
    images: tuple[int, ...] | None = None
    """Numbers of images M (default: from 1 to D + 1)."""
    repeats: int = 3
    """Steps of the case `repeated`, each with a rate of its own."""

    steps: int = 1000
    """Steps of the outer training."""
    starts: int = 32
    """Random starts in each of them."""
    lr: float = 0.1
    """Of Adam, which learns images, targets and the logarithms of the rates; it falls to 0 as a cosine."""
    seeds: tuple[int, ...] = (0,)
    """Of the images at first and of the starts."""

    out: Path = Path("runs/distill-linear")
    """Folder for tables, figures and finished trainings."""
    resume: bool = False
    """Keep the trainings that are finished in the output folder; the one that was killed takes seconds."""

    def check(self) -> None:
        """Raise :class:`~etflayers.errors.InvalidArgumentError` for what cannot be run."""
        for name in ("cases", "seeds", "images"):
            values = getattr(self, name)
            require(
                values is None or len(set(values)) == len(values) > 0,
                f"--{name} must name at least one and none twice, got {values}",
            )
        for name in ("side", "repeats", "steps", "starts"):
            value = getattr(self, name)
            require(value >= 1, f"--{name} must be at least 1, got {value}")
        require(
            self.images is None or min(self.images) >= 1, f"--images must be at least 1, got {self.images}"
        )
        require(
            all(0 <= seed < 2**31 for seed in self.seeds), f"--seeds must lie in [0, 2**31), got {self.seeds}"
        )
        for name in ("lr", "deviation"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"--{name} must be a positive number, got {value}")

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers of a training, as JSON values: a continuation must agree with it."""
        free = {"cases", "images", "seeds", "out", "resume", "data_dir"}
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in free}


def linear_case(settings: LinearSettings, console: Console) -> list[Row]:
    """Learn images for every case, number of images and seed; write a table and a figure.

    Raises:
        InvalidArgumentError: settings that cannot be run.
        MissingDependencyError: the package that brings the data is not installed.
        NonFiniteError: a training has diverged.
    """
    settings.check()
    task = make_task(settings)
    counts = settings.images or tuple(range(1, task.dim + 2))
    console.print(
        f"linear model on {settings.data}: {len(task.inputs)} points of {task.dim} numbers, expected excess "
        f"before training {task.untrained:.4g}",
        highlight=False,
    )
    rows: list[Row] = []
    with threads(1):
        for case in settings.cases:
            for count in counts:
                reached = [_kept(case, count, seed, task, settings) for seed in settings.seeds]
                for seed, excess in zip(settings.seeds, reached, strict=True):
                    rows.append(_row(case, count, seed, excess, task))
                console.print(
                    f"{LABELS[case]}, images: {count}: excess {_short(fmean(reached))}, "
                    f"bound {_short(rows[-1]['bound'])}",
                    highlight=False,
                )
    files = [
        write_csv(settings.out / "linear.csv", rows),
        write_json(settings.out / "linear.json", {"settings": settings.fingerprint(), "rows": rows}),
    ]
    title = f"Linear model on {settings.data}, D = {task.dim}"
    makers = {"linear": partial(_figure, task)}
    files += draw_figures(settings.out, makers, rows, title)  # type: ignore[arg-type]
    console.print(summary_table(rows, f"{title}: expected excess loss"))
    console.print(f"Written to {settings.out}: {', '.join(path.name for path in files)}", highlight=False)
    return rows


def make_task(settings: LinearSettings) -> LinearTask:
    """Averaged training images and the parity of their classes, both of mean 0 and mean square 1."""
    train = data.load(DataSettings(data=settings.data, data_dir=settings.data_dir)).train
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


def _kept(case: CaseName, count: int, seed: int, task: LinearTask, settings: LinearSettings) -> float:
    """What :func:`learn` returns, from the file of an earlier run where there is one and it may be used."""
    path = settings.out / "checkpoints" / f"{case}-M{count}-seed{seed}.pt"
    fingerprint = {**settings.fingerprint(), "case": case, "images": count, "seed": seed}
    if settings.resume and path.exists():
        return float(checkpoints.load(path, fingerprint, torch.device("cpu"))["excess"])
    excess = learn(case, count, seed, task, settings)
    checkpoints.save(path, {"fingerprint": fingerprint, "excess": excess})
    return excess


def _row(case: CaseName, count: int, seed: int, excess: float, task: LinearTask) -> Row:
    known = case == "known-start"
    return {
        "case": case,
        "images": count,
        "seed": seed,
        "excess": excess,
        "bound": 0.0 if known else task.bound(count),
        "principal": 0.0 if known else task.principal(count),
        "untrained": task.untrained,
    }


def summary_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The bound, what principal images reach, and the mean excess of each case over the seeds."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    table = make_table(title, "images", "bound", *(case.replace("-", "\n") for case in cases), "principal")
    for count in sorted({row["images"] for row in rows}):
        same = [row for row in rows if row["images"] == count]
        limit = next((row for row in same if row["case"] != "known-start"), same[0])
        cells = [
            _short(fmean(row["excess"] for row in same if row["case"] == case))
            if any(row["case"] == case for row in same)
            else "–"
            for case in cases
        ]
        table.add_row(str(count), _short(limit["bound"]), *cells, _short(limit["principal"]))
    return table


def _short(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.0e}"


def _figure(task: LinearTask, rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Expected excess by number of images: the bound as a line, what was reached as points."""
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    counts = range(max(row["images"] for row in rows) + 1)
    bounds = [task.bound(count) for count in counts]
    for axes in (left, right):
        axes.axvline(task.dim, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlabel("distilled images M")
        axes.set_xticks(list(counts))
    left.plot(counts, bounds, color="black", label="bound, any number of steps")
    below = [count for count in counts if 0 < count < task.dim]
    right.axhline(1, color="black")
    right.plot(
        below,
        [task.principal(count) / task.bound(count) for count in below],
        color="#999999",
        linestyle="--",
        label="principal images",
    )
    for case in dict.fromkeys(row["case"] for row in rows):
        color, marker, size = STYLES[case]
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": size, "linestyle": "none"}
        if marker != "x":
            style["markerfacecolor"] = "none"
        same = [row for row in rows if row["case"] == case]
        left.plot(
            [row["images"] for row in same], [row["excess"] for row in same], label=LABELS[case], **style
        )
        ratios = [(row["images"], row["excess"] / row["bound"]) for row in same if row["bound"] > 1e-9]
        if ratios:
            right.plot(*zip(*ratios, strict=True), **style)
    left.set(title="Expected excess loss", ylim=(-0.03 * task.untrained, 1.03 * task.untrained))
    right.set(title="Excess over the bound, M < D")
    left.legend()
    right.legend()
    return figure
