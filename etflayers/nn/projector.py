"""A frozen layer between features and classifier that lets the classifier's side collapse."""

from __future__ import annotations

from torch import Tensor, nn

from etflayers.checks import require, require_size
from etflayers.functional.projector import etf_projection

__all__ = ["ETFProjector"]


class ETFProjector(nn.Module):
    r"""The direction of ``A' relu(A z)`` with the frozen 4d x d matrix of a canonical simplex ETF, in O(d).

    :func:`etflayers.functional.etf_projection` as a module: the two frozen linear layers with a ReLU between
    them and a normalization after them, as published, without their 8 d^2 weights. Put it between a backbone
    and its classifier: what comes out collapses, for the detection of unknown inputs, while an
    :class:`EntropyRegularizer` on what goes in keeps that from collapsing.

    Args:
        in_features: d >= 2, of what goes in and what comes out.

    Raises:
        InvalidArgumentError: d < 2.

    Reference:
        Harun, Gallardo, Kanan (2025), arXiv 2502.10691.

    >>> import torch
    >>> ETFProjector(3)(torch.tensor([[3.0, 0.0, 0.0]]))
    tensor([[ 0.8165, -0.4082, -0.4082]])
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        require_size("in_features", in_features, at_least=2)
        self.in_features = in_features

    def forward(self, features: Tensor) -> Tensor:
        """Unit features ``(..., d)`` of ``features`` ``(..., d)``, in float32 or better.

        Raises:
            InvalidArgumentError: features of another width or dtype.
        """
        require(
            features.shape[-1:] == (self.in_features,),
            f"features must have shape (..., in_features) = (..., {self.in_features}), "
            f"got {tuple(features.shape)}",
        )
        return etf_projection(features)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"in_features={self.in_features}"
