"""One optimiser for ordinary parameters, its Riemannian counterpart for rotations, one learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from comparison.settings import Settings
from etflayers.errors import require_module

WARM_UP = 0.1  # share of the steps
NESTEROV = 0.9


def make_optimizers(model: nn.Module, settings: Settings) -> list[Optimizer]:
    """The optimisers that together train all parameters of a model.

    The backbone gets the same optimiser with every head, or a comparison of heads would be one of optimisers.
    A parameter on a manifold, the rotation of the learned head, gets the Riemannian one: no weight decay,
    because its length does not change.
    """
    parameters = list(model.parameters())
    curved = [parameter for parameter in parameters if hasattr(parameter, "manifold")]
    plain = [parameter for parameter in parameters if not hasattr(parameter, "manifold")]
    lr, decay = settings.learning_rate, settings.decay
    if settings.optimizer == "sgd":
        optimizers: list[Optimizer] = [
            torch.optim.SGD(plain, lr=lr, momentum=NESTEROV, nesterov=True, weight_decay=decay)
        ]
    else:
        optimizers = [torch.optim.AdamW(plain, lr=lr, weight_decay=decay)]
    if curved:
        riemannian = require_module("geoopt", extra="solvers").optim
        if settings.optimizer == "sgd":
            optimizers.append(riemannian.RiemannianSGD(curved, lr=lr, momentum=NESTEROV, nesterov=True))
        else:
            optimizers.append(riemannian.RiemannianAdam(curved, lr=lr))
    return optimizers


def set_learning_rate(optimizers: list[Optimizer], peak: float, step: int, total: int) -> float:
    """Linear warm-up, then half a cosine down to zero: a function of the step alone, so nothing to save."""
    progress = (step + 1) / total
    if progress <= WARM_UP:
        factor = progress / WARM_UP
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
    return peak * factor
