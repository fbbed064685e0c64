"""Ordinary training of networks on few images, and what they then make of real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from distillation.data import Images, RealData
from distillation.images.distiller import MOMENTUM, inner_loss
from distillation.images.outer import Measures, OuterObjective
from distillation.images.settings import ImagesSettings
from etflayers.distill import DistilledSet

EVALUATION_BATCH = 500
CURVE_NETWORKS, CURVE_POINTS = 5, 15


@dataclass(frozen=True)
class Lesson:
    """A training: batches ``(S, B, ...)``, their labels, a rate for each of the T steps, and the rule."""

    inputs: Tensor
    labels: Tensor
    rates: Tensor
    optimizer: str

    @property
    def steps(self) -> int:
        return len(self.rates)

    def with_rate(self, rate: float) -> Lesson:
        """The same with one rate for all steps."""
        return Lesson(self.inputs, self.labels, torch.full_like(self.rates, rate), self.optimizer)

    def in_other_order(self, generator: torch.Generator) -> Lesson:
        """The same batches in random order, with the rates of the places they come to."""
        order = torch.randperm(len(self.inputs), generator=generator).to(self.inputs.device)
        return Lesson(self.inputs[order], self.labels[order], self.rates, self.optimizer)

    def in_other_batches(self, generator: torch.Generator) -> Lesson:
        """The same images in random batches, which need not be balanced."""
        batches, size = self.inputs.shape[:2]
        order = torch.randperm(batches * size, generator=generator).to(self.inputs.device)
        inputs, labels = (value.flatten(0, 1)[order].view_as(value) for value in (self.inputs, self.labels))
        return Lesson(inputs, labels, self.rates, self.optimizer)


def lesson_of(distilled: DistilledSet, settings: ImagesSettings) -> Lesson:
    """The training that the set was learned for."""
    inputs, labels = distilled.batches(settings.steps)
    return Lesson(inputs.detach(), labels.detach(), distilled.rates.detach(), settings.optimizer)


def teach(
    network: nn.Module, lesson: Lesson, after_step: Callable[[int], None] = lambda steps: None
) -> nn.Module:
    """Train a network by PyTorch's own optimizers, ``after_step`` told the steps done, and return it."""
    network.train()
    optimizer: torch.optim.Optimizer
    if lesson.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters())
    else:
        momentum = MOMENTUM if lesson.optimizer == "momentum" else 0.0
        optimizer = torch.optim.SGD(network.parameters(), momentum=momentum)
    for step, rate in enumerate(lesson.rates.tolist()):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        batch = step % len(lesson.inputs)
        inner_loss(network, lesson.inputs[batch], lesson.labels[batch]).backward()
        optimizer.step()
        after_step(step + 1)
    return network


@torch.no_grad()
def judge(network: nn.Module, images: Images, objective: OuterObjective) -> Measures:
    """The measures of the objective on real images, in eval mode."""
    training = network.training
    network.eval()
    logits = torch.cat([network(inputs) for inputs in images.inputs.split(EVALUATION_BATCH)])
    network.train(training)
    return objective.measures(logits, images.targets)


@dataclass(frozen=True)
class Outcome:
    """What networks trained in one way make of the test images.

    Attributes:
        training: what they were trained on, and how.
        network: their architecture.
        measures: of each network after training.
        curves: of some of them, by the number of steps: ``(steps, measures)``.
        rate: the one rate of all steps, where it was chosen.
    """

    training: str
    network: str
    measures: list[Measures]
    curves: list[list[tuple[int, Measures]]] = field(default_factory=list)
    rate: float | None = None

    def row(self) -> dict[str, Any]:
        """Mean, and deviation where there are several networks, of each measure."""
        row: dict[str, Any] = {
            "training": self.training,
            "network": self.network,
            "networks": len(self.measures),
            "rate": self.rate,
        }
        for name in self.measures[0]:
            values = [measures[name] for measures in self.measures]
            row[name] = fmean(values)
            row[f"{name}_std"] = stdev(values) if len(values) > 1 else None
        return row


def evaluate(
    training: str,
    network: str,
    lessons: Sequence[Lesson],
    fresh: Callable[[int], nn.Module],
    count: int,
    data: RealData,
    objective: OuterObjective,
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
        objective: gives the measures.
        rate: to note, if one was chosen for all steps.
        curves: whether to judge some of the networks on the way, too.
    """
    outcome = Outcome(training, network, [], [], rate)
    for index in range(count):
        student, lesson = fresh(index), lessons[index % len(lessons)]
        if curves and index < CURVE_NETWORKS:
            curve = [(0, judge(student, data.test, objective))]
            stops = _stops(lesson.steps)

            def watch(
                steps: int, student: nn.Module = student, stops: set[int] = stops, curve: Any = curve
            ) -> None:
                if steps in stops:
                    curve.append((steps, judge(student, data.test, objective)))

            teach(student, lesson, watch)
            outcome.curves.append(curve)
            outcome.measures.append(curve[-1][1])
        else:
            outcome.measures.append(judge(teach(student, lesson), data.test, objective))
    return outcome


def _stops(steps: int) -> set[int]:
    """At most about ``CURVE_POINTS`` of the steps, evenly, with the last."""
    spacing = max(1, math.ceil(steps / CURVE_POINTS))
    return {*range(spacing, steps + 1, spacing), steps}
