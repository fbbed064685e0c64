"""Classifier heads by name, and how to put them into a model and look at what they receive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import FixedETFHead, LearnedETFHead, NearestETFHead, provide_targets
from etflayers.checks import require

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


class StandardHead(LinearHead):
    """The baseline of the papers on ETF heads: ``logits = s z V'``, V the learned weight with unit rows."""

    def __init__(self, in_features: int, num_classes: int, *, scale: float, normalize: bool) -> None:
        super().__init__(in_features, num_classes, bias=False)
        self.scale = scale
        self.normalize = normalize

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        inputs = F.normalize(features, dim=-1) if self.normalize else features
        return self.scale * F.linear(inputs, F.normalize(self.weight, dim=-1))

    @torch.no_grad()
    def to_linear(self, *, normalized_inputs: bool = False) -> nn.Linear:
        """The weight that decides, for the metrics, as from the heads of the library."""
        require(normalized_inputs or not self.normalize, "the logits are linear in normalized features only")
        linear = nn.Linear(self.in_features, self.out_features, bias=False).to(self.weight)
        linear.weight.copy_(self.scale * F.normalize(self.weight, dim=-1))
        return linear


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
        "standard": (StandardHead, ()),
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
    kinds = (LinearHead, FixedETFHead, NearestETFHead, LearnedETFHead)
    (head,) = (module for module in model.modules() if isinstance(module, kinds))
    return head


def head_inputs(head: nn.Module, features: Tensor) -> Tensor:
    """The features in which the logits are linear: those of length 1 for a head that normalizes."""
    return F.normalize(features, dim=-1) if getattr(head, "normalize", False) else features


def targets_for(model: nn.Module, targets: Tensor) -> AbstractContextManager[None]:
    """A context that hands targets to the head that wants them, past a model that passes features only."""
    return provide_targets(model, targets) if isinstance(head_of(model), NearestETFHead) else nullcontext()


@contextmanager
def captured_features(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the head receives in the forward passes inside the ``with`` block, with its graph."""
    features: list[Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        yield features
    finally:
        hook.remove()
