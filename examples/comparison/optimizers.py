"""One optimizer for ordinary parameters, its Riemannian counterpart for rotations, one learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from comparison.heads import head_of
from comparison.settings import Settings
from etflayers.checks import require_module

WARM_UP = 0.1  # share of the steps
NESTEROV = 0.9


def make_optimizers(model: nn.Module, settings: Settings) -> list[Optimizer]:
    """The optimizers that together train all parameters of a model.

    The backbone gets the same optimizer with every head, or a comparison of heads would be one of optimizers.
    A parameter on a manifold, the rotation of the learned head, gets the Riemannian one: no weight decay,
    because its length does not change.
    """
    curved = [parameter for parameter in model.parameters() if hasattr(parameter, "manifold")]
    plain = parameter_groups(model, settings)
    lr = settings.learning_rate
    if settings.optimizer == "sgd":
        optimizers: list[Optimizer] = [torch.optim.SGD(plain, lr=lr, momentum=NESTEROV, nesterov=True)]
    elif settings.optimizer == "adam":
        optimizers = [torch.optim.Adam(plain, lr=lr)]
    else:
        optimizers = [torch.optim.AdamW(plain, lr=lr)]
    if curved:
        riemannian = require_module("geoopt", extra="solvers").optim
        if settings.optimizer == "sgd":
            optimizers.append(riemannian.RiemannianSGD(curved, lr=lr, momentum=NESTEROV, nesterov=True))
        else:
            optimizers.append(riemannian.RiemannianAdam(curved, lr=lr))
    return optimizers


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The parameters outside manifolds, with their decay: backbone, weight of the classifier, its bias."""
    head = head_of(model)
    decays = {"weight": settings.classifier_decay, "bias": settings.bias_decay}
    own = {id(parameter): decays.get(name) for name, parameter in head.named_parameters()}
    groups: dict[float, dict[str, Any]] = {settings.decay: {"params": [], "weight_decay": settings.decay}}
    for parameter in model.parameters():
        if hasattr(parameter, "manifold"):
            continue
        decay = own.get(id(parameter))
        decay = settings.decay if decay is None else decay
        groups.setdefault(decay, {"params": [], "weight_decay": decay})["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(optimizers: list[Optimizer], settings: Settings, step: int, total: int) -> float:
    """The rate of this step: a function of the step alone, so there is nothing to save."""
    progress = (step + 1) / total
    if progress <= WARM_UP:
        factor = progress / WARM_UP
    elif settings.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    elif settings.schedule == "step":
        factor = 0.1 ** ((progress > 0.5) + (progress > 0.75))
    else:
        factor = 1.0
    rate = settings.learning_rate * factor
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rate
