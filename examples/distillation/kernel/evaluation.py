"""What a kernel regression, and finite networks, make of real images when they have seen only a small set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distillation.data import Images, RealData, split_off
from distillation.kernel.learning import predictions, representatives, with_solved_labels
from distillation.kernel.settings import KernelSettings
from distillation.networks import make_factory, seeded
from etflayers.distill import DistilledSet, KernelRidgeInnerLoop, centered_one_hot

Row = dict[str, Any]
BASELINES = {"random images": "real", "class means": "means", "k-means centers": "kmeans"}
RIVALS = ("random images", "k-means centers")  # that networks are trained on, too
VALIDATION_SHARE = 0.2
FRESH_SEEDS = 3 * 10**6  # of networks: far from those of the sets
LARGEST = 6000  # images whose kernel matrix is made as a whole


class NamedSet(NamedTuple):
    """A set, and what it is called: its images, its labels, and which draw of several it is."""

    images: str
    labels: str
    draw: int
    distilled: DistilledSet

    def row(self, seed: int, per_class: int) -> Row:
        return {
            "per_class": per_class,
            "seed": seed,
            "images": self.images,
            "labels": self.labels,
            "draw": self.draw,
        }


def accuracy(outputs: Tensor, classes: Tensor) -> float:
    """Share of the largest outputs that stand at the class."""
    return (outputs.argmax(-1) == classes).double().mean().item()


def named_sets(
    settings: KernelSettings,
    per_class: int,
    seed: int,
    data: RealData,
    loop: KernelRidgeInnerLoop,
    learned: DistilledSet,
) -> list[NamedSet]:
    """The learned set and the baselines, each with its labels and with those solved for the training set."""
    sets = [NamedSet("learned", settings.labels, 0, learned)]
    for images, kind in BASELINES.items():
        for draw in range(settings.draws if kind == "real" else 1):
            generator = torch.Generator().manual_seed(1000 * seed + draw)
            made = representatives(kind, per_class, data, data.train, generator)
            sets.append(NamedSet(images, "one-hot", draw, made))
    solved = [
        named._replace(labels="solved", distilled=with_solved_labels(loop, named.distilled, data.train))
        for named in sets
        if named.labels != "solved"
    ]
    return sets + solved


def kernel_row(named: NamedSet, loop: KernelRidgeInnerLoop, data: RealData) -> Row:
    """Accuracy of the regression on a set."""
    outputs = {
        part: predictions(loop, named.distilled, images.inputs)
        for part, images in (("train", data.train), ("test", data.test))
    }
    return {
        "learner": "kernel",
        "train_accuracy": accuracy(outputs["train"], data.train.targets),
        "test_accuracy": accuracy(outputs["test"], data.test.targets),
    }


def full_accuracy(loop: KernelRidgeInnerLoop, data: RealData) -> float | None:
    """Test accuracy of the regression on all training images; ``None`` where they are too many."""
    if len(data.train) > LARGEST:
        return None
    labels = centered_one_hot(data.train.targets, data.num_classes)
    return accuracy(
        predictions(loop, DistilledSet(data.train.inputs, labels), data.test.inputs), data.test.targets
    )


def network_rows(
    settings: KernelSettings, per_class: int, seed: int, data: RealData, sets: Sequence[NamedSet]
) -> list[Row]:
    """Networks trained on the learned set and its rivals, each set with the best learning rate of the grid.

    The rate is chosen on a part of the training images, which all but the learned set, a rival made from all
    of them, have seen as well.
    """
    rows = []
    _, validation = split_off(data.train, VALIDATION_SHARE)
    chosen = [
        named
        for named in sets
        if named.draw == 0
        and (named.images == "learned" or named.images in RIVALS)
        and named.labels in (settings.labels, "one-hot")
    ]
    for network in settings.networks:
        factory = make_factory(network, data)

        def fresh(index: int, factory: Callable[[], nn.Module] = factory) -> nn.Module:
            return seeded(factory, FRESH_SEEDS + 1000 * seed + index)

        for named in chosen:
            scores = {
                rate: _judged(train_network(fresh(0), named.distilled, rate, settings), validation)
                for rate in settings.rate_grid
            }
            rate = max(scores, key=lambda rate: scores[rate])
            trained = [
                train_network(fresh(index), named.distilled, rate, settings)
                for index in range(settings.evaluations)
            ]
            rows.append(
                {
                    **named.row(seed, per_class),
                    "learner": network,
                    "rate": rate,
                    "networks": len(trained),
                    "train_accuracy": fmean(_judged(model, data.train) for model in trained),
                    "test_accuracy": fmean(_judged(model, data.test) for model in trained),
                }
            )
    return rows


def train_network(
    network: nn.Module, distilled: DistilledSet, rate: float, settings: KernelSettings
) -> nn.Module:
    """Adam on the squared error to the labels, its rate falling to 0, in batches drawn by a fixed stream."""
    inputs, labels = (value.detach() for value in (distilled.inputs, distilled.labels))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), rate)
    network.train()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(settings.training_steps):
        optimizer.param_groups[0]["lr"] = (
            rate * 0.5 * (1 + math.cos(math.pi * step / settings.training_steps))
        )
        if len(order) < min(settings.training_batch, len(inputs)):
            order = torch.randperm(len(inputs), generator=generator)
        chosen, order = (part.to(inputs.device) for part in order.tensor_split([settings.training_batch]))
        optimizer.zero_grad()
        (network(inputs[chosen]) - labels[chosen]).square().sum(-1).mean().backward()
        optimizer.step()
    return network


@torch.no_grad()
def _judged(network: nn.Module, images: Images) -> float:
    network.eval()
    return accuracy(torch.cat([network(part) for part in images.inputs.split(500)]), images.targets)
