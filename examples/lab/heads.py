"""Classifier heads by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

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
    if name == "linear":
        return LinearHead(in_features, num_classes)
    wanted = asdict(options)
    makers: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
        "standard": (UnitRowHead, ()),
        "fixed": (FixedETFHead, ("rotation",)),
        "learned": (partial(LearnedETFHead, manifold="geoopt"), ()),
    }
    maker, own = makers.get(name, (NearestETFHead, ("momentum", "proximity", "center")))
    chosen: dict[str, Any] = {option: wanted[option] for option in ("scale", "normalize", *own)}
    if maker is NearestETFHead:
        chosen["detach"] = name == "nearest-detached"
    return maker(in_features, num_classes, **chosen)


def head_of(model: nn.Module) -> nn.Module:
    """The head inside a model."""
    (head,) = (module for module in model.modules() if isinstance(module, (LinearHead, CodeHead)))
    return head


def targets_for(model: nn.Module, targets: Tensor) -> AbstractContextManager[None]:
    """A context that hands targets to the head that wants them, past a model that passes features only."""
    return provide_targets(model, targets) if isinstance(head_of(model), NearestETFHead) else nullcontext()
