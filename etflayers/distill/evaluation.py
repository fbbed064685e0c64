"""What networks trained on a learned set make of real samples, and a fair rate for what it is compared with.

A set is judged by fresh networks. One that was not learned with its rates, such as a few real samples, is
given the best rate of a grid, found on samples that nothing is reported of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from etflayers.checks import require
from etflayers.distill.lessons import Lesson, teach
from etflayers.distill.objective import InnerLoss, cross_entropy

__all__ = ["Judge", "accuracy", "accuracy_by_class", "best_lessons", "best_rate", "evaluate", "judged"]

Measures = dict[str, float]
Judge = Callable[[Tensor, Tensor], Measures]


def accuracy(outputs: Tensor, classes: Tensor) -> Measures:
    """The share of the largest outputs that stand at the class; NaN if there are none.

    Args:
        outputs: ``(n, K)``, logits or predictions.
        classes: ``(n,)``.

    Returns:
        One number by its name, as any judge does.

    >>> accuracy(torch.eye(2), torch.tensor([0, 0]))
    {'accuracy': 0.5}
    """
    return {"accuracy": (outputs.argmax(-1) == classes).double().mean().item()}


def accuracy_by_class(outputs: Tensor, classes: Tensor) -> Measures:
    """For each class k the share of its samples whose largest output is the k-th; NaN if there are none.

    Args:
        outputs: ``(n, K)``, logits or predictions.
        classes: ``(n,)``.

    Returns:
        K numbers, by the names ``"class 0"`` to ``"class K-1"``.

    >>> accuracy_by_class(torch.eye(2)[[0, 1, 1]], torch.tensor([0, 0, 1]))
    {'class 0': 0.5, 'class 1': 1.0}
    """
    right = outputs.argmax(-1) == classes
    numbers = range(outputs.shape[-1])
    return {f"class {k}": right[classes == k].double().mean().item() for k in numbers}


@torch.no_grad()
def judged(
    network: nn.Module, inputs: Tensor, targets: Tensor, judge: Judge = accuracy, *, batch_size: int = 500
) -> Measures:
    """The measures of a network on samples, in eval mode.

    Args:
        network: left in the mode it was in.
        inputs: ``(n, ...)``.
        targets: ``(n,)``.
        judge: gives numbers by name for all logits ``(n, K)`` and targets.
        batch_size: samples in a forward pass.

    Returns:
        What ``judge`` gives.

    >>> judged(nn.Identity(), torch.eye(2), torch.tensor([0, 1]))
    {'accuracy': 1.0}
    """
    training = network.training
    network.eval()
    logits = torch.cat([network(part) for part in torch.split(inputs, batch_size)])
    network.train(training)
    return judge(logits, targets)


def best_rate(
    lessons: Sequence[Lesson],
    fresh: Callable[[int], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    *,
    rates: Sequence[float],
    judge: Judge = accuracy,
    loss: InnerLoss = cross_entropy,
    networks: int = 3,
) -> float:
    """The number times the rates of the lessons whose networks are best on samples held out for that choice.

    Args:
        lessons: at least one; the i-th network takes lesson i, in turn.
        fresh: ``fresh(i)`` makes the i-th network.
        inputs: ``(n, ...)``, held out.
        targets: ``(n,)``.
        rates: the numbers to try; of equally good ones the first is taken.
        judge: its first measure, averaged over the networks, is to become large; NaN is worse than any.
        loss: as in :func:`teach`.
        networks: how many are trained for each rate.

    Returns:
        One of ``rates``.
    """
    candidates = [[lesson.scaled(rate) for lesson in lessons] for rate in rates]
    options = {"judge": judge, "loss": loss, "networks": networks}
    return rates[best_lessons(candidates, fresh, inputs, targets, **options)]  # type: ignore[arg-type]


def best_lessons(
    candidates: Sequence[Sequence[Lesson]],
    fresh: Callable[[int], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    *,
    judge: Judge = accuracy,
    loss: InnerLoss = cross_entropy,
    networks: int = 3,
) -> int:
    """Which of some trainings makes the best networks on samples held out for that choice.

    Args:
        candidates: at least one; each is lessons, of which the i-th network takes lesson i, in turn.
        fresh: ``fresh(i)`` makes the i-th network.
        inputs: ``(n, ...)``, held out.
        targets: ``(n,)``.
        judge: its first measure, averaged over the networks, is to become large; NaN is worse than any.
        loss: as in :func:`teach`.
        networks: how many are trained for each candidate.

    Returns:
        The number of the best, of equally good ones the first.

    Raises:
        InvalidArgumentError: no candidates, or one without lessons.

    >>> from etflayers.distill import DistilledSet
    >>> inputs, targets = torch.eye(2), torch.tensor([0, 1])
    >>> lesson = Lesson.of(DistilledSet(inputs, targets, rates=torch.ones(3)), 1, "sgd")
    >>> best_lessons([[lesson.scaled(-1)], [lesson]], lambda index: nn.Linear(2, 2), inputs, targets)
    1
    """
    require(
        len(candidates) > 0 and all(len(lessons) > 0 for lessons in candidates),
        "candidates must be at least one, each of at least one lesson, got "
        f"{[len(lessons) for lessons in candidates]} lessons",
    )
    scores = []
    for lessons in candidates:
        found = []
        for index in range(networks):
            network = teach(fresh(index), lessons[index % len(lessons)], loss=loss)
            found.append(next(iter(judged(network, inputs, targets, judge).values())))
        scores.append(-math.inf if any(map(math.isnan, found)) else fmean(found))
    return max(range(len(scores)), key=lambda number: scores[number])


def evaluate(
    lessons: Sequence[Lesson],
    fresh: Callable[[int], nn.Module],
    inputs: Tensor,
    targets: Tensor,
    *,
    count: int,
    judge: Judge = accuracy,
    loss: InnerLoss = cross_entropy,
    watched: int = 0,
    points: int = 15,
) -> list[list[tuple[int, Measures]]]:
    """Train ``count`` networks and judge each at the end, and the first ``watched`` of them on the way, too.

    Args:
        lessons: at least one; the i-th network takes lesson i, in turn.
        fresh: ``fresh(i)`` makes the i-th network.
        inputs: ``(n, ...)``, that nothing was learned or chosen from.
        targets: ``(n,)``.
        count: of networks.
        judge: gives the measures.
        loss: as in :func:`teach`.
        watched: how many networks are judged on the way.
        points: how often, about.

    Returns:
        For each network the steps after which it was judged, with the measures; the last is the end of
        training, and for a watched network the first is its beginning.

    >>> from etflayers.distill import DistilledSet
    >>> distilled = DistilledSet.from_noise((4,), 2, per_class=1, rates=torch.ones(6))
    >>> lesson = Lesson.of(distilled, steps=1, optimizer="sgd")
    >>> inputs, targets = torch.randn(8, 4), torch.arange(8) % 2
    >>> curves = evaluate(
    ...     [lesson], lambda index: nn.Linear(4, 2), inputs, targets, count=2, watched=1, points=3
    ... )
    >>> [[steps for steps, _ in curve] for curve in curves]
    [[0, 2, 4, 6], [6]]
    """
    curves = []
    for index in range(count):
        network, lesson = fresh(index), lessons[index % len(lessons)]
        spacing = max(1, math.ceil(lesson.steps / points))
        stops = {lesson.steps, *(range(0, lesson.steps, spacing) if index < watched else ())}
        curve: list[tuple[int, Measures]] = []

        def look(
            steps: int,
            network: nn.Module = network,
            curve: list[tuple[int, Measures]] = curve,
            stops: set[int] = stops,
        ) -> None:
            if steps in stops:
                curve.append((steps, judged(network, inputs, targets, judge)))

        look(0)
        teach(network, lesson, loss=loss, after_step=look)
        curves.append(curve)
    return curves
