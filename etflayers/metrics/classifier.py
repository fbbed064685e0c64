"""The weight and bias with which a classifier decides, whatever kind of module it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.checks import require_floating
from etflayers.errors import InvalidArgumentError
from etflayers.metrics.margins import projections_of
from etflayers.precision import full_precision, working_dtype

__all__ = ["Classifier", "answers", "classifier_inputs", "read_classifier"]


class Classifier(NamedTuple):
    """Logits are ``features @ weight.T + bias``.

    Attributes:
        weight: W, ``(K, d)``.
        bias: b, ``(K,)``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def logits(self, features: Tensor) -> Tensor:
        """``features @ weight.T + bias`` in the precision of the features, at least float32, ``(B, K)``."""
        dtype = working_dtype(features.dtype)
        bias = None if self.bias is None else self.bias.to(features.device, dtype)
        with full_precision(features):
            return F.linear(features.detach().to(dtype), self.weight.to(features.device, dtype), bias)


@torch.no_grad()
def read_classifier(module: nn.Module) -> Classifier:
    """The present weight and bias of a linear layer or of a head of this library.

    Args:
        module: with a ``weight`` ``(K, d)`` and maybe a ``bias``; a head is read through ``to_linear``, so
            that its scale and center count. A head with ``normalize=True`` is linear in normalized features:
            those are the features to measure it with, and :class:`~etflayers.metrics.NeuralCollapse` does.

    Returns:
        Copies, which do not follow further training.

    Raises:
        InvalidArgumentError: a module without a two-dimensional weight.

    >>> read_classifier(nn.Linear(4, 3, bias=False)).weight.shape
    torch.Size([3, 4])
    """
    weight, bias = _weight_and_bias(module)
    return Classifier(weight.clone(), None if bias is None else bias.clone())


def _weight_and_bias(module: nn.Module) -> Classifier:
    """:func:`read_classifier` without copies."""
    layer: Any = module
    if hasattr(module, "to_linear"):
        layer = layer.to_linear(normalized_inputs=True)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InvalidArgumentError(
            f"classifier must have a weight of shape (K, d), like nn.Linear; {type(module).__name__} has not"
        )
    require_floating("classifier.weight", weight.dtype)
    return Classifier(weight.detach(), bias.detach() if isinstance(bias, Tensor) else None)


def classifier_inputs(module: nn.Module, features: Tensor) -> Tensor:
    """What the weight of a classifier meets: the features or, in a head with ``normalize=True``, directions.

    Args:
        module: a linear layer, or a head with a method ``inputs``, as those of this library.
        features: ``(B, d)``.

    Returns:
        ``(B, d)``.

    >>> classifier_inputs(nn.Linear(2, 3), torch.tensor([[3.0, 4.0]]))
    tensor([[3., 4.]])
    """
    head: Any = module
    is_head = hasattr(module, "to_linear") and hasattr(module, "inputs")
    return head.inputs(features) if is_head else features


class Answers(NamedTuple):
    """What a classifier makes of features h, and what its cosines are made of; both from the same products.

    Attributes:
        logits: ``(B, K)``.
        projections: ``|h| cos(h, w_k)``, ``(B, K)``.
        lengths: ``|h|``, ``(B,)``.
    """

    logits: Tensor
    projections: Tensor
    lengths: Tensor


@torch.no_grad()
def answers(module: nn.Module, features: Tensor) -> Answers:
    """Logits and projections of the classifier; a class that is not here has a cosine of -1.

    A canonical frame W has unit rows and products without a matrix: its projections are logits over s.

    Args:
        module: as in :func:`read_classifier`.
        features: h, ``(B, d)``, finite, as :func:`classifier_inputs` returns them.
    """
    features = features.detach().to(working_dtype(features.dtype))
    head: Any = module
    lengths = torch.linalg.vector_norm(features, dim=-1)
    with full_precision(features):
        if getattr(module, "canonical", False):
            logits = head.forward(features)
            projections = logits / head.scale
        else:
            weight, bias = _weight_and_bias(module)
            # The samples of a class lie side by side, so that a maximum over classes compares whole vectors.
            logits = (weight.to(features) @ features.mT).mT
            projections = projections_of(logits, weight)
            logits = logits if bias is None else logits.add_(bias.to(logits))
    active = getattr(module, "active", None)
    if active is not None:  # no other class is nearer to a feature for one that is not here yet
        projections = torch.where(active.to(projections.device), projections, -lengths.unsqueeze(-1))
    return Answers(logits, projections, lengths)
