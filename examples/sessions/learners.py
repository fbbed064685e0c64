"""The later sessions: what each method does with a few images of new classes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from etflayers import CodeHead, UnitRowHead
from etflayers.functional import directions
from etflayers.metrics import (
    class_distance_normalized_variance,
    class_statistics,
    etf_distance,
    session_measures,
)
from etflayers.nn import FeatureMemory, TransitHead, expand_classes
from lab.data import Split
from lab.files import Row
from sessions.base import EVALUATION_BATCH, WIDTHS, BaseName, Network, objective
from sessions.protocol import Episode, IncrementalSettings, Method, distorted

# Neural collapse of the images that are tested, at the input of the head: how much images of one class differ
# against how far classes are apart, and how far the class means are from an ETF.
COLLAPSE = ("nc1_cdnv", "nc2_etf_distance")

# After which base session each method goes on, where it has not the name of it.
BASES: dict[Method, BaseName] = {
    "fine-tuned": "linear",
    "class-mean": "linear",
    "cosine-class-mean": "cosine",
    "projector-class-mean": "projector-linear",
    "etf-class-mean": "etf",
    "etf-ce-class-mean": "etf-ce",
    "etf-transit": "etf",
    "etf-grown": "etf-few",
}


class Budget(NamedTuple):
    """How a method is trained in each of the later sessions."""

    lr: float
    steps: int


class Learner:
    """Goes on training what comes behind the frozen body, with the means of the classes that were seen.

    Attributes:
        memory: class means of what the body makes.
    """

    sees = "features"

    def __init__(self, model: Network, base: BaseName, settings: IncrementalSettings, budget: Budget) -> None:
        self.model = copy.deepcopy(model).eval()
        self.base, self.budget = base, budget
        self.memory = FeatureMemory(self.width, settings.classes).to(next(model.parameters()).device)

    @property
    def width(self) -> int:
        return WIDTHS[-1]

    def remember(self, split: Split) -> None:
        self.memory.update(split.images, split.targets)

    def learn(self, shots: Split, seen: int) -> None:
        """Learn new classes, after which there are ``seen``."""
        new = shots.targets.unique()
        self.arrive(new, shots, seen)
        old, labels = self.memory.means_of()
        inputs, targets = torch.cat((shots.images, old)), torch.cat((shots.targets, labels))
        self.train([*self.model.neck.parameters(), *self.model.head.parameters()], inputs, targets, seen)
        self.remember(shots)

    def arrive(self, new: Tensor, shots: Split, seen: int) -> None:
        """Tell the head who comes."""
        if isinstance(self.model.head, CodeHead):
            self.model.head.activate(new)

    def train(self, parameters: Iterable[nn.Parameter], inputs: Tensor, targets: Tensor, seen: int) -> None:
        """Adam with a cosine, all samples in each step."""
        optimizer = torch.optim.Adam(parameters)
        for step in range(self.budget.steps):
            self.proceed((step + 1) / self.budget.steps)
            for group in optimizer.param_groups:
                group["lr"] = self.budget.lr * (1 + math.cos(math.pi * step / self.budget.steps)) / 2
            loss = objective(self.base, self.logits(inputs), targets, seen)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def proceed(self, share: float) -> None:
        """What happens before a step, when this share of the session will be over."""

    def inputs(self, features: Tensor) -> Tensor:
        """What the head gets."""
        return self.model.neck(features)

    def logits(self, features: Tensor) -> Tensor:
        return self.model.head(self.inputs(features))


class FineTuned(Learner):
    """Trains the whole network with the new images alone, statistics of batch normalization excepted."""

    sees = "images"

    def remember(self, split: Split) -> None:
        pass

    def learn(self, shots: Split, seen: int) -> None:
        self.train(self.model.parameters(), shots.images, shots.targets, seen)

    def inputs(self, images: Tensor) -> Tensor:
        return self.model.neck(self.model.body(images))


class Imprinted(Learner):
    """New rows start at the directions of their means (Qi, Brown, Lowe 2018, arXiv 1712.07136)."""

    @torch.no_grad()
    def arrive(self, new: Tensor, shots: Split, seen: int) -> None:
        super().arrive(new, shots, seen)
        assert isinstance(self.model.head, UnitRowHead)
        means = class_means(directions(self.model.neck(shots.images)), shots.targets, new)
        self.model.head.prototypes[new] = directions(means)


class Transit(Learner):
    """Targets of new classes travel from their means to their vertices (arXiv 2308.01746)."""

    def __init__(self, model: Network, base: BaseName, settings: IncrementalSettings, budget: Budget) -> None:
        super().__init__(model, base, settings, budget)
        head = TransitHead(model.head.frame, normalize=True)
        self.model.head = head.deactivate(range(settings.base_classes, settings.classes))

    @torch.no_grad()
    def arrive(self, new: Tensor, shots: Split, seen: int) -> None:
        super().arrive(new, shots, seen)
        means = class_means(directions(self.model.neck(shots.images)), shots.targets, new)
        self.model.head.depart(new, means)

    def proceed(self, share: float) -> None:
        self.model.head.transit(share)


class Grown(Learner):
    """Nothing was reserved: the frame moves as little as it can to make room."""

    def arrive(self, new: Tensor, shots: Split, seen: int) -> None:
        self.model.head, _ = expand_classes(self.model.head, seen)


class NearestMean(Learner):
    """Trains nothing: the class is that of the nearest mean, by angle, before the head."""

    @property
    def width(self) -> int:
        return self.model.head.in_features

    @torch.no_grad()
    def remember(self, split: Split) -> None:
        self.memory.update(self.inputs(split.images), split.targets)

    def learn(self, shots: Split, seen: int) -> None:
        self.remember(shots)

    def inputs(self, features: Tensor) -> Tensor:
        return directions(super().inputs(features))

    def logits(self, features: Tensor) -> Tensor:
        return self.inputs(features) @ directions(self.memory.means).mT


class Joint(Learner):
    """Was trained on all classes at once."""

    def remember(self, split: Split) -> None:
        pass

    def learn(self, shots: Split, seen: int) -> None:
        pass


KINDS: dict[Method, type[Learner]] = {
    "fine-tuned": FineTuned,
    "cosine": Imprinted,
    "class-mean": NearestMean,
    "cosine-class-mean": NearestMean,
    "projector-class-mean": NearestMean,
    "etf-class-mean": NearestMean,
    "etf-ce-class-mean": NearestMean,
    "etf-transit": Transit,
    "etf-grown": Grown,
    "joint": Joint,
}


def class_means(features: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    return torch.stack([features[targets == label].mean(0) for label in classes])


class Sight(NamedTuple):
    """What the learners of a network see of the data: images, or what its body makes of them."""

    base: Split
    shots: Split
    validation: Split
    test: Split


@torch.no_grad()
def sights(model: Network, episode: Episode, settings: IncrementalSettings) -> dict[str, Sight]:
    """By what a learner asks for."""
    model.eval()
    base = episode.train.where(episode.train.targets < settings.base_classes)
    images = base.images.repeat_interleave(settings.copies, 0)
    inputs = distorted(images, settings, episode.data, torch.Generator().manual_seed(2))
    base = Split(inputs, base.targets.repeat_interleave(settings.copies))
    raw = Sight(base, episode.shots, episode.validation, episode.test)

    def seen(split: Split) -> Split:
        parts = [model.body(part) for part in split.images.split(EVALUATION_BATCH)]
        return Split(torch.cat(parts), split.targets)

    return {"images": raw, "features": Sight(*map(seen, raw))}


def rows_of(method: Method, model: Network, episode: Episode, settings: IncrementalSettings) -> list[Row]:
    """Choose the budget by the validation set, and test every session with it."""
    kind, base = KINDS.get(method, Learner), BASES.get(method, method)
    sight = sights(model, episode, settings)[kind.sees]
    trained = not issubclass(kind, (NearestMean, Joint))
    grid = product(settings.session_lr, settings.session_steps) if trained else [(0.0, 0)]
    budgets = [Budget(*pair) for pair in grid]

    def measured(budget: Budget, held: Split, **options: bool) -> list[Row]:
        return sessions(kind(model, base, settings, budget), sight, held, settings, **options)

    chosen = [measured(budget, sight.validation) for budget in budgets]
    best = max(range(len(budgets)), key=lambda number: chosen[number][-1]["accuracy_average"])
    rows = measured(budgets[best], sight.test, collapse=True)
    for row, checked in zip(rows, chosen[best], strict=True):
        row |= {f"validation_{name}": checked[name] for name in ("accuracy", "accuracy_average")}
        row |= budgets[best]._asdict()
    return rows


def sessions(
    learner: Learner, sight: Sight, held: Split, settings: IncrementalSettings, *, collapse: bool = False
) -> list[Row]:
    """Learn session after session, and be tested on all classes seen so far: one row after each."""
    learner.remember(sight.base)
    counts: list[tuple[Tensor, Tensor]] = []
    rows: list[Row] = []
    for session, seen in enumerate(settings.seen):
        if session:
            new = (sight.shots.targets >= settings.seen[session - 1]) & (sight.shots.targets < seen)
            learner.learn(sight.shots.where(new), seen)
        counts.append(hits(learner, held, seen, settings.base_classes))
        correct, total = (torch.stack(part) for part in zip(*counts, strict=True))
        measures = session_measures(correct, total)
        if collapse:
            measures |= collapse_of(learner, held, seen)
        rows.append({"session": session, "classes": seen} | {k: float(v) for k, v in measures.items()})
    return rows


@torch.no_grad()
def hits(learner: Learner, held: Split, seen: int, base_classes: int) -> tuple[Tensor, Tensor]:
    """Right answers and images, ``(2,)`` each: of the base classes and of the later ones seen so far."""
    here = held.where(held.targets < seen)
    logits = torch.cat([learner.logits(part)[:, :seen] for part in here.images.split(EVALUATION_BATCH)])
    right, later = logits.argmax(-1) == here.targets, (here.targets >= base_classes).long()
    return torch.bincount(later[right], minlength=2), torch.bincount(later, minlength=2)


@torch.no_grad()
def collapse_of(learner: Learner, held: Split, seen: int) -> dict[str, Tensor]:
    """Neural collapse of what is tested, of the classes seen so far."""
    here = held.where(held.targets < seen)
    inputs = torch.cat([learner.inputs(part) for part in here.images.split(EVALUATION_BATCH)])
    statistics = class_statistics(inputs, here.targets, seen, scatter="none")
    values = class_distance_normalized_variance(statistics), etf_distance(statistics.centered_means())
    return dict(zip(COLLAPSE, values, strict=True))
