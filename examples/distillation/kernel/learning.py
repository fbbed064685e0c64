"""Kernel inducing points: images and labels learned by the loss of regression on them, arXiv 2011.00050."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comparison.training import shifted
from distillation.data import Images, RealData
from distillation.images.distiller import REPRESENTATIVES
from distillation.kernel.settings import KernelSettings
from distillation.outer_loop import Learned, OuterRun, Row
from etflayers.distill import (
    DistilledSet,
    Kernel,
    KernelRidgeInnerLoop,
    LinearKernel,
    NNGPKernel,
    NTKKernel,
    RBFKernel,
    centered_one_hot,
)
from etflayers.errors import NonFiniteError

PREDICTION_BATCH = 1000


def make_loop(settings: KernelSettings, data: RealData) -> KernelRidgeInnerLoop:
    """Ridge regression with the kernel of the settings."""
    kernel: Kernel
    if settings.kernel == "rbf":
        kernel = RBFKernel(settings.bandwidth * math.prod(data.shape) ** 0.5)
    elif settings.kernel == "linear":
        kernel = LinearKernel(settings.bias_variance)
    else:
        wide = NTKKernel if settings.kernel == "ntk" else NNGPKernel
        kernel = wide(depth=settings.depth, bias_variance=settings.bias_variance)
    return KernelRidgeInnerLoop(kernel, ridge=settings.ridge)


def representatives(
    kind: str, per_class: int, data: RealData, images: Images, generator: torch.Generator
) -> DistilledSet:
    """A set that is not learned: noise, real images, class means or centers, with centered one-hot labels."""
    options: dict[str, Any] = {
        "count": per_class,
        "labels": "centered",
        "num_classes": data.num_classes,
        "generator": generator,
        **data.normalization,
    }
    device = images.inputs.device
    if kind == "noise":
        return DistilledSet.from_noise(data.shape, **options).to(device)
    representatives = REPRESENTATIVES[kind]
    return DistilledSet.from_data(
        images.inputs, images.targets, representatives=representatives, **options
    ).to(device)


@torch.no_grad()
def predictions(loop: KernelRidgeInnerLoop, distilled: DistilledSet, inputs: Tensor) -> Tensor:
    """``(m, K)``, in parts that need little memory."""
    parts = inputs.split(PREDICTION_BATCH)
    return torch.cat([loop(part, distilled.inputs, distilled.labels) for part in parts])


@torch.no_grad()
def with_solved_labels(loop: KernelRidgeInnerLoop, distilled: DistilledSet, images: Images) -> DistilledSet:
    """The same images with the labels that are best for regression on ``images``."""
    targets = centered_one_hot(images.targets, distilled.num_classes)
    labels = loop.solve_labels(images.inputs, targets, distilled.inputs)
    return DistilledSet(distilled.inputs, labels, mean=distilled.mean, std=distilled.std)


def learn(
    settings: KernelSettings,
    per_class: int,
    seed: int,
    data: RealData,
    checkpoint: Path | None = None,
    progress: Callable[[int, Row], None] = lambda step, row: None,
) -> Learned:
    """Learn a set, or go on with learning it.

    Args:
        settings: of everything.
        per_class: images of each class.
        seed: of everything random.
        data: real images; only the training set is looked at.
        checkpoint: where to keep the state; with ``settings.resume`` also where to go on from.
        progress: told the steps done and the newest row of the history after each.

    Raises:
        InvalidArgumentError: arguments that do not fit, or a checkpoint of a run with other settings.
        NonFiniteError: learning has diverged.
    """
    learned = _Run(settings, per_class, seed, data).finish(
        checkpoint,
        {**settings.fingerprint(), "images of a class": per_class, "seed": seed},
        resume=settings.resume,
        every=settings.checkpoint_every,
        device=settings.torch_device,
        progress=progress,
    )
    if settings.labels == "solved":
        solved = with_solved_labels(make_loop(settings, data), learned.distilled, data.train)
        return replace(learned, distilled=solved)
    return learned


class _Run(OuterRun):
    """Gradients of the error of the regression."""

    def __init__(self, settings: KernelSettings, per_class: int, seed: int, data: RealData) -> None:
        self.settings = settings
        self.data = data
        self.loop = make_loop(settings, data)
        # A stream for every size, so that none depends on which others are asked for.
        generator = torch.Generator().manual_seed(1000 * seed + per_class)
        distilled = representatives(settings.start, per_class, data, data.train, generator)
        groups: list[dict[str, Any]] = [{"params": [distilled.inputs], "lr": settings.image_rate}]
        if settings.labels == "learned":
            groups.append({"params": [distilled.labels], "lr": settings.label_rate})
        super().__init__(distilled, groups, settings.outer_steps, generator)

    def update(self) -> Row:
        """The loss of the regression on a batch of real images, and a step of Adam."""
        inputs, classes = self._batch()
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
        accuracy = (outputs.argmax(-1) == classes).double().mean().item()
        return {"step": self.step, "loss": loss.item(), "accuracy": accuracy}

    def _batch(self) -> tuple[Tensor, Tensor]:
        inputs, classes = self.data.train.batch(self.settings.outer_batch, self.generator)
        reach = self.settings.shift
        if reach == 0:
            return inputs, classes
        shifts = torch.randint(-reach, reach + 1, (len(inputs), 2), generator=self.generator)
        black = (-self.data.mean / self.data.deviation).view(1, -1, 1, 1)  # what comes in at the edge
        return shifted(inputs - black, shifts.to(inputs.device)) + black, classes
