"""The weight and bias with which a classifier decides, whatever kind of module it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.checks import require_floating
from etflayers.errors import InvalidArgumentError
from etflayers.metrics.margins import cosines_of
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
    layer: Any = module
    if hasattr(module, "to_linear"):
        layer = layer.to_linear(normalized_inputs=True)
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise InvalidArgumentError(
            f"classifier must have a weight of shape (K, d), like nn.Linear; {type(module).__name__} has not"
        )
    require_floating("classifier.weight", weight.dtype)
    return Classifier(weight.detach().clone(), bias.detach().clone() if isinstance(bias, Tensor) else None)


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


@torch.no_grad()
def answers(module: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and ``cos(h, w_k)`` of the classifier, both ``(B, K)``, from the same products.

    A canonical frame W has unit rows and products without a matrix, so its cosines are ``<h, s w_k> / s|h|``.

    Args:
        module: as in :func:`read_classifier`.
        features: h, ``(B, d)``, finite, as :func:`classifier_inputs` returns them.
    """
    features = features.detach().to(working_dtype(features.dtype))
    if not getattr(module, "canonical", False):
        weight, bias = read_classifier(module)
        products = Classifier(weight).logits(features)
        cosines = cosines_of(products, features, weight)
        products = products if bias is None else products + bias.to(products)
        return products, _of_active(module, cosines)
    head: Any = module
    with full_precision(features):
        logits = head.forward(features)
    lengths = head.scale * torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return logits, _of_active(module, logits / torch.where(lengths > 0, lengths, 1))


def _of_active(module: nn.Module, cosines: Tensor) -> Tensor:
    """Cosines that are -1 for the classes that are not here yet: no other is nearer to a feature for it."""
    active = getattr(module, "active", None)
    return cosines if active is None else torch.where(active.to(cosines.device), cosines, -1)
