"""Classifier heads by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from etflayers import (
    CodeHead,
    FixedETFHead,
    LearnedETFHead,
    NearestETFHead,
    UnitRowHead,
    provide_targets,
)

HeadName = Literal["linear", "standard", "fixed", "nearest", "nearest-detached", "learned"]


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What heads can be asked for; each takes its share. The defaults are those of the library."""

    scale: float = 1.0
    normalize: bool = False
    rotation: Literal["canonical", "haar"] = "canonical"  # of the fixed head
    momentum: float | Literal["2/(t+1)"] | None = 0.1  # this and the rest: of the nearest head
    proximity: float = 1e-3
    center: bool = True


class LinearHead(nn.Linear):
    """``nn.Linear`` that calls its sizes what the ETF heads call them."""

    @property
    def num_classes(self) -> int:
        return self.out_features


class ProjectedHead(nn.Module):
    """A linear map to fewer features, then a head."""

    def __init__(self, in_features: int, head: nn.Module) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_classes = head.num_classes
        self.projection = nn.Linear(in_features, head.in_features, bias=False)
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.projection(features))


def make_head(
    name: HeadName, in_features: int, num_classes: int, seed: int, options: HeadOptions = HeadOptions()
) -> nn.Module:
    """The head called ``name``; what is random in it is drawn from a stream of its own."""
    torch.manual_seed(seed)
    sizes, common = (in_features, num_classes), {"scale": options.scale, "normalize": options.normalize}
    if name == "linear":
        return LinearHead(*sizes)
    if name == "standard":
        return UnitRowHead(*sizes, **common)
    if name == "fixed":
        return FixedETFHead(*sizes, rotation=options.rotation, **common)
    if name == "learned":
        return LearnedETFHead(*sizes, manifold="geoopt", **common)
    nearest = {"momentum": options.momentum, "proximity": options.proximity, "center": options.center}
    return NearestETFHead(*sizes, detach=name == "nearest-detached", **nearest, **common)


def head_of(model: nn.Module) -> nn.Module:
    """The head inside a model."""
    (head,) = (module for module in model.modules() if isinstance(module, (LinearHead, CodeHead)))
    return head


def targets_for(model: nn.Module, targets: Tensor) -> AbstractContextManager[None]:
    """A context that hands targets to the head that wants them, past a model that passes features only."""
    wants = getattr(head_of(model), "accepts_targets", False)
    return provide_targets(model, targets) if wants else nullcontext()
