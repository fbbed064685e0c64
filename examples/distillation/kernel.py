"""Kernel inducing points: images and labels learned by the loss of regression on them, arXiv 2011.00050."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from statistics import fmean

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from distillation.common import digest, first_set, learning_figure, random_lesson, rates_of, squared_error
from distillation.inducing import Inducing, make_loop, with_solved_labels
from distillation.kernel_settings import KernelSettings
from distillation.pooled import Pooled
from distillation.view import View
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
from lab.data import ImageData, Split, load_inputs
from lab.figures import BLUE, GREY, RED, SKY, in_percent, legend_beside, new_figure
from lab.files import Row, kept
from lab.networks import Factory, make_factory, seeded
from lab.results import Results, grouped, make_table, mean_and_deviation, percent
from lab.training import threads

BASELINES = {"random images": "real", "class means": "means", "k-means centers": "kmeans"}
PANELS = {"loss": "squared error", "accuracy": "accuracy"}
RIVALS = ("random images", "k-means centers")  # that networks are trained on, too
COLORS = {"learned": RED, "random images": SKY, "class means": GREY, "k-means centers": BLUE}
FRESH_SEEDS = 3 * 10**6  # of networks: far from those of the sets
LARGEST = 6000  # images whose kernel matrix is made as a whole
LARGEST_COST = 2 * 10**8  # numbers of a convolutional kernel on the way to that matrix: a few minutes


def learn_kernel_set(settings: KernelSettings, console: Console) -> list[Row]:
    """Learn a set for each size and seed, compare it with baselines; write sets, tables and figures."""
    with threads(settings.threads):
        study = Study(settings, console)
        sets = [study.one_set(size, seed) for size in settings.per_class for seed in settings.seeds]
    rows = list(chain(*sets))
    study.report(rows)
    return rows


class Study:
    """What all sets share: settings, real images, and the one kernel that judges them, if there is one."""

    def __init__(self, settings: KernelSettings, console: Console) -> None:
        self.settings, self.results = settings, Results(settings.folder, console)
        plain = load_inputs(settings)
        self.view = View(plain, settings.zca)
        self.data = data = self.view.data
        self.view.save(settings.folder / "whitening.safetensors")
        self.histories: dict[str, list[list[Row]]] = {}
        self.closed_form = ClosedForm(settings, data) if settings.closed_form else None
        self.full = None if self.closed_form is None else self.closed_form.full
        worth = "" if self.closed_form is None else f"; {self.closed_form.worth}"
        self.results.say(
            f"{settings.kernel} on {data.name}: {len(data.train)} images to learn from, {len(data.test)} to "
            f"test on{worth}"
        )

    def one_set(self, per_class: int, seed: int) -> list[Row]:
        """Learn a set, write it with its picture, and judge it."""
        settings, name = self.settings, f"{per_class}-a-class-seed{seed}"
        learning = Inducing if settings.closed_form else Pooled
        run = learning(settings, per_class, seed, self.data, self.view)
        run.learn_and_write(name, self.results)
        write_png(settings.folder / f"{name}.png", self.view.shown(run.distilled))
        self.histories.setdefault(f"{per_class} a class", []).append(run.history)
        judged = ("draws", "networks", "evaluations", "training_steps", "training_batch", "rate_grid")
        judged += ("optimizers", "sgd_rates", "l2")
        path = settings.checkpoint(f"{name}-rows-{digest(settings.values(*judged))}")
        make = partial(self.judge, run.distilled, per_class, seed)
        rows: list[Row] = kept(path, run.fingerprint, make, resume=settings.resume)
        reached = f"test accuracy of {rows[0]['learner']} {rows[0]['test_accuracy']:.2%}, {run.seconds:.0f} s"
        self.results.say(f"{per_class} a class, seed {seed}: {reached}")
        return rows

    def judge(self, learned: DistilledSet, per_class: int, seed: int) -> list[Row]:
        """What the learned set and the baselines are worth, to the kernel, if it is one, and to networks."""
        sets, same = self.named_sets(learned, per_class, seed), {"per_class": per_class, "seed": seed}
        parts = {"train": self.data.train, "test": self.data.test}
        rows: list[Row] = []
        if self.closed_form is not None:
            for name, found in sets:
                rows.append({**same, **name, "learner": "kernel", **self.closed_form.row(found)})
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
        """The learned set and the baselines, each with its labels and with those solved, if they can be."""
        sets = [({"images": "learned", "labels": self.settings.labels, "draw": 0}, learned)]
        for images, kind in BASELINES.items():
            for draw in range(self.settings.draws if kind == "real" else 1):
                generator = torch.Generator().manual_seed(1000 * seed + draw)
                made = first_set(kind, per_class, self.data, generator, labels="centered")
                sets.append(({"images": images, "labels": "one-hot", "draw": draw}, made))
        if self.closed_form is None:
            return sets
        return sets + [
            ({**name, "labels": "solved"}, self.closed_form.solved(found))
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


class ClosedForm:
    """What regression with one kernel makes of any set: its accuracy, and the best labels.

    Attributes:
        full: test accuracy with all training images; ``None`` where they are too many.
    """

    def __init__(self, settings: KernelSettings, data: ImageData) -> None:
        self.loop, self.data = make_loop(settings, data), data
        same, path = settings.fingerprint() | data.fingerprint, settings.checkpoint("all-images")
        self.full: float | None = kept(
            path, same, lambda: full_accuracy(settings, data), resume=settings.resume
        )

    @property
    def worth(self) -> str:
        """What all training images are worth, in words."""
        worth = "too many for" if self.full is None else f"test accuracy {self.full:.2%} of"
        return f"{worth} the kernel of all of them"

    def row(self, distilled: DistilledSet) -> Row:
        """Accuracy of the regression on a set, on training and on test images."""
        parts = {"train": self.data.train, "test": self.data.test}
        return {f"{name}_accuracy": accuracy_of(self.loop, distilled, part) for name, part in parts.items()}

    def solved(self, distilled: DistilledSet) -> DistilledSet:
        """The set with the labels that are best on all training images."""
        return with_solved_labels(self.loop, distilled, self.data.train)


def accuracy_of(loop: KernelRidgeInnerLoop, distilled: DistilledSet, split: Split) -> float:
    """Of the regression on a set."""
    return accuracy(loop.predict(split.images, distilled.inputs, distilled.labels), split.targets)["accuracy"]


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
