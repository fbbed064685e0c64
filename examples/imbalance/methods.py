"""The methods: a head, and a loss of its features.

Symbols: n_k <-> counts, s <-> scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import (
    CodeCrossEntropy,
    DotRegressionLoss,
    FixedETFHead,
    NearestETFHead,
    NONLLoss,
    NTCELoss,
    UnitRowHead,
)
from etflayers.functional import lengths_from_counts, logit_adjustment
from lab.heads import LinearHead

MethodName = Literal[
    "ce",
    "reweighted",
    "linear-la",
    "cosine-la",
    "etf-dr",
    "etf-dr-lengths",
    "etf-la",
    "nearest-la",
    "etf-ntce",
    "etf-nonl",
]
Objective = Callable[[Tensor, Tensor], Tensor]  # of features and targets


class Knobs(NamedTuple):
    """What is chosen on the validation set.

    Attributes:
        scale: of the logits of features of length 1; in NTCE and NONL the inverse of the temperature.
        weight_decay: of all parameters.
        tau: how much of the logarithm of the prior the loss adds to the logits.
    """

    scale: float
    weight_decay: float
    tau: float


# The knobs that each method has. All of them have a weight decay.
SCALED = ("scale", "weight_decay")
ADJUSTED = ("scale", "weight_decay", "tau")
KNOBS: dict[MethodName, tuple[str, ...]] = {
    "ce": ("weight_decay",),
    "reweighted": ("weight_decay",),
    "linear-la": ("weight_decay", "tau"),
    "cosine-la": ADJUSTED,
    "etf-dr": ("weight_decay",),
    "etf-dr-lengths": ("weight_decay",),
    "etf-la": ADJUSTED,
    "nearest-la": ADJUSTED,
    "etf-ntce": SCALED,
    "etf-nonl": SCALED,
}


def own_knobs(method: MethodName, knobs: Knobs) -> dict[str, float | None]:
    """The knobs by name, without the values of those that the method does not have."""
    return {name: value if name in KNOBS[method] else None for name, value in knobs._asdict().items()}


def inverse_frequency(counts: Tensor) -> Tensor:
    """A weight for each class, ``(K,)``, proportional to ``1 / n_k``, with mean 1."""
    weights = 1 / counts.float()
    return weights / weights.mean()


def make_head(method: MethodName, features: int, counts: Tensor, knobs: Knobs) -> nn.Module:
    """The head; what is random in it comes from the global generator."""
    sizes = (features, len(counts))
    unit = {"scale": knobs.scale, "normalize": True}
    if method in ("ce", "reweighted", "linear-la"):
        return LinearHead(*sizes)
    if method == "cosine-la":
        return UnitRowHead(*sizes, **unit)
    if method == "nearest-la":
        return NearestETFHead(*sizes, class_weights=inverse_frequency(counts), **unit)
    if method in ("etf-dr", "etf-dr-lengths"):
        unit["scale"] = 1.0  # the loss pulls cosines to 1
    return FixedETFHead(*sizes, rotation="haar", **unit)


def make_objective(method: MethodName, head: nn.Module, counts: Tensor, knobs: Knobs) -> Objective:
    """What is minimized; counts and head are on one device."""
    if method == "ce":
        return lambda features, targets: F.cross_entropy(head(features), targets)
    if method == "reweighted":
        weights = inverse_frequency(counts)
        return lambda features, targets: F.cross_entropy(head(features), targets, weights)
    if method == "linear-la":
        return lambda features, targets: F.cross_entropy(
            logit_adjustment(head(features), counts, tau=knobs.tau), targets
        )
    if method == "etf-dr":
        regression = DotRegressionLoss()
        return lambda features, targets: regression(head(features), targets)
    if method == "etf-dr-lengths":
        lengths = lengths_from_counts(counts)
        # As in the published code: classifier vectors of these lengths, and no division by them.
        weighted = DotRegressionLoss(lengths, divide_by_length=False)
        return lambda features, targets: weighted(lengths * head(features), targets)
    if method in ("etf-ntce", "etf-nonl"):
        contrast = (NTCELoss if method == "etf-ntce" else NONLLoss)(tau=1 / knobs.scale)
        return lambda features, targets: contrast(features, targets, head)
    return CodeCrossEntropy(head, prior=counts, tau=knobs.tau)
