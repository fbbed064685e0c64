"""A set learned by regression on the features of networks that train on it meanwhile, arXiv 2206.00719."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from distillation.common import squared_error
from distillation.inducing import Inducing
from distillation.kernel_settings import KernelSettings
from distillation.view import View
from etflayers.distill import (
    FeatureKernel,
    InitialState,
    KernelRidgeInnerLoop,
    Lesson,
    LinearKernel,
    OnlinePool,
    teach,
)
from etflayers.errors import NonFiniteError
from lab.data import ImageData
from lab.files import Row
from lab.networks import Factory, make_factory, seeded

POOL_SEEDS = 4 * 10**6  # of the first networks: far from those of the sets, and of the networks that judge


class TrainedFeatures:
    """The features of one network of an online pool after another, each with an Adam of its own.

    Args:
        factory: makes a network with a ``body``, which has no dropout.
        size: networks in the pool.
        max_age: steps of training after which one is replaced.
        rate: Adam's.
        generator: of the seeds of the first networks.
    """

    def __init__(
        self, factory: Factory, *, size: int, max_age: int, rate: float, generator: torch.Generator
    ) -> None:
        self.pool = OnlinePool(factory, size=size, max_age=max_age, generator=generator)
        self.rate = rate
        self.averages: list[dict[str, Any]] = [{} for _ in range(size)]  # of Adam; none before its first step
        # Two networks of one kind: a gradient that goes to the images must find no parameter on its way, and
        # the one that trains has to have them.
        self.drawn, self.trainee = (seeded(factory, 0) for _ in range(2))
        self.drawn.requires_grad_(False).eval()

    @property
    def body(self) -> nn.Module:
        """Makes the features of the network that was drawn last; the module stays the same."""
        return self.drawn.get_submodule("body")

    def draw(self, generator: torch.Generator) -> int:
        """Take a network out of the pool, and return how many steps it has trained."""
        state = self.pool(generator)
        self.drawn.load_state_dict({**state.params, **state.buffers})
        return self.pool.ages[self._place]

    def train(self, inputs: Tensor, labels: Tensor, steps: int) -> None:
        """Train it for some steps on a set as it is now, all at once, and put it back.

        Raises:
            NonFiniteError: its parameters are no longer finite.
        """
        place = self._place
        # At age 0 the pool has made a new network in this place, or never trained the one that is there.
        averages = self.averages[place] if self.pool.ages[place] else {}
        made: list[torch.optim.Adam] = []

        def continued(parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
            adam = torch.optim.Adam(parameters, self.rate)
            if averages:
                adam.load_state_dict(averages)
            made.append(adam)
            return adam

        self.trainee.load_state_dict(self.drawn.state_dict())
        whole = torch.arange(len(inputs), device=inputs.device)[None]
        rates = torch.full((steps,), self.rate, dtype=torch.float64)
        teach(
            self.trainee,
            Lesson(inputs.detach(), labels.detach(), whole, rates, continued),
            loss=squared_error,
        )
        if not all(bool(value.isfinite().all()) for value in self.trainee.parameters()):
            raise NonFiniteError("a network of the pool diverged: take a smaller --feature-rate")
        self.averages[place] = made[0].state_dict()
        self.pool.put_back(InitialState.of(self.trainee), steps=steps)

    @property
    def _place(self) -> int:
        """Of the network that is out, in the pool."""
        assert self.pool.drawn is not None
        return self.pool.drawn

    def state_dict(self) -> dict[str, Any]:
        """The pool and the averages: all that is left between two steps."""
        return {"pool": self.pool.state_dict(), "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned."""
        self.pool.load_state_dict(state["pool"])
        self.averages = list(state["averages"])


class Pooled(Inducing):
    """Neural feature regression with pooling: the kernel of a step is that of a network of an online pool.

    The features phi of the network that is drawn are held fixed while the loss of ridge regression with
    K(x, y) = <phi(x), phi(y)> on a batch of real images gives its gradients to images and labels. Then that
    network trains on them, until it is drawn again. The pool has networks of all ages, so that images are
    learned for the whole of training, and no step of a training is differentiated.

    Reference:
        Zhou, Nezhadarya, Ba (2022), arXiv 2206.00719.
    """

    def __init__(
        self, settings: KernelSettings, per_class: int, seed: int, data: ImageData, view: View | None = None
    ) -> None:
        self.networks = TrainedFeatures(
            make_factory(settings.feature_network, data, width=settings.feature_width),
            size=settings.feature_pool,
            max_age=settings.feature_max_age,
            rate=settings.feature_rate,
            generator=torch.Generator().manual_seed(POOL_SEEDS + 1000 * seed + per_class),
        )
        kernel = FeatureKernel(self.networks.body, LinearKernel(settings.bias_variance))
        loop = KernelRidgeInnerLoop(kernel, ridge=settings.ridge)
        super().__init__(settings, per_class, seed, data, view, loop=loop, networks=self.networks)

    def update(self) -> Row:
        """A step on images and labels for the network that is drawn, and its training on them."""
        age = self.networks.draw(self.generator)
        row = super().update()
        self.networks.train(self.distilled.inputs, self.distilled.labels, self.settings.feature_steps)
        return {**row, "age": age}
