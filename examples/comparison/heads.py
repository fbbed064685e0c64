"""The heads, put into a model in place of its linear classifier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comparison.data import ImageData
from comparison.models import RESNETS, make_model
from comparison.settings import HeadName, Settings
from etflayers import FixedETFHead, LearnedETFHead, NearestETFHead, provide_targets, replace_classifier
from etflayers.checks import require


class LinearHead(nn.Linear):
    """``nn.Linear`` that calls its sizes what the ETF heads call them."""

    @property
    def num_classes(self) -> int:
        return self.out_features


class StandardHead(nn.Linear):
    """The baseline of the papers on ETF heads: ``logits = s z V'``, V the learned weight with unit rows."""

    def __init__(self, in_features: int, num_classes: int, *, scale: float, normalize: bool) -> None:
        super().__init__(in_features, num_classes, bias=False)
        self.scale = scale
        self.normalize = normalize

    @property
    def num_classes(self) -> int:
        return self.out_features

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


def make_head(name: HeadName, in_features: int, num_classes: int, settings: Settings, seed: int) -> nn.Module:
    """The head called ``name``; what is random in it is drawn from a stream of its own."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"scale": settings.logit_scale, "normalize": settings.normalizes}
    if name == "linear":
        return LinearHead(in_features, num_classes)
    if name == "standard":
        return StandardHead(in_features, num_classes, **common)
    if name == "fixed":
        return FixedETFHead(in_features, num_classes, rotation=settings.rotation, **common)
    if name == "learned":
        return LearnedETFHead(in_features, num_classes, manifold="geoopt", **common)
    return NearestETFHead(
        in_features,
        num_classes,
        momentum=settings.momentum,
        proximity=settings.proximity,
        detach=name == "nearest-detached",
        # Dot regression asks for plain inner products.
        center=settings.center and settings.loss != "dr",
        **common,
    )


def make_classifier(name: HeadName, settings: Settings, data: ImageData, seed: int) -> nn.Module:
    """A model with the head called ``name``: for one seed all heads get the same backbone.

    Args:
        name: of the head.
        settings: model, width and options of the heads.
        data: gives the sizes of input and output.
        seed: of all random numbers.

    Raises:
        InvalidArgumentError: too few features for an ETF, or an unknown model.
    """
    dim = data.num_classes if settings.feature_dim == "K" else settings.feature_dim
    require(
        dim is None or dim >= (1 if name in ("linear", "standard") else data.num_classes - 1),
        f"--feature-dim {dim} is too small for the {name} head and K = {data.num_classes} classes: a simplex "
        f"ETF needs at least K - 1 = {data.num_classes - 1}",
    )
    model = make_model(settings, data, dim, seed)

    def replacement(in_features: int, num_classes: int) -> nn.Module:
        if dim is None or settings.model in RESNETS:
            return make_head(name, in_features, num_classes, settings, seed)
        return ProjectedHead(in_features, make_head(name, dim, num_classes, settings, seed))

    return replace_classifier(model, replacement)


def head_of(model: nn.Module) -> nn.Module:
    """The head inside a model made by :func:`make_classifier`."""
    kinds = (LinearHead, StandardHead, FixedETFHead, NearestETFHead, LearnedETFHead)
    (head,) = (module for module in model.modules() if isinstance(module, kinds))
    return head


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
