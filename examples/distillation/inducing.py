"""Kernel inducing points: a set learned by the loss of regression on it, arXiv 2011.00050."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distillation.common import OuterRun, first_set
from distillation.kernel_settings import KernelSettings
from distillation.view import Change, View
from etflayers import distill
from etflayers.distill import DistilledSet, KernelRidgeInnerLoop, accuracy, centered_one_hot
from etflayers.errors import NonFiniteError
from lab.data import ImageData, Split
from lab.data.sampling import mirrored, random_shifts, shifted, turned
from lab.files import Row

WIDE: dict[str, Callable[..., distill.Kernel]] = {
    "ntk": distill.NTKKernel,
    "nngp": distill.NNGPKernel,
    "conv-ntk": distill.ConvNTKKernel,
    "conv-nngp": distill.ConvNNGPKernel,
}


def make_loop(settings: KernelSettings, data: ImageData) -> KernelRidgeInnerLoop:
    """Ridge regression with the kernel of the settings, which must be one in closed form."""
    kernel: distill.Kernel
    if settings.kernel == "rbf":
        kernel = distill.RBFKernel(settings.bandwidth * math.prod(data.shape) ** 0.5)
    elif settings.kernel == "linear":
        kernel = distill.LinearKernel(settings.bias_variance)
    else:
        options: dict[str, Any] = {"depth": settings.depth, "bias_variance": settings.bias_variance}
        if settings.kernel.startswith("conv-"):
            options |= {"pool_after": settings.pool_after, "readout": settings.readout}
        if settings.parametrization == "standard":
            width = {} if settings.kernel_width is None else {"width": settings.kernel_width}
            options |= {"parametrization": "standard", **width}
        kernel = WIDE[settings.kernel](**options)
    return KernelRidgeInnerLoop(kernel, ridge=settings.ridge)


@torch.no_grad()
def with_solved_labels(loop: KernelRidgeInnerLoop, distilled: DistilledSet, images: Split) -> DistilledSet:
    """The same images with the labels that are best for regression on ``images``."""
    targets = centered_one_hot(images.targets, distilled.num_classes)
    labels = loop.solve_labels(images.images, targets, distilled.inputs)
    return DistilledSet(distilled.inputs, labels, mean=distilled.mean, std=distilled.std)


class Inducing(OuterRun):
    """A set learned by gradients of the error of the regression on batches of the training images.

    Args:
        settings: of everything.
        per_class: images to learn of each class.
        seed: of everything random.
        data: real images as the regression sees them.
        view: how it does; by default as they are.
        loop: the regression; by default with the kernel of the settings.
        parts: what else changes.
    """

    def __init__(
        self,
        settings: KernelSettings,
        per_class: int,
        seed: int,
        data: ImageData,
        view: View | None = None,
        *,
        loop: KernelRidgeInnerLoop | None = None,
        **parts: Any,
    ) -> None:
        self.loop = make_loop(settings, data) if loop is None else loop
        self.view = View(data) if view is None else view
        # A stream for every size, so that none depends on which others are asked for.
        generator = torch.Generator().manual_seed(1000 * seed + per_class)
        distilled = first_set(settings.start, per_class, data, generator, labels="centered")
        rates = {"inputs": settings.image_rate}
        if settings.labels == "learned":
            rates["labels"] = settings.label_rate
        own = {"images of a class": per_class}
        super().__init__(settings, seed, data, distilled, generator, rates, own=own, **parts)

    def finish(self, *args: Any, **options: Any) -> None:
        super().finish(*args, **options)
        if self.settings.labels == "solved":
            self.distilled = with_solved_labels(self.loop, self.distilled, self.data.train)

    def update(self) -> Row:
        """The loss of the regression on a batch of real images, and a step of Adam."""
        inputs, classes = self.batch()
        targets = centered_one_hot(classes, self.data.num_classes)
        support, labels = self.distilled.inputs, self.distilled.labels
        if self.settings.labels == "solved":
            # At the best labels the loss does not change with them: its gradient needs none through them.
            labels = self.loop.solve_labels(inputs, targets, support.detach())
        outputs = self.loop(inputs, support, labels)
        loss = (outputs - targets).square().sum(-1).mean()
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss of step {self.step} is {loss.item()}: take a smaller --image-rate or a larger "
                "--ridge"
            )
        loss.backward()
        self.optimizer.step()
        return {"step": self.step, "loss": loss.item(), **accuracy(outputs, classes)}

    def batch(self) -> tuple[Tensor, Tensor]:
        """Real images as the regression sees them, shifted, turned and mirrored where asked."""
        inputs, classes = self.data.train.batch(self.settings.outer_batch, self.generator)
        changes = self.changes(len(inputs))
        return (self.view.changed(inputs, changes) if changes else inputs), classes

    def changes(self, count: int) -> list[Change]:
        """Random ones of as many images, in the order in which they are made."""
        settings, generator, changes = self.settings, self.generator, list[Change]()
        if settings.shift:
            shifts = random_shifts(count, settings.shift, generator)
            changes.append(partial(shifted, shifts=shifts.to(self.device)))
        if settings.rotation:
            angles = math.radians(settings.rotation) * (2 * torch.rand(count, generator=generator) - 1)
            changes.append(partial(turned, angles=angles.to(self.device)))
        if settings.flip:
            chosen = torch.rand(count, generator=generator) < 0.5
            changes.append(partial(mirrored, chosen=chosen.to(self.device)))
        return changes
