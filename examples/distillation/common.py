"""What the studies of distilled data share: options, the set before it is learned, and the outer loop."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from distillation.validation import Validation
from etflayers.distill import DistilledSet, Lesson, kmeans_centers, partial_means, random_samples
from etflayers.distill.lessons import UpdateRule
from lab.data import ImageData
from lab.data.sampling import endless_batches
from lab.figures import PALETTE, in_percent, in_plain_numbers, new_figure
from lab.files import Row, write_csv
from lab.networks import NetworkName, NormName
from lab.options import Count, Flag, Free
from lab.progress import bar
from lab.ranks import rank
from lab.results import Results
from lab.settings import DataSettings, at_most
from lab.training import Progress, Run, Stream, in_silence

DistilHeadName = Literal["linear", "standard", "fixed", "nearest"]
StartName = Literal["noise", "real", "kmeans", "means"]
REPRESENTATIVES = {"real": random_samples, "kmeans": kmeans_centers, "means": partial_means}


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(DataSettings):
    """Data, seeds and places: the same for every study."""

    small: ClassVar[dict[str, Any]] = {}  # what --quick makes of the other options

    real_per_class: Count | None = None
    """Learn from this many real images of each class at most (default: from all)."""
    threads: Count = 1
    """CPU threads: networks this small gain little from a second one."""
    checkpoint_every: Free[Count] = 20
    """Outer steps between checkpoints."""
    quick: Free[Flag] = False
    """Under a minute: digits, small networks, few steps; all else as given."""

    @property
    def resolved(self) -> Any:
        """What is run: these settings; with `--quick` its own, for what was left as it is by default."""
        if not self.quick:
            return self
        defaults = {field.name: field.default for field in fields(self)}
        return replace(self, **{n: v for n, v in self.small.items() if getattr(self, n) == defaults[n]})

    def kept_images(self, targets: Tensor, num_classes: int) -> Tensor | None:
        return at_most(self.real_per_class, targets, num_classes)


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(DistillationSettings):
    """The network that is trained on the images."""

    network: NetworkName = "lenet"
    """lenet: that of Wang et al. (2018); alexnet: a small one, two convolutions and two dense layers;
    convnet: three blocks of convolution, norm, ReLU and average pooling; mlp: one hidden layer; linear."""
    width: Count | None = None
    """Channels of the convnet (default: 32) and of the alexnet (default: 64, with 6 and 3 times as many units
    in its dense layers), hidden units of the mlp (default: 128)."""
    norm: NormName = "instance"
    """Normalization in the convnet. batch: with averages over all steps, for the evaluation."""


def first_set(
    start: str, per_class: int, data: ImageData, generator: torch.Generator, **options: Any
) -> DistilledSet:
    """The set before it is learned: noise, real images, class means or centers of k-means."""
    options |= {"per_class": per_class, "num_classes": data.num_classes, "generator": generator}
    options |= data.normalization
    if start == "noise":
        return DistilledSet.from_noise(data.shape, **options).to(data.device)
    train, options["representatives"] = data.train, REPRESENTATIVES[start]
    return DistilledSet.from_data(train.images, train.targets, **options).to(data.device)


def inner_loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, of a model that is given the labels too: the nearest-ETF head learns from them."""
    return F.cross_entropy(model(images, labels), labels)


def squared_error(model: Callable[..., Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """The mean over a batch of the squared distance to the labels."""
    return (model(inputs) - labels).square().sum(-1).mean()


def cosine(step: int, steps: int) -> float:
    """The factor to a rate that falls to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def random_lesson(
    inputs: Tensor, labels: Tensor, size: int, steps: int, optimizer: str | UpdateRule, seed: int
) -> Lesson:
    """Random batches, each image once in every pass, and a rate that falls from 1 to 0."""
    batches = endless_batches(len(inputs), size, torch.Generator().manual_seed(seed))
    numbers = torch.stack(list(islice(batches, steps))).to(inputs.device)
    rates = torch.tensor([cosine(step, steps) for step in range(steps)], dtype=torch.float64)
    return Lesson(inputs, labels, numbers, rates, optimizer)


def digest(content: Any) -> str:
    """What tells one request from another, for the name of a file."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


class OuterRun(Run):
    """A set that is learned step by step, by Adam, whose rates fall to 0 as a cosine if nothing else is said.

    Args:
        settings: of everything.
        seed: of everything random.
        data: real images; only the training set is looked at.
        distilled: the set before it is learned.
        generator: of all that is random.
        rates: Adam's at the start, by the name of what they learn.
        validation: says which of the sets is kept and when to stop; without one, the last set is.
        own: what else tells the run from others.
        parts: what else changes.
    """

    headline = "accuracy"  # among what a step notes

    def __init__(
        self,
        settings: Any,
        seed: int,
        data: ImageData,
        distilled: DistilledSet,
        generator: torch.Generator,
        rates: Mapping[str, float],
        *,
        validation: Validation | None = None,
        own: Mapping[str, Any] | None = None,
        **parts: Any,
    ) -> None:
        self.settings, self.seed, self.data = settings, seed, data
        self.distilled, self.generator, self.device = distilled, generator, data.device
        self.validation = validation or Validation(lambda: 0.0, every=0, patience=None)
        learned = dict(distilled.named_parameters())  # hard labels are none
        self.rates = [rate for name, rate in rates.items() if name in learned]
        self.optimizer = torch.optim.Adam({"params": [learned[name]]} for name in rates if name in learned)
        parts |= {"distilled": distilled, "optimizer": self.optimizer, "generator": Stream(generator)}
        parts["validation"] = self.validation
        fingerprint = {**settings.fingerprint(), **data.fingerprint, **(own or {}), "seed": seed}
        super().__init__(parts, fingerprint, settings.outer_steps)

    def advance(self) -> Row:
        with self.clock():
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * self.factor()
            self.optimizer.zero_grad()
            row = self.update()
        self.validation.look(self.step + 1, self.total, self.distilled)
        return row

    @property
    def over(self) -> bool:
        return super().over or self.validation.gives_up

    def factor(self) -> float:
        """What the rates are multiplied by in this step."""
        return cosine(self.step, self.total)

    @abstractmethod
    def update(self) -> Row:
        """Find the gradients and take a step of the optimizer."""

    def learn(self, name: str, progress: Progress = in_silence) -> None:
        """Take the steps that are left, with the checkpoint of this name."""
        settings = self.settings
        options = {"resume": settings.resume, "every": settings.checkpoint_every, "progress": progress}
        self.finish(settings.checkpoint(name), **options)
        self.validation.restore_best(self.distilled)

    def tell(self, row: Row) -> str:
        """What people see of a step."""
        seen = f", validation {self.validation.curve[-1][1]:.1%}" if self.validation.curve else ""
        return f"loss {row['loss']:.3f}, {self.headline} {row[self.headline]:.1%}{seen}"

    def learn_and_write(self, name: str, results: Results) -> None:
        """The same in sight of people; the first rank writes the set, and what each step has noted."""
        with bar(results.console, name, self.tell) as shown:
            self.learn(name, shown)
        if rank() > 0:
            return
        self.distilled.metadata = {"settings": self.settings.fingerprint(), "seed": self.seed}
        self.distilled.save(results.folder / f"{name}.safetensors")
        write_csv(results.folder / f"{name}-history.csv", self.history)


def rates_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The learning rates that were chosen for rows, ascending; nothing if none was."""
    return ", ".join(f"{rate:g}" for rate in sorted({row["rate"] for row in rows if row.get("rate")})) or None


def learning_figure(
    histories: Mapping[str, Sequence[Sequence[Row]]], panels: Mapping[str, str], title: str
) -> Figure:
    """What was noted by outer step, a panel for each: a line is a mean over runs, and a running one.

    What falls over decades, losses and norms, has a logarithmic axis.
    """
    figure = new_figure(1 + 3.5 * len(panels), 3.5, title)
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for color, (legend, runs) in zip(PALETTE * len(histories), histories.items(), strict=False):
            values = np.asarray([[row[name] for row in history] for history in runs]).mean(0)
            axes.plot([row["step"] for row in runs[0]], _smoothed(values), color=color, label=legend)
        axes.set(title=label, xlabel="outer step")
        if name in ("loss", "gradient_norm"):
            axes.set_yscale("log")
            in_plain_numbers(axes)
        else:
            in_percent(axes)
    figure.axes[0].legend()
    return figure


def _smoothed(values: np.ndarray, width: int = 15) -> np.ndarray:
    """A running mean, over what there is near the ends and where a batch had something to measure."""
    known, window = np.isfinite(values), np.ones(max(1, min(width, len(values) // 4)))
    parts = (np.where(known, values, 0), known.astype(float))
    total, count = (np.convolve(part, window, mode="same") for part in parts)
    return total / np.maximum(count, 1)
