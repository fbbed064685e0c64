"""Layers that turn class means into the nearest simplex ETF in a distance without a closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etflayers.adjoints import StiefelAdjoint
from etflayers.checks import require
from etflayers.functional.distances import huber_nearest_etf, mahalanobis_nearest_etf
from etflayers.solvers import StiefelSolver

__all__ = ["HuberNearestETF", "MahalanobisNearestETF"]


class MahalanobisNearestETF(nn.Module):
    r"""The ETF nearest to class means in a learned metric: ``argmin sum_k |L'(x_k / r - w_k - t)|^2``.

    Args:
        in_features: d.
        solver: see :func:`~etflayers.functional.stiefel_argmin`.
        adjoint: see :func:`~etflayers.functional.stiefel_argmin`.
        device: of the parameter.
        dtype: of the parameter.

    Attributes:
        factor: L, ``(d, d)``, a parameter; it starts as the identity, where the frame is the plain nearest
            one.

    Reference:
        Weinberger, Saul (2009), Distance metric learning for large margin nearest neighbor classification.

    >>> nearest = MahalanobisNearestETF(in_features=4)
    >>> means = torch.eye(3, 4)
    >>> (nearest(means) * means).sum().backward()
    >>> nearest.factor.grad.shape
    torch.Size([4, 4])
    """

    def __init__(
        self,
        in_features: int,
        *,
        solver: StiefelSolver | None = None,
        adjoint: StiefelAdjoint | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(in_features >= 1, f"in_features must be at least 1, got {in_features}")
        self.factor = nn.Parameter(torch.eye(in_features, device=device, dtype=dtype))
        self.solver = solver
        self.adjoint = adjoint

    def forward(self, means: Tensor) -> Tensor:
        """The frames W, ``(..., K, d)``, nearest to ``means`` of the same shape.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, or means that all coincide.
            NonFiniteError: NaN or infinity in the means or the factor.
        """
        return mahalanobis_nearest_etf(means, self.factor, solver=self.solver, adjoint=self.adjoint)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"in_features={len(self.factor)}"


class HuberNearestETF(nn.Module):
    r"""The ETF nearest to class means in the Huber loss, which bounds the pull of each class.

    Args:
        threshold: the distance from its vertex, in units of the length of a frame vector, beyond which a
            class pulls no harder.
        solver: see :func:`~etflayers.functional.stiefel_argmin`.
        adjoint: see :func:`~etflayers.functional.stiefel_argmin`.

    Raises:
        InvalidArgumentError: a threshold that is not positive.

    Reference:
        Huber (1964), Robust estimation of a location parameter.

    >>> HuberNearestETF(threshold=0.3)(torch.eye(3, 4)).argmax(-1)
    tensor([0, 1, 2])
    """

    def __init__(
        self,
        *,
        threshold: float = 0.25,
        solver: StiefelSolver | None = None,
        adjoint: StiefelAdjoint | None = None,
    ) -> None:
        super().__init__()
        require(0 < threshold < float("inf"), f"threshold must be a finite number > 0, got {threshold}")
        self.threshold = threshold
        self.solver = solver
        self.adjoint = adjoint

    def forward(self, means: Tensor) -> Tensor:
        """The frames W, ``(..., K, d)``, nearest to ``means`` of the same shape.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, or means of which half coincide.
            NonFiniteError: NaN or infinity in the means.
        """
        return huber_nearest_etf(means, threshold=self.threshold, solver=self.solver, adjoint=self.adjoint)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"threshold={self.threshold}"
