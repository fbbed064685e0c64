"""Sets of real images, or means of them, to be trained on as many and for as many steps.

Their learning rate is the best of a grid on a part of the *training* images, which the sets tried there do
not see; the test images are looked at once, by sets made of all training images, with the rate so chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import nn

from distillation.data import Images, RealData, split_off
from distillation.images.evaluation import Lesson, Outcome, evaluate, judge, teach
from distillation.images.outer import OuterObjective
from distillation.images.settings import ImagesSettings
from etflayers.distill import kmeans_centers, partial_means, per_class, random_samples

VALIDATION_SHARE = 0.2
CHOOSING_NETWORKS = 3
# Of plain descent; the other rules take these times a factor.
RATE_GRID = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
GRID_FACTOR = {"sgd": 1.0, "momentum": 0.2, "adam": 0.02}
KINDS = {"random real images": "real", "k-means centers": "kmeans", "average images": "means"}


def real_lesson(kind: str, images: Images, settings: ImagesSettings, num_classes: int, seed: int) -> Lesson:
    """As many images as are learned, in as many steps, with rates still to be chosen.

    ``means``: one average image for each class, in every batch again. Hard labels in the order of a distilled
    set, so that batches of a multiple of K images are balanced.
    """
    makers = {"real": random_samples, "kmeans": kmeans_centers, "means": partial_means}
    inputs, labels = per_class(
        images.inputs,
        images.targets,
        count=1 if kind == "means" else settings.per_class,
        num_classes=num_classes,
        representatives=makers[kind],
        generator=torch.Generator().manual_seed(seed),
    )
    repeats = settings.per_class * num_classes // len(inputs)
    inputs, labels = inputs.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    shape = (settings.steps, len(inputs) // settings.steps)
    return Lesson(
        inputs.view(*shape, *inputs.shape[1:]),
        labels.view(shape),
        torch.ones(settings.inner_steps, device=inputs.device),
        settings.optimizer,
    )


def rate_grid(settings: ImagesSettings) -> list[float]:
    """The rates that are tried."""
    return [GRID_FACTOR[settings.optimizer] * rate for rate in RATE_GRID]


def best_rate(
    lessons: Sequence[Lesson],
    fresh: Callable[[int], nn.Module],
    validation: Images,
    settings: ImagesSettings,
    objective: OuterObjective,
) -> float:
    """The rate of the grid whose networks are best, by the headline measure, on the validation images."""
    scores = {}
    for rate in rate_grid(settings):
        found = []
        for index in range(CHOOSING_NETWORKS):
            student = teach(fresh(index), lessons[index % len(lessons)].with_rate(rate))
            found.append(judge(student, validation, objective)[objective.headline])
        scores[rate] = -math.inf if any(map(math.isnan, found)) else fmean(found)
    return max(scores, key=lambda rate: scores[rate])


def evaluate_baselines(
    settings: ImagesSettings,
    seed: int,
    data: RealData,
    fresh: Callable[[int], nn.Module],
    count: int,
    objective: OuterObjective,
) -> list[Outcome]:
    """Networks trained on each kind of baseline, ``count`` of them, or one for each draw if that is more."""
    rest, validation = split_off(data.train, VALIDATION_SHARE)
    outcomes = []
    for name, kind in KINDS.items():
        if kind == "kmeans" and settings.per_class == 1:
            continue  # the one center of a class is its average image
        draws = settings.draws if kind == "real" else 1

        def lessons(images: Images, kind: str = kind, draws: int = draws) -> list[Lesson]:
            return [
                real_lesson(kind, images, settings, data.num_classes, 1000 * seed + draw)
                for draw in range(draws)
            ]

        rate = best_rate(lessons(rest), fresh, validation, settings, objective)
        chosen = [lesson.with_rate(rate) for lesson in lessons(data.train)]
        outcomes.append(
            evaluate(
                name,
                settings.network,
                chosen,
                fresh,
                max(count, draws),
                data,
                objective,
                rate=rate,
                curves=True,
            )
        )
    return outcomes
