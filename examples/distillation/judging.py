"""What networks trained on a finished set, and on baselines of its size, make of the test images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from distillation.common import REPRESENTATIVES, inner_loss, random_lesson
from distillation.images_settings import ImagesSettings
from distillation.objective import Objective
from distillation.starts import MADE_WITH, Fresh, Starts, main_factory, unseen
from etflayers.distill import DistilledSet, Lesson, Ranking, best_lessons, best_rate, evaluate, ranking
from lab.data import ImageData, Split
from lab.files import Row
from lab.networks import make_factory, own_stream

# Learning rates of plain descent that are tried for baselines; the other rules take these times a factor.
RATE_GRID = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
GRID_FACTOR = {"sgd": 1.0, "momentum": 0.2, "adam": 0.02}
REAL_BATCH = 64  # in a step on all real images
SET_HARD, FULL_HARD = "distilled, hard labels", "all real images, hard labels"
KINDS = {"random real images": "real", "k-means centers": "kmeans", "average images": "means"}


class Judging:
    """Outcomes of a set as it was learned, in other conditions, and of the baselines.

    An outcome is what networks of one kind, trained in one way, make of the test images: the measures of
    ``each`` after training, the ``curves`` by step of some of them, and the ``rate`` of all steps and the
    number of ``epochs``, where one was chosen. Choices are made on a part of the training images that is held
    out of them.

    Args:
        settings: of everything.
        seed: of the set.
        data: real images.
        starts: where the networks start.
        objective: what the images were learned for.
    """

    def __init__(
        self, settings: ImagesSettings, seed: int, data: ImageData, starts: Starts, objective: Objective
    ) -> None:
        self.settings, self.seed, self.data, self.starts = settings, seed, data, starts
        self.how: dict[str, Any] = {"judge": objective.judge_fully, "loss": settings.trainee_loss}
        self.rest, self.held = data.held_out()
        self.single = settings.initialization == "fixed"
        self.count = 1 if self.single else settings.evaluations
        self.outcomes: list[Row] = []

    def all(self, distilled: DistilledSet) -> list[Row]:
        """Every outcome that the settings ask for."""
        settings, many = self.settings, self.settings.evaluations
        lesson = Lesson.of(distilled, settings.steps, settings.optimizer)
        self.note("distilled", [lesson])
        self.note("distilled, on training images", [lesson], curves=False, images=self.learned_from())
        if settings.steps > 1:
            generator = torch.Generator().manual_seed(self.seed)
            orders = [lesson.in_other_order(generator) for _ in range(self.count)]
            self.note("distilled, other order", orders)
            mixtures = [lesson.in_other_batches(generator) for _ in range(self.count)]
            self.note("distilled, other batches", mixtures)
        if self.single:
            fresh = unseen(main_factory(settings, self.data), self.seed)
            self.note("distilled, fresh networks", [lesson], many, fresh)
        for epochs in settings.other_epochs:
            training = f"distilled, {epochs} epoch{'s' * (epochs > 1)}"
            self.note(training, [lesson.in_other_epochs(epochs)], curves=False)
        at_one = replace(lesson, rates=torch.ones_like(lesson.rates))
        for name, fresh in self.others():
            self.note("distilled", [lesson], many, fresh, name)
            rate = self.chosen_rate([at_one], fresh)
            self.note("distilled, rate chosen", [at_one.scaled(rate)], many, fresh, name, rate)
        if settings.baselines:
            self.baselines()
        if settings.ranking:
            self.hard_labels(lesson)
        return self.outcomes

    def learned_from(self) -> Split:
        """Of the images that the set was learned from as many as there are to test on, at random.

        What networks make of these and of the test images tells whether more of them would have helped.
        """
        images = self.rest if self.settings.validate_every else self.data.train
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        return images.where(chosen[: len(self.data.test)].to(images.targets.device))

    def hard_labels(self, lesson: Lesson) -> None:
        """What the ranking compares: the set, and all real images, both with hard labels and nothing else.

        The set at the best rate of the grid, or at its learned rates, if these are better.
        """
        settings, train, held = self.settings, self.data.train, self.held
        labels = lesson.labels.argmax(1) if lesson.labels.is_floating_point() else lesson.labels
        hard = replace(lesson, labels=labels)
        at_one = replace(hard, rates=torch.ones_like(hard.rates))
        tried = [[hard], *([at_one.scaled(rate)] for rate in self.rates)]
        how = {**self.how, "loss": inner_loss}
        with own_stream(self.seed):
            best = best_lessons(tried, self.starts.fresh, held.images, held.targets, **how)
        rate = self.rates[best - 1] if best else None
        self.note(SET_HARD, tried[best], rate=rate, curves=False, plain=True)

        def on_all(images: Split) -> Lesson:
            steps = settings.ranking_epochs * max(1, len(images) // REAL_BATCH)
            options = {"size": REAL_BATCH, "steps": steps, "optimizer": settings.optimizer}
            return random_lesson(images.images, images.targets, seed=self.seed, **options)

        rate = self.chosen_rate([on_all(self.rest)], self.starts.fresh, plain=True)
        self.note(FULL_HARD, [on_all(train).scaled(rate)], rate=rate, curves=False, plain=True)

    def others(self) -> Iterator[tuple[str, Fresh]]:
        """Networks that the images have not been learned for, by what they are called in tables."""
        made_with = self.settings.values(*MADE_WITH)
        for network in self.settings.other_networks:
            factory = make_factory(network, self.data, **made_with | {"width": None})
            yield network, unseen(factory, self.seed)
        network = self.settings.network
        for weights in self.settings.other_weights:
            factory = make_factory(network, self.data, **made_with | {"weights": weights})
            yield f"{network}, {weights} weights", unseen(factory, self.seed)

    def baselines(self) -> None:
        """Real images, as many as were learned, for as many steps, at the best rate."""
        settings = self.settings
        for training, kind in KINDS.items():
            if kind == "kmeans" and settings.per_class == 1:
                continue  # the one center of a class is its average image
            draws = settings.draws if kind == "real" else 1
            tried, chosen = (self.drawn(kind, images, draws) for images in (self.rest, self.data.train))
            rate = self.chosen_rate(tried, self.starts.fresh)
            number = max(self.count, draws)
            self.note(training, [one.scaled(rate) for one in chosen], number, rate=rate)
            if settings.baseline_epochs:
                rate, epochs = self.chosen_epochs(tried)
                best = [one.in_other_epochs(epochs).scaled(rate) for one in chosen]
                self.note(f"{training}, epochs chosen", best, number, rate=rate, curves=False, epochs=epochs)

    def drawn(self, kind: str, images: Split, draws: int) -> list[Lesson]:
        """Some baselines of one kind."""
        seeds, classes = range(1000 * self.seed, 1000 * self.seed + draws), self.data.num_classes
        return [baseline(kind, images, self.settings, classes, number) for number in seeds]

    def note(
        self,
        training: str,
        lessons: list[Lesson],
        number: int | None = None,
        fresh: Fresh | None = None,
        network: str | None = None,
        rate: float | None = None,
        *,
        curves: bool = True,
        epochs: int | None = None,
        plain: bool = False,
        images: Split | None = None,
    ) -> None:
        """Train and judge networks: by default those that the images are for, as many as are usual.

        ``plain``: without augmentation; ``images``: to judge by (default: the test images).
        """
        watched = self.settings.curves if curves and network is None else 0
        options = {"count": number or self.count, "watched": watched, **self.how}
        options |= {"loss": inner_loss} if plain else {}
        real = self.data.test if images is None else images
        with own_stream(self.seed):
            found = evaluate(lessons, fresh or self.starts.fresh, real.images, real.targets, **options)
        row = {"training": training, "network": network or self.settings.network, "rate": rate}
        row |= {"each": [curve[-1][1] for curve in found], "curves": found[:watched], "epochs": epochs}
        self.outcomes.append(row)

    def chosen_rate(self, lessons: Sequence[Lesson], fresh: Fresh, *, plain: bool = False) -> float:
        """The rate of a grid with which networks do best on the held images."""
        how = {**self.how, "loss": inner_loss} if plain else self.how
        with own_stream(self.seed):
            return best_rate(lessons, fresh, self.held.images, self.held.targets, rates=self.rates, **how)

    def chosen_epochs(self, lessons: Sequence[Lesson]) -> tuple[float, int]:
        """The rate and the number of epochs with which networks do best on the held images."""
        held, pairs = self.held, list(product(self.rates, self.settings.baseline_epochs))
        tried = [[one.in_other_epochs(epochs).scaled(rate) for one in lessons] for rate, epochs in pairs]
        with own_stream(self.seed):
            return pairs[best_lessons(tried, self.starts.fresh, held.images, held.targets, **self.how)]

    @property
    def rates(self) -> list[float]:
        """Those that are tried where one is chosen."""
        return [GRID_FACTOR[self.settings.optimizer] * rate for rate in RATE_GRID]


def ranked(outcomes: Sequence[Row], network: str) -> Ranking:
    """How a set, or those of several seeds, stand between random and all real images."""
    names = {"full_hard": FULL_HARD, "set_hard": SET_HARD}
    names |= {"set_own": "distilled", "random_own": "random real images"}
    found: dict[str, list[float]] = {side: [] for side in names}
    for side, training in names.items():
        for outcome in outcomes:
            if (outcome["training"], outcome["network"]) == (training, network):
                found[side] += [measures["accuracy"] for measures in outcome["each"]]
    return ranking(**found)


def baseline(kind: str, images: Split, settings: ImagesSettings, num_classes: int, seed: int) -> Lesson:
    """As many real images of each class, in as many steps, as are learned, with rates still to be chosen.

    ``means``: one average image for each class, in every batch again.
    """
    real = DistilledSet.from_data(
        images.images,
        images.targets,
        per_class=1 if kind == "means" else settings.per_class,
        num_classes=num_classes,
        representatives=REPRESENTATIVES[kind],
        rates=torch.ones(settings.inner_steps),
        generator=torch.Generator().manual_seed(seed),
    )
    lesson = Lesson.of(real, 1, settings.optimizer)
    numbers = lesson.batches.repeat(1, settings.per_class * num_classes // len(real.inputs))
    return replace(lesson, batches=numbers.view(settings.steps, -1))
