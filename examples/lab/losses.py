"""What is minimized, and by which optimizers: the same for every head, but for points on a manifold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etflayers import CodeMSELoss, DotRegressionLoss
from etflayers.checks import require_module
from lab.heads import head_of
from lab.schedules import rate_factor
from lab.settings import Settings

NESTEROV = 0.9


def make_criterion(settings: Settings) -> nn.Module:
    """Cross-entropy, squared error, or dot regression towards logits as large as the scale of the head."""
    if settings.loss == "mse":
        return CodeMSELoss()
    if settings.loss == "dr":
        return DotRegressionLoss(settings.head_options.scale)
    return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)


def total_loss(
    criterion: nn.Module, logits: Tensor, targets: Tensor, features: Tensor, settings: Settings
) -> Tensor:
    """The criterion plus ``lambda/2`` times the mean of ``|h|^2``, the decay of the features.

    Of the features as the backbone gives them: a head that normalizes them leaves their length to this term.
    """
    loss: Tensor = criterion(logits, targets)
    if settings.feature_decay == 0:
        return loss
    with torch.autocast(features.device.type, enabled=False):
        return loss + 0.5 * settings.feature_decay * features.float().square().sum(-1).mean()


def make_optimizers(model: nn.Module, settings: Settings) -> list[Optimizer]:
    """The optimizers that together train all parameters of a model.

    The backbone gets the same optimizer with every head, or a comparison of heads would be one of optimizers.
    A parameter on a manifold, the rotation of the learned head, gets the Riemannian one: no weight decay,
    because its length does not change.
    """
    curved = [parameter for parameter in model.parameters() if hasattr(parameter, "manifold")]
    options: dict[str, Any] = {"lr": settings.learning_rate}
    if settings.optimizer == "sgd":
        options |= {"momentum": NESTEROV, "nesterov": True}
    flat = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizers: list[Optimizer] = [flat[settings.optimizer](parameter_groups(model, settings), **options)]
    if curved:
        riemannian = require_module("geoopt", extra="solvers").optim
        kind = riemannian.RiemannianSGD if settings.optimizer == "sgd" else riemannian.RiemannianAdam
        optimizers.append(kind(curved, **options))
    return optimizers


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The parameters outside manifolds, with their decay: backbone, weight of the classifier, its bias."""
    decay = settings.classifier_decay
    decays = {"weight": decay, "prototypes": decay, "bias": settings.bias_decay}
    own = {id(parameter): decays.get(name) for name, parameter in head_of(model).named_parameters()}
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
    rate = settings.learning_rate * rate_factor(step, total, settings.schedule)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rate
