"""Kernel inducing points: images and labels learned by the loss of regression on them, arXiv 2011.00050."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from distillation.common import (
    DistillationSettings,
    OuterRun,
    StartName,
    digest,
    first_set,
    learning_figure,
    random_lesson,
    rates_of,
)
from etflayers import distill
from etflayers.checks import require
from etflayers.distill import (
    DistilledSet,
    KernelRidgeInnerLoop,
    accuracy,
    best_rate,
    centered_one_hot,
    judged,
    teach,
    write_png,
)
from etflayers.distill.lessons import UpdateRule
from etflayers.errors import NonFiniteError
from etflayers.storage import write_tensors
from lab.data import ImageData, Split, load_inputs
from lab.data.sampling import mirrored, shifted, turned
from lab.data.whitening import Whitening
from lab.figures import BLUE, GREY, RED, SKY, in_percent, legend_beside, new_figure
from lab.files import Row, kept
from lab.networks import Factory, NetworkName, make_factory, seeded
from lab.options import Count, Distinct, Flag, Free, Natural, NotNegative, Positive
from lab.results import Results, grouped, make_table, mean_and_deviation, percent
from lab.training import threads

Change = Callable[[Tensor], Tensor]  # of images whose black is 0
BASELINES = {"random images": "real", "class means": "means", "k-means centers": "kmeans"}
PANELS = {"loss": "squared error", "accuracy": "accuracy"}
RIVALS = ("random images", "k-means centers")  # that networks are trained on, too
COLORS = {"learned": RED, "random images": SKY, "class means": GREY, "k-means centers": BLUE}
FRESH_SEEDS = 3 * 10**6  # of networks: far from those of the sets
LARGEST = 6000  # images whose kernel matrix is made as a whole
LARGEST_COST = 2 * 10**8  # numbers of a convolutional kernel on the way to that matrix: a few minutes
WIDE: dict[str, Callable[..., distill.Kernel]] = {
    "ntk": distill.NTKKernel,
    "nngp": distill.NNGPKernel,
    "conv-ntk": distill.ConvNTKKernel,
    "conv-nngp": distill.ConvNNGPKernel,
}


@dataclass(frozen=True, kw_only=True)
class KernelSettings(DistillationSettings):
    """Learn images and labels in closed form: the support of a kernel regression on real images."""

    default_out: ClassVar[str] = "runs/distill-kernel"
    small: ClassVar[dict[str, Any]] = {"data": "digits", "per_class": (1, 10), "networks": ("mlp",)}
    small |= {"outer_steps": 60, "outer_batch": 200, "draws": 2, "evaluations": 2, "training_steps": 100}
    small |= {"rate_grid": (1e-3,)}

    kernel: Literal["ntk", "nngp", "conv-ntk", "conv-nngp", "rbf", "linear"] = "ntk"
    """ntk, nngp: of a ReLU network of infinite width, all of it trained or its last layer; conv-ntk,
    conv-nngp: of a convolutional one of infinitely many channels; rbf: a Gaussian; linear: inner products,
    that is linear regression."""
    depth: Count = 1
    """Hidden layers of `--kernel ntk` and `nngp`, 3x3 convolutions of `conv-ntk` and `conv-nngp`."""
    pool_after: tuple[Count, ...] = ()
    """Convolutions, counted from 1, behind which 2x2 pixels are averaged. For images of p pixels that makes
    the kernel p times as expensive, and so does the next option."""
    readout: Literal["flatten", "average"] = "flatten"
    """What the last layer of a convolutional kernel sees: all pixels, or their average."""
    parametrization: Literal["ntk", "standard"] = "ntk"
    """Of `--kernel ntk` and `conv-ntk`; standard: weights are trained as PyTorch draws them, so that a layer
    counts by the number of its inputs."""
    kernel_width: Count | None = None
    """Hidden units or channels of the network that `--parametrization standard` stands for (default: 1024
    units, 128 channels)."""
    bias_variance: NotNegative = 0.01
    """Of the biases of all kernels but `--kernel rbf`."""
    bandwidth: Positive = 0.5
    """Of `--kernel rbf`, in units of the root of the number of pixels."""
    ridge: NotNegative = 1e-6
    """Relative to the mean of the diagonal of the kernel of the support."""

    per_class: Free[Distinct[Count]] = (1, 10, 50)
    """Images of each class; one set is learned for each number."""
    start: StartName = "kmeans"
    """What the images start from: noise, random real images, centers of k-means or class means."""
    labels: Literal["fixed", "learned", "solved"] = "learned"
    """fixed: centered one-hot vectors; learned: by Adam, from these; solved: in closed form, for each batch
    while images are learned and in the end for all training images."""
    zca: NotNegative | None = None
    """Whiten the pixels (ZCA, fitted on the training images) with this ridge, relative to their mean
    variance; published: 0.1. Default: no whitening."""
    shift: Natural = 0
    """Augmentation: shift each real image by up to this many pixels each way."""
    rotation: NotNegative = 0.0
    """Augmentation: turn each real image by up to this many degrees each way."""
    flip: Flag = False
    """Augmentation: mirror every second real image, at random."""
    outer_steps: Count = 500
    """Updates of the images."""
    outer_batch: Count = 500
    """Real images in the loss of each."""
    image_rate: Positive = 0.05
    """Adam's learning rate for images, with a cosine decay to 0."""
    label_rate: Positive = 0.02
    """Adam's learning rate for labels, likewise."""

    draws: Free[Count] = 5
    """Sets of random real images among the baselines."""
    networks: Free[tuple[NetworkName, ...]] = ("mlp", "lenet")
    """Finite networks that are trained on the learned set, on the squared error to its labels, and on as many
    random real images and k-means centers."""
    optimizers: Free[Distinct[Literal["adam", "sgd"]]] = ("adam",)
    """How they are trained; sgd: with momentum 0.9 and the penalty of `--l2`, as published."""
    evaluations: Free[Count] = 3
    """Networks of each kind for each set."""
    training_steps: Free[Count] = 300
    """Steps of their training."""
    training_batch: Free[Count] = 100
    """Images in a step; all, if there are no more."""
    rate_grid: Free[Distinct[Positive]] = (3e-4, 1e-3, 3e-3)
    """Adam's learning rates for them: the best on a part of the training images is taken, for each set."""
    sgd_rates: Free[Distinct[Positive]] = (1e-3, 1e-2, 3e-2)
    """SGD's, likewise."""
    l2: Free[NotNegative] = 5e-4
    """Weight decay of SGD: `l2 |w|^2 / 2` is added to the loss."""

    def check(self) -> None:
        super().check()
        require(
            self.labels != "solved" or self.outer_batch >= 10 * max(self.per_class),
            f"--labels solved fits labels to each batch: --outer-batch {self.outer_batch} must be at least "
            f"ten times --per-class {max(self.per_class)}",
        )
        require(
            self.kernel.startswith("conv-") or (self.pool_after, self.readout) == ((), "flatten"),
            f"--pool-after and --readout are of --kernel conv-ntk and conv-nngp, not of {self.kernel}",
        )
        require(
            max(self.pool_after, default=1) <= self.depth
            and len(set(self.pool_after)) == len(self.pool_after),
            f"--pool-after must name convolutions from 1 to --depth {self.depth}, none twice, "
            f"got {self.pool_after}",
        )
        require(
            self.parametrization == "ntk" or self.kernel in ("ntk", "conv-ntk"),
            f"--parametrization standard is of --kernel ntk and conv-ntk, not of {self.kernel}",
        )
        require(
            self.parametrization == "standard" or self.kernel_width is None,
            "--kernel-width has a meaning for --parametrization standard only",
        )

    def training_rule(self, optimizer: str) -> tuple[str | UpdateRule, tuple[float, ...]]:
        """The update rule of finite networks, and the learning rates to choose from."""
        if optimizer == "adam":
            return "adam", self.rate_grid
        return partial(torch.optim.SGD, momentum=0.9, weight_decay=self.l2), self.sgd_rates

    @property
    def sees_all_pairs_of_pixels(self) -> bool:
        """Whether the kernel is made of all pairs of pixels, and not of pairs of one place."""
        return bool(self.pool_after) or self.readout == "average"


def make_loop(settings: KernelSettings, data: ImageData) -> KernelRidgeInnerLoop:
    """Ridge regression with the kernel of the settings."""
    kernel: distill.Kernel
    if settings.kernel == "rbf":
        kernel = distill.RBFKernel(settings.bandwidth * math.prod(data.shape) ** 0.5)
    elif settings.kernel == "linear":
        kernel = distill.LinearKernel(settings.bias_variance)
    else:
        options: dict[str, Any] = {"depth": settings.depth, "bias_variance": settings.bias_variance}
        if settings.kernel.startswith("conv-"):
            options |= {"pool_after": settings.pool_after, "readout": settings.readout}
        if settings.parametrization == "standard":
            width = {} if settings.kernel_width is None else {"width": settings.kernel_width}
            options |= {"parametrization": "standard", **width}
        kernel = WIDE[settings.kernel](**options)
    return KernelRidgeInnerLoop(kernel, ridge=settings.ridge)


def accuracy_of(loop: KernelRidgeInnerLoop, distilled: DistilledSet, split: Split) -> float:
    """Of the regression on a set."""
    return accuracy(loop.predict(split.images, distilled.inputs, distilled.labels), split.targets)["accuracy"]


@torch.no_grad()
def with_solved_labels(loop: KernelRidgeInnerLoop, distilled: DistilledSet, images: Split) -> DistilledSet:
    """The same images with the labels that are best for regression on ``images``."""
    targets = centered_one_hot(images.targets, distilled.num_classes)
    labels = loop.solve_labels(images.images, targets, distilled.inputs)
    return DistilledSet(distilled.inputs, labels, mean=distilled.mean, std=distilled.std)


class View:
    """How the regression sees images: normalized, and whitened where asked.

    Args:
        data: normalized images.
        ridge: of the whitening; ``None``: as they are.
    """

    def __init__(self, data: ImageData, ridge: float | None = None) -> None:
        self.normalization = data.normalization
        self.whitening = None if ridge is None else Whitening.of(data.train.images, ridge)
        self.data = data if self.whitening is None else self.whitening.of_data(data)

    def changed(self, inputs: Tensor, changes: Sequence[Change]) -> Tensor:
        """Inputs whose images are changed, pixels that come in being black, and that are seen again."""
        mean, deviation = self.normalization.values()
        black = (-mean / deviation).view(1, -1, 1, 1)
        images = inputs if self.whitening is None else self.whitening.undone(inputs)
        images = images - black
        for change in changes:
            images = change(images)
        images = images + black
        return images if self.whitening is None else self.whitening(images)

    @torch.no_grad()
    def shown(self, distilled: DistilledSet) -> Tensor:
        """The pictures of a set."""
        if self.whitening is None:
            return distilled.images()
        plain = self.whitening.undone(distilled.inputs)
        return DistilledSet(plain, distilled.labels, **self.normalization).images()

    def save(self, path: Path) -> None:
        """Write what takes images to inputs and back, where that is more than a set says of itself."""
        if self.whitening is not None:
            write_tensors(path, {**vars(self.whitening), **self.normalization}, {"kind": "whitening"})


class Inducing(OuterRun):
    """A set learned by gradients of the error of the regression on batches of the training images."""

    def __init__(
        self,
        settings: KernelSettings,
        per_class: int,
        seed: int,
        data: ImageData,
        view: View | None = None,
    ) -> None:
        self.loop = make_loop(settings, data)
        self.view = View(data) if view is None else view
        # A stream for every size, so that none depends on which others are asked for.
        generator = torch.Generator().manual_seed(1000 * seed + per_class)
        distilled = first_set(settings.start, per_class, data, generator, labels="centered")
        rates = {"inputs": settings.image_rate}
        if settings.labels == "learned":
            rates["labels"] = settings.label_rate
        own = {"images of a class": per_class}
        super().__init__(settings, seed, data, distilled, generator, rates, own=own)

    def finish(self, *args: Any, **options: Any) -> None:
        super().finish(*args, **options)
        if self.settings.labels == "solved":
            self.distilled = with_solved_labels(self.loop, self.distilled, self.data.train)

    def update(self) -> Row:
        """The loss of the regression on a batch of real images, and a step of Adam."""
        inputs, classes = self.batch()
        targets = centered_one_hot(classes, self.data.num_classes)
        support, labels = self.distilled.inputs, self.distilled.labels
        if self.settings.labels == "solved":
            # At the best labels the loss does not change with them: its gradient needs none through them.
            labels = self.loop.solve_labels(inputs, targets, support.detach())
        outputs = self.loop(inputs, support, labels)
        loss = (outputs - targets).square().sum(-1).mean()
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss of step {self.step} is {loss.item()}: take a smaller --image-rate or a larger "
                "--ridge"
            )
        loss.backward()
        self.optimizer.step()
        return {"step": self.step, "loss": loss.item(), **accuracy(outputs, classes)}

    def batch(self) -> tuple[Tensor, Tensor]:
        """Real images as the regression sees them, shifted, turned and mirrored where asked."""
        inputs, classes = self.data.train.batch(self.settings.outer_batch, self.generator)
        changes = self.changes(len(inputs))
        return (self.view.changed(inputs, changes) if changes else inputs), classes

    def changes(self, count: int) -> list[Change]:
        """Random ones of as many images, in the order in which they are made."""
        settings, generator, changes = self.settings, self.generator, list[Change]()
        if settings.shift:
            shifts = torch.randint(-settings.shift, settings.shift + 1, (count, 2), generator=generator)
            changes.append(partial(shifted, shifts=shifts.to(self.device)))
        if settings.rotation:
            angles = math.radians(settings.rotation) * (2 * torch.rand(count, generator=generator) - 1)
            changes.append(partial(turned, angles=angles.to(self.device)))
        if settings.flip:
            chosen = torch.rand(count, generator=generator) < 0.5
            changes.append(partial(mirrored, chosen=chosen.to(self.device)))
        return changes


def learn_kernel_set(settings: KernelSettings, console: Console) -> list[Row]:
    """Learn a set for each size and seed, compare it with baselines; write sets, tables and figures."""
    with threads(settings.threads):
        study = Study(settings, console)
        sets = [study.one_set(size, seed) for size in settings.per_class for seed in settings.seeds]
    rows = list(chain(*sets))
    study.report(rows)
    return rows


class Study:
    """What all sets share: settings, real images, and what the kernel makes of all of them."""

    def __init__(self, settings: KernelSettings, console: Console) -> None:
        self.settings, self.results = settings, Results(settings.folder, console)
        plain = load_inputs(settings)
        self.view = View(plain, settings.zca)
        self.data = data = self.view.data
        self.view.save(settings.folder / "whitening.safetensors")
        self.loop = make_loop(settings, data)
        self.histories: dict[str, list[list[Row]]] = {}
        same, path = settings.fingerprint() | data.fingerprint, settings.checkpoint("all-images")
        self.full = kept(path, same, lambda: full_accuracy(settings, data), resume=settings.resume)
        worth = "too many for" if self.full is None else f"test accuracy {self.full:.2%} of"
        self.results.say(
            f"{settings.kernel} on {data.name}: {len(data.train)} images to learn from, {len(data.test)} to "
            f"test on; {worth} the kernel of all of them"
        )

    def one_set(self, per_class: int, seed: int) -> list[Row]:
        """Learn a set, write it with its picture, and judge it."""
        settings, name = self.settings, f"{per_class}-a-class-seed{seed}"
        run = Inducing(settings, per_class, seed, self.data, self.view)
        run.learn_and_write(name, self.results)
        write_png(settings.folder / f"{name}.png", self.view.shown(run.distilled))
        self.histories.setdefault(f"{per_class} a class", []).append(run.history)
        judged = ("draws", "networks", "evaluations", "training_steps", "training_batch", "rate_grid")
        judged += ("optimizers", "sgd_rates", "l2")
        path = settings.checkpoint(f"{name}-rows-{digest(settings.values(*judged))}")
        make = partial(self.judge, run.distilled, per_class, seed)
        rows: list[Row] = kept(path, run.fingerprint, make, resume=settings.resume)
        reached = f"test accuracy {rows[0]['test_accuracy']:.2%}, {run.seconds:.0f} s"
        self.results.say(f"{per_class} a class, seed {seed}: {reached}")
        return rows

    def judge(self, learned: DistilledSet, per_class: int, seed: int) -> list[Row]:
        """What the learned set and the baselines are worth, to the kernel and to networks."""
        sets, same = self.named_sets(learned, per_class, seed), {"per_class": per_class, "seed": seed}
        parts = {"train": self.data.train, "test": self.data.test}
        rows = []
        for name, found in sets:
            worth = {
                f"{part}_accuracy": accuracy_of(self.loop, found, split) for part, split in parts.items()
            }
            rows.append({**same, **name, "learner": "kernel", **worth})
        for network in self.settings.networks:
            factory = make_factory(network, self.data)

            def fresh(index: int, factory: Factory = factory) -> nn.Module:
                return seeded(factory, FRESH_SEEDS + 1000 * seed + index)

            for optimizer in self.settings.optimizers:
                learner = network if optimizer == "adam" else f"{network} by {optimizer.upper()}"
                for name, found in sets:
                    own_labels = name["labels"] in (self.settings.labels, "one-hot")
                    if own_labels and name["draw"] == 0 and name["images"] in ("learned", *RIVALS):
                        worth = self.network_row(found, fresh, parts, optimizer)
                        rows.append({**same, **name, "learner": learner, **worth})
        return rows

    def named_sets(self, learned: DistilledSet, per_class: int, seed: int) -> list[tuple[Row, DistilledSet]]:
        """The learned set and the baselines, each with its labels and with those solved for all images."""
        sets = [({"images": "learned", "labels": self.settings.labels, "draw": 0}, learned)]
        for images, kind in BASELINES.items():
            for draw in range(self.settings.draws if kind == "real" else 1):
                generator = torch.Generator().manual_seed(1000 * seed + draw)
                made = first_set(kind, per_class, self.data, generator, labels="centered")
                sets.append(({"images": images, "labels": "one-hot", "draw": draw}, made))
        return sets + [
            ({**name, "labels": "solved"}, with_solved_labels(self.loop, found, self.data.train))
            for name, found in sets
            if name["labels"] != "solved"
        ]

    def network_row(
        self,
        distilled: DistilledSet,
        fresh: Callable[[int], nn.Module],
        parts: Mapping[str, Split],
        optimizer: str,
    ) -> Row:
        """Accuracy of networks trained on a set with the best learning rate of the grid.

        The rate is chosen on a part of the training images, which all but the learned set, a rival made from
        all of them, have seen as well.
        """
        settings, held = self.settings, self.data.held_out()[1]
        size = (settings.training_batch, settings.training_steps)
        rule, rates = settings.training_rule(optimizer)
        lesson = random_lesson(*distilled.dataset().tensors, *size, rule, seed=0)
        grid = {"rates": rates, "networks": 1, "loss": squared_error}
        rate = best_rate([lesson], fresh, held.images, held.targets, **grid)
        lesson = lesson.scaled(rate)
        models = [teach(fresh(index), lesson, loss=squared_error) for index in range(settings.evaluations)]
        row: Row = {"rate": rate, "networks": len(models)}
        for part, split in parts.items():
            found = [judged(model, split.images, split.targets)["accuracy"] for model in models]
            row[f"{part}_accuracy"] = fmean(found)
        return row

    def report(self, rows: Sequence[Row]) -> None:
        """Tables and figures over all sets."""
        settings, name, summary = self.settings, self.data.name, summary_rows(rows)
        self.results.csv("sets", rows)
        self.results.csv("summary", summary)
        content = {"settings": settings.fingerprint(), "full": self.full, "summary": summary}
        self.results.json("summary", content)
        title = f"{settings.kernel} kernel, {name}"
        learning = partial(learning_figure, self.histories, PANELS, f"{title}, on batches of real images")
        self.results.figures(
            {"accuracy": partial(accuracy_figure, summary, self.full, title), "learning": learning}
        )
        for learner in dict.fromkeys(row["learner"] for row in summary):
            title = f"Test accuracy of {learner} trained on a few images of {name}, %"
            self.results.console.print(summary_table(summary, learner, title))
        self.results.tell(", and the sets")


def full_accuracy(settings: KernelSettings, data: ImageData) -> float | None:
    """Test accuracy of the regression on all training images; ``None`` where they are too many."""
    count, cost = len(data.train), 0
    if settings.kernel.startswith("conv-"):
        pixels = math.prod(data.shape[1:])
        cost = count**2 * (pixels**2 if settings.sees_all_pairs_of_pixels else pixels)
    if count > LARGEST or cost > LARGEST_COST:
        return None
    whole = DistilledSet(data.train.images, centered_one_hot(data.train.targets, data.num_classes))
    return accuracy_of(make_loop(settings, data), whole, data.test)


def squared_error(model: Callable[..., Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """The mean over a batch of the squared distance to the labels."""
    return (model(inputs) - labels).square().sum(-1).mean()


def summary_rows(rows: Sequence[Row]) -> list[Row]:
    """One row for each learner, kind of set and number of images: mean and deviation over seeds and draws."""
    names = ("learner", "per_class", "images", "labels")
    summary = []
    for key, same in grouped(rows, *names).items():
        entry: Row = {**dict(zip(names, key, strict=True)), "sets": len(same)}
        entry |= mean_and_deviation(same, ("train_accuracy", "test_accuracy"))
        summary.append(entry | {"rates": rates_of(same)})
    return summary


def summary_table(summary: Sequence[Row], learner: str, title: str) -> Table:
    """Test accuracy of one learner in per cent: a row for each kind of set, a column for each size."""
    mine = [row for row in summary if row["learner"] == learner]
    sizes = sorted({row["per_class"] for row in mine})
    table = make_table(title, ("images", "labels"), (f"{size} a class" for size in sizes))
    for kind, same in grouped(mine, "images", "labels").items():
        found = {row["per_class"]: (row["test_accuracy"], row["test_accuracy_std"]) for row in same}
        table.add_row(*kind, *(percent(*found[size]) if size in found else "–" for size in sizes))
    return table


def accuracy_figure(summary: Sequence[Row], full: float | None, title: str) -> Figure:
    """Test accuracy by images of a class, a panel for each learner."""
    learners = grouped(summary, "learner")
    figure = new_figure(2.2 + 3.6 * len(learners), 4, title)
    panels = figure.subplots(1, len(learners), sharey=True, squeeze=False)[0]
    for axes, ((learner,), mine) in zip(panels, learners.items(), strict=True):
        for (images, labels), same in grouped(mine, "images", "labels").items():
            same.sort(key=lambda row: row["per_class"])
            sizes, means = ([row[name] for row in same] for name in ("per_class", "test_accuracy"))
            deviations = [row["test_accuracy_std"] or 0.0 for row in same]
            style = {"color": COLORS[images], "linestyle": "--" if labels == "solved" else "-", "marker": "o"}
            label = f"{images}, labels {labels}"
            axes.errorbar(sizes, means, yerr=deviations, markersize=4, label=label, **style)
        if learner == "kernel" and full is not None:
            axes.axhline(full, color="#999999", linestyle=":", label="all training images")
        sizes = sorted({row["per_class"] for row in mine})
        axes.set(title=f"trained: {learner}", xlabel="images of a class", xscale="log")
        axes.set_xticks(sizes, labels=[str(size) for size in sizes])
        axes.minorticks_off()
        in_percent(axes)
    panels[0].set_ylabel("test accuracy")
    legend_beside(figure, panels[0])
    return figure
