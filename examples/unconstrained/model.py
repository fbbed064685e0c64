"""The unconstrained-features model: features that are free variables, and a head on top of them.

A network that can interpolate is replaced by its last feature layer: one vector for each sample, moved by
gradient descent itself. What is left of training is the interplay of features and head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.heads import StandardHead
from comparison.losses import HalfSquaredError
from etflayers import FixedETFHead, LearnedETFHead, NearestETFHead
from etflayers.checks import require_module
from unconstrained.settings import HeadName, Settings


class UnconstrainedFeatures(nn.Module):
    """Free features, ``per_class`` of them for each class, with the head called ``name``.

    Features start uniformly on the unit sphere: one seed gives all heads the same ones. What is random in a
    head is drawn from a stream of its own.
    """

    targets: Tensor

    def __init__(self, name: HeadName, num_classes: int, seed: int, settings: Settings) -> None:
        super().__init__()
        dim, targets = settings.dim(num_classes), torch.arange(num_classes)
        targets = targets.repeat_interleave(settings.per_class)
        start = torch.randn(len(targets), dim, generator=torch.Generator().manual_seed(seed))
        self.features = nn.Parameter(F.normalize(start, dim=-1))
        self.register_buffer("targets", targets)
        self.head = make_head(name, num_classes, dim, settings, seed)

    def forward(self) -> Tensor:
        return self.head(self.features, self.targets)

    @property
    def inputs(self) -> Tensor:
        """The features as the linear part of the head receives them."""
        features = self.features.detach()
        return F.normalize(features, dim=-1) if self.head.normalize else features


def make_head(name: HeadName, num_classes: int, dim: int, settings: Settings, seed: int) -> nn.Module:
    """The head called ``name``."""
    torch.manual_seed(seed)
    scale, normalize = settings.logit_scale, settings.normalize
    if name == "standard":
        return StandardHead(dim, num_classes, scale=scale, normalize=normalize)
    if name == "fixed":
        return FixedETFHead(dim, num_classes, rotation="haar", scale=scale, normalize=normalize)
    if name == "learned":
        return LearnedETFHead(dim, num_classes, scale=scale, normalize=normalize, manifold="geoopt")
    return NearestETFHead(
        dim,
        num_classes,
        scale=scale,
        normalize=normalize,
        momentum=settings.momentum,
        center=settings.center,
        proximity=settings.proximity,
        detach=name == "nearest-detached",
    )


def objective(model: UnconstrainedFeatures, logits: Tensor, settings: Settings) -> Tensor:
    """Mean loss over the samples, plus ``decay / 2 |.|^2`` of the features and of the learned weight."""
    if settings.loss == "ce":
        loss = F.cross_entropy(logits, model.targets)
    else:
        loss = HalfSquaredError()(logits, model.targets)
    if settings.feature_decay > 0:
        loss = loss + settings.feature_decay / 2 * model.features.square().sum()
    if settings.weight_decay > 0 and isinstance(model.head, StandardHead):
        loss = loss + settings.weight_decay / 2 * model.head.weight.square().sum()
    return loss


def make_optimizers(
    model: UnconstrainedFeatures, lr: float, settings: Settings
) -> list[torch.optim.Optimizer]:
    """Gradient descent in units in which each sample, and each class, counts once.

    In the mean over N samples the gradient of one feature is 1/N of that of its own loss, that of a row of
    the classifier about 1/K. The rates are multiplied by N and by K: they then mean the same for every size.
    """
    samples, momentum = len(model.targets), settings.sgd_momentum
    rate = lr * settings.classifier_rate * samples / settings.per_class
    learned = list(model.head.parameters())
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD([model.features], lr=lr * samples, momentum=momentum)
    ]
    if isinstance(model.head, LearnedETFHead):
        riemannian = require_module("geoopt", extra="solvers").optim.RiemannianSGD
        optimizers.append(riemannian(learned, lr=rate, momentum=momentum))
    elif learned:
        optimizers.append(torch.optim.SGD(learned, lr=rate, momentum=momentum))
    return optimizers
