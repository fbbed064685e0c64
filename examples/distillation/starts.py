"""Where the networks start that the images train, and those that judge them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distillation.common import inner_loss
from distillation.images_settings import ImagesSettings
from etflayers import distill
from lab.data import ImageData
from lab.files import kept
from lab.networks import Factory, make_factory, own_stream, seeded

PRETRAINING_BATCH, PRETRAINING_RATE = 64, 1e-3
Fresh = Callable[[int], nn.Module]  # makes the i-th network
# Far from the seeds of the runs, and from each other: no network of one kind is ever one of another.
POOL_SEEDS, FRESH_SEEDS, VALIDATION_SEEDS = 10**6, 2 * 10**6, 3 * 10**6
VALIDATION_NETWORKS = 5  # that each look trains, where it is not one known network
MADE_WITH = ("head", "width", "norm", "dropout", "weights")  # what makes a network beside its name


def main_factory(settings: ImagesSettings, data: ImageData) -> Factory:
    """Of the network that the images are learned for."""
    return make_factory(settings.network, data, **settings.values(*MADE_WITH))


def unseen(factory: Factory, seed: int, stream: int = FRESH_SEEDS) -> Fresh:
    """Networks that no run has seen."""
    return lambda index: seeded(factory, stream + 1000 * seed + index)


class Starts(NamedTuple):
    """The source of initial states for learning, and ``fresh(i)``, the i-th network to judge by.

    That network has not been seen while learning; with ``--initialization fixed`` it is the one that
    the images are for. ``watched(i)`` is the i-th network of the looks on the way, of which there are
    ``looks``: again others, but where trained networks are needed those of the pool.
    """

    source: Callable[[torch.Generator], distill.InitialState] | distill.OnlinePool
    fresh: Fresh
    watched: Fresh
    looks: int = VALIDATION_NETWORKS


def make_starts(settings: ImagesSettings, data: ImageData, source: ImageData, seed: int) -> Starts:
    """The networks of ``settings.initialization``; pretrained ones are kept beside the checkpoints.

    Raises:
        InvalidArgumentError: a network that does not fit the data.
    """
    factory = main_factory(settings, data)
    fresh, watched = unseen(factory, seed), unseen(factory, seed, VALIDATION_SEEDS)
    if settings.initialization == "fixed":

        def known(index: int) -> nn.Module:
            return seeded(factory, seed)

        return Starts(distill.FixedInitialization(known(0)), known, known, looks=1)
    if settings.initialization == "random":
        return Starts(distill.RandomInitialization(factory), fresh, watched)
    if settings.initialization == "pool":
        networks = (seeded(factory, POOL_SEEDS + 1000 * seed + index) for index in range(settings.pool))
        states = [distill.InitialState.of(network) for network in networks]
        return Starts(distill.StoredPool(states), fresh, watched)
    if settings.initialization == "online":
        generator = torch.Generator().manual_seed(POOL_SEEDS + seed)
        max_age = settings.max_age * settings.inner_steps
        pool = distill.OnlinePool(factory, size=settings.pool, max_age=max_age, generator=generator)
        return Starts(pool, fresh, watched)

    @cache
    def trained(first: int, index: int) -> nn.Module:
        return _pretrained(factory, first + 1000 * seed + index, settings, source)

    states = [distill.InitialState.of(trained(POOL_SEEDS, index)) for index in range(settings.pool)]
    return Starts(
        distill.StoredPool(states),
        lambda index: deepcopy(trained(FRESH_SEEDS, index)),
        lambda index: deepcopy(trained(POOL_SEEDS, index)),
        looks=min(VALIDATION_NETWORKS, settings.pool),
    )


def _pretrained(factory: Factory, seed: int, settings: ImagesSettings, data: ImageData) -> nn.Module:
    """A network trained on real images, read from its file if that belongs to these settings."""
    network, images = seeded(factory, seed), data.train

    def trained() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(network.parameters(), PRETRAINING_RATE)
        with own_stream(seed):
            for _ in range(settings.source_epochs):
                order = torch.randperm(len(images), generator=generator).to(data.device)
                for chosen in order.split(PRETRAINING_BATCH):
                    optimizer.zero_grad()
                    inner_loss(network, images.images[chosen], images.targets[chosen]).backward()
                    optimizer.step()
        return network.state_dict()

    used = ("network", "width", "norm", "head", "source", "data", "classes", "image_size", "source_epochs")
    used += ("dropout", "weights")
    path = settings.checkpoint(f"pretrained-{seed}")
    own = {**settings.values(*used), **data.fingerprint, "seed": seed}
    network.load_state_dict(kept(path, own, trained, resume=settings.resume))
    return network
