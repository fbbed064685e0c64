"""The methods: a head, and a loss of its logits; and the networks that they sit on."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor, nn

from etflayers import FixedCodeHead, FixedETFHead, NearestETFHead
from etflayers.nn import HuberNearestETF, LabelRelaxationLoss
from lab.heads import LinearHead
from lab.models import ResNet

MethodName = Literal["ce", "smoothing", "relaxation", "fixed", "nearest", "nearest-huber", "code"]
ModelName = Literal["mlp", "resnet"]


class Knobs(NamedTuple):
    """What a search chooses.

    Attributes:
        lr: learning rate of the first fifth of the steps.
        gamma: factor to it after each further fifth.
        weight_decay: of all parameters.
        alpha: how much of the label the loss gives away: smoothing, or relaxation.
    """

    lr: float
    gamma: float
    weight_decay: float
    alpha: float


def own_knobs(method: MethodName, knobs: Knobs) -> dict[str, float | None]:
    """The knobs by name, without the value of alpha where the method has none."""
    own = knobs._asdict()
    return own if method in ("smoothing", "relaxation") else {**own, "alpha": None}


def make_head(method: MethodName, features: int, num_classes: int, scale: float) -> nn.Module:
    """The head; what is random in it comes from the global generator."""
    sizes, unit = (features, num_classes), {"scale": scale, "normalize": True}
    if method == "fixed":
        return FixedETFHead(*sizes, **unit)
    if method == "nearest":
        return NearestETFHead(*sizes, **unit)
    if method == "nearest-huber":
        return NearestETFHead(*sizes, rule=HuberNearestETF(), **unit)
    if method == "code":
        return FixedCodeHead(*sizes, **unit)
    return LinearHead(*sizes)


def make_loss(method: MethodName, alpha: float) -> nn.Module:
    """What is minimized, of logits and labels."""
    if method == "relaxation":
        return LabelRelaxationLoss(alpha)
    return nn.CrossEntropyLoss(label_smoothing=alpha if method == "smoothing" else 0.0)


class Network(nn.Module):
    """A body that ends in d features that are not negative, and a head.

    Args:
        name: ``"mlp"``: linear layers, each with batch normalization and ReLU, the last of width d, as
            Nguyen et al. (2023, arXiv 2206.05530) train it; ``"resnet"``: a small ResNet and one such layer.
        head: knows d.
        shape: of an image.
        width: hidden units, or channels of the last stage.
        depth: linear layers of the MLP, with that of a linear head.
    """

    def __init__(
        self, name: ModelName, head: nn.Module, shape: tuple[int, int, int], width: int, depth: int
    ) -> None:
        super().__init__()
        if name == "mlp":
            widths = [math.prod(shape), *[width] * (depth - 2), head.in_features]
            layers = [nn.Flatten(), *(layer(*pair) for pair in pairwise(widths))]
            self.body: nn.Module = nn.Sequential(*layers)
        else:
            resnet = ResNet(shape[0], 2, (max(1, width // 4), max(1, width // 2), width), (1, 1, 1), 2)
            resnet.classifier = layer(width, head.in_features)
            self.body = resnet
        self.head = head

    def logits(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Of features; in a training with targets the nearest heads learn their frame."""
        if targets is not None and isinstance(self.head, NearestETFHead):
            return self.head(features, targets)
        return self.head(features)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.logits(self.body(images), targets)


def layer(in_features: int, out_features: int) -> nn.Sequential:
    """A linear map, batch normalization and ReLU."""
    linear = nn.Linear(in_features, out_features, bias=False)  # batch normalization takes the mean out
    return nn.Sequential(linear, nn.BatchNorm1d(out_features), nn.ReLU())
