"""Ordinary training of networks on few images, what they then make of real ones, and baselines.

The learning rate of a baseline is the best of a grid on a part of the *training* images, which the sets tried
there do not see; the test images are looked at once, by sets made of all training images, with that rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillation.common import REPRESENTATIVES
from etflayers.distill import DistilledSet, per_class
from lab.data import ImageData, Split

EVALUATION_BATCH = 500
CURVE_NETWORKS, CURVE_POINTS = 5, 15
MOMENTUM = 0.9
CHOOSING_NETWORKS = 3
# Of plain descent; the other rules take these times a factor.
RATE_GRID = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
GRID_FACTOR = {"sgd": 1.0, "momentum": 0.2, "adam": 0.02}

Fresh = Callable[[int], nn.Module]  # makes the i-th network
Measures = dict[str, float]
Judge = Callable[[Tensor, Tensor], Measures]  # of logits and targets; the first measure is the headline


def inner_loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, of a model that is given the labels too: the nearest-ETF head learns from them."""
    return F.cross_entropy(model(images, labels), labels)


@dataclass(frozen=True)
class Lesson:
    """A training: batches ``(S, B, ...)``, their labels, a rate for each of the T steps, and the rule."""

    inputs: Tensor
    labels: Tensor
    rates: Tensor
    optimizer: str

    @classmethod
    def of(cls, distilled: DistilledSet, steps: int, optimizer: str) -> Lesson:
        """The training that a set was learned for, in so many batches."""
        inputs, labels = distilled.batches(steps)
        return cls(inputs.detach(), labels.detach(), distilled.rates.detach(), optimizer)

    @property
    def steps(self) -> int:
        return len(self.rates)

    def with_rate(self, rate: float) -> Lesson:
        """The same with one rate for all steps."""
        return replace(self, rates=torch.full_like(self.rates, rate))

    def in_other_order(self, generator: torch.Generator) -> Lesson:
        """The same batches in random order, with the rates of the places they come to."""
        order = torch.randperm(len(self.inputs), generator=generator).to(self.inputs.device)
        return replace(self, inputs=self.inputs[order], labels=self.labels[order])

    def in_other_batches(self, generator: torch.Generator) -> Lesson:
        """The same images in random batches, which need not be balanced."""
        batches, size = self.inputs.shape[:2]
        order = torch.randperm(batches * size, generator=generator).to(self.inputs.device)
        inputs, labels = (value.flatten(0, 1)[order].view_as(value) for value in (self.inputs, self.labels))
        return replace(self, inputs=inputs, labels=labels)


def real_lesson(
    kind: str, count: int, steps: int, rates: int, optimizer: str, images: Split, classes: int, seed: int
) -> Lesson:
    """As many real images of each class as are learned, in as many steps, with rates still to be chosen.

    ``means``: one average image for each class, in every batch again. Hard labels in the order of a distilled
    set, so that batches of a multiple of K images are balanced.
    """
    inputs, labels = per_class(
        images.images,
        images.targets,
        count=1 if kind == "means" else count,
        num_classes=classes,
        representatives=REPRESENTATIVES[kind],
        generator=torch.Generator().manual_seed(seed),
    )
    repeats = count * classes // len(inputs)
    inputs, labels = inputs.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    shape = (steps, len(inputs) // steps)
    ones = torch.ones(rates, device=inputs.device)
    return Lesson(inputs.view(*shape, *inputs.shape[1:]), labels.view(shape), ones, optimizer)


def teach(
    network: nn.Module, lesson: Lesson, after_step: Callable[[int], None] = lambda steps: None
) -> nn.Module:
    """Train a network by PyTorch's own optimizers, ``after_step`` told the steps done, and return it."""
    network.train()
    momentum = MOMENTUM if lesson.optimizer == "momentum" else 0.0
    optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), momentum=momentum)
    if lesson.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters())
    for step, rate in enumerate(lesson.rates.tolist()):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        batch = step % len(lesson.inputs)
        inner_loss(network, lesson.inputs[batch], lesson.labels[batch]).backward()
        optimizer.step()
        after_step(step + 1)
    return network


@torch.no_grad()
def judged(network: nn.Module, images: Split, judge: Judge) -> Measures:
    """The measures of a network on real images, in eval mode."""
    training = network.training
    network.eval()
    logits = torch.cat([network(inputs) for inputs in images.images.split(EVALUATION_BATCH)])
    network.train(training)
    return judge(logits, images.targets)


def best_rate(
    lessons: Sequence[Lesson],
    fresh: Fresh,
    validation: Split,
    judge: Judge,
    grid: Sequence[float] = RATE_GRID,
) -> float:
    """The rate of the grid whose networks are best, by the headline measure, on the validation images."""
    scores = {}
    for rate in (GRID_FACTOR[lessons[0].optimizer] * rate for rate in RATE_GRID):
        found = []
        for index in range(CHOOSING_NETWORKS):
            student = teach(fresh(index), lessons[index % len(lessons)].with_rate(rate))
            found.append(next(iter(judged(student, validation, judge).values())))
        scores[rate] = -math.inf if any(map(math.isnan, found)) else fmean(found)
    return max(scores, key=lambda rate: scores[rate])


@dataclass(frozen=True)
class Outcome:
    """What networks trained in one way make of the test images.

    Attributes:
        training: what they were trained on, and how.
        network: their architecture.
        each: the measures of each network after training.
        curves: of some of them, by the number of steps: ``(steps, measures)``.
        rate: the one rate of all steps, where it was chosen.
    """

    training: str
    network: str
    each: list[Measures] = field(default_factory=list)
    curves: list[list[Any]] = field(default_factory=list)
    rate: float | None = None


def evaluate(
    training: str,
    network: str,
    lessons: Sequence[Lesson],
    fresh: Fresh,
    count: int,
    data: ImageData,
    judge: Judge,
    *,
    rate: float | None = None,
    curves: bool = False,
) -> Outcome:
    """Train ``count`` networks, the i-th on lesson i (these are gone through in turn), and judge each.

    Args:
        training: how the outcome is called.
        network: architecture of ``fresh``.
        lessons: at least one.
        fresh: ``fresh(i)`` makes the i-th network.
        count: of networks.
        data: the test images are looked at.
        judge: gives the measures.
        rate: to note, if one was chosen for all steps.
        curves: whether to judge some of the networks on the way, too.
    """
    outcome = Outcome(training, network, rate=rate)
    for index in range(count):
        student, lesson = fresh(index), lessons[index % len(lessons)]
        spacing = max(1, math.ceil(lesson.steps / CURVE_POINTS))
        curve: list[Any] = []

        def watch(steps: int, student: nn.Module = student, curve: list[Any] = curve) -> None:
            curve.append((steps, judged(student, data.test, judge)))

        watched = curves and index < CURVE_NETWORKS
        stops = {0, *range(spacing, lesson.steps, spacing)} if watched else set()
        if watched:
            watch(0)
        teach(student, lesson, lambda steps, stops=stops, watch=watch: steps in stops and watch(steps))
        watch(lesson.steps)
        outcome.each.append(curve[-1][1])
        if watched:
            outcome.curves.append(curve)
    return outcome
