"""Where networks start: while the images are learned, and fresh ones to judge the finished images by."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from comparison import checkpoints
from distillation.data import Images, RealData
from distillation.images.settings import ImagesSettings
from distillation.networks import Factory, make_factory, seeded
from etflayers.distill import (
    FixedInitialization,
    InitialState,
    OnlinePool,
    RandomInitialization,
    StoredPool,
)

PRETRAINING_BATCH, PRETRAINING_RATE = 64, 1e-3
# Far from the seeds of the runs, and from each other: no network of one kind is ever one of another.
POOL_SEEDS, FRESH_SEEDS = 10**6, 2 * 10**6

Source = Callable[[torch.Generator], InitialState]


@dataclass(frozen=True)
class Starts:
    """The source of initial states for learning, and ``fresh(i)``, the i-th network to judge by.

    Attributes:
        source: see ``etflayers.distill``.
        fresh: a new network each time it is called, in training mode: not seen while learning, but for
            ``--initialization fixed``, where it is the one network that the images are for.
        single: whether there is but one.
    """

    source: Source | OnlinePool
    fresh: Callable[[int], nn.Module]
    single: bool = False


def make_starts(settings: ImagesSettings, data: RealData, source_data: RealData, seed: int) -> Starts:
    """The networks of ``settings.initialization``; pretrained ones are kept beside the checkpoints.

    Raises:
        InvalidArgumentError: a network that does not fit the data.
    """
    factory = main_factory(settings, data)

    def unseen(index: int) -> nn.Module:
        return seeded(factory, FRESH_SEEDS + 1000 * seed + index)

    if settings.initialization == "fixed":
        return Starts(
            FixedInitialization(seeded(factory, seed)), lambda index: seeded(factory, seed), single=True
        )
    if settings.initialization == "random":
        return Starts(RandomInitialization(factory), unseen)
    if settings.initialization == "pool":
        known = [
            InitialState.of(seeded(factory, POOL_SEEDS + 1000 * seed + index))
            for index in range(settings.pool)
        ]
        return Starts(StoredPool(known), unseen)
    if settings.initialization == "online":
        generator = torch.Generator().manual_seed(POOL_SEEDS + seed)
        max_age = settings.max_age * settings.inner_steps
        return Starts(OnlinePool(factory, size=settings.pool, max_age=max_age, generator=generator), unseen)

    @cache
    def trained(first: int, index: int) -> nn.Module:
        number = first + 1000 * seed + index
        path = settings.folder / "checkpoints" / f"pretrained-{number}.pt"
        return _pretrained(factory, number, settings, source_data.train, path)

    known = [InitialState.of(trained(POOL_SEEDS, index)) for index in range(settings.pool)]
    return Starts(StoredPool(known), lambda index: deepcopy(trained(FRESH_SEEDS, index)))


def main_factory(settings: ImagesSettings, data: RealData) -> Factory:
    """Of the network that the images are learned for."""
    return make_factory(settings.network, data, head=settings.head, width=settings.width, norm=settings.norm)


def _pretrained(
    factory: Factory, seed: int, settings: ImagesSettings, images: Images, path: Path
) -> nn.Module:
    """A network trained on real images, read from its file if that belongs to these settings."""
    network = seeded(factory, seed)
    used = ("network", "width", "norm", "head", "source", "data", "classes", "image_size", "source_epochs")
    fingerprint = {name: value for name, value in settings.fingerprint().items() if name in used}
    fingerprint["seed"] = seed
    if settings.resume and path.exists():
        network.load_state_dict(checkpoints.load(path, fingerprint, images.inputs.device)["network"])
        return network
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), PRETRAINING_RATE)
    for _ in range(settings.source_epochs):
        order = torch.randperm(len(images), generator=generator).to(images.targets.device)
        for chosen in order.split(PRETRAINING_BATCH):
            optimizer.zero_grad()
            targets = images.targets[chosen]
            F.cross_entropy(network(images.inputs[chosen], targets), targets).backward()
            optimizer.step()
    checkpoints.save(path, {"fingerprint": fingerprint, "network": network.state_dict()})
    return network
