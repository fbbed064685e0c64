"""Frame rules: layers that turn class means into a frame, for a head that keeps such means.

A rule is called as ``rule(means, weights=..., anchor=..., proximity=...)`` and returns a frame ``(K, d)`` of
unit rows, differentiable in the means. Here are the simplex ETFs nearest to the means in three distances.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from etflayers.adjoints import Adjoint, as_adjoint
from etflayers.checks import require_number, require_size
from etflayers.functional.distances import huber_nearest_etf, mahalanobis_nearest_etf
from etflayers.functional.nearest import check_pull, frame_of, linear_form, nearest_etf, require_means
from etflayers.functional.spread import unit_spread
from etflayers.nn.distributed import overwrite
from etflayers.solvers import ByRegime, FrameSolver, StiefelSolver, as_frame_solver, as_stiefel_solver

__all__ = ["FrameRule", "HuberNearestETF", "MahalanobisNearestETF", "NearestETF"]


class FrameRule(Protocol):
    """How a frame comes from class means; a module or a function."""

    def __call__(self, means: Tensor, *, weights: Tensor, anchor: Tensor, proximity: float) -> Tensor:
        """The frame, ``(K, d)`` with unit rows, for ``means`` ``(K, d)``.

        Args:
            means: X.
            weights: omega >= 0, ``(K,)``; 0 for a class that has not been seen, whose mean is 0.
            anchor: A, ``(K, d)``, a frame to stay near to.
            proximity: delta >= 0, how much.
        """
        ...


class NearestETF(nn.Module):
    r"""The plain rule: ``argmin sum_k omega_k |x_k / r - w_k - t|^2 + delta |W - A|^2`` over ETFs W and t.

    The length r makes delta a pure number; it is 1 if delta = 0, where it has no effect. See
    :func:`~etflayers.functional.unit_spread` and :func:`~etflayers.functional.nearest_etf`.

    Args:
        solver: see :func:`~etflayers.functional.nearest_etf`.
        adjoint: see :func:`~etflayers.functional.nearest_etf`.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> NearestETF()(torch.eye(3, 4)).argmax(-1)
    tensor([0, 1, 2])
    """

    def __init__(
        self, *, solver: FrameSolver | StiefelSolver | None = None, adjoint: Adjoint | None = None
    ) -> None:
        super().__init__()
        as_frame_solver(solver, ByRegime())
        as_adjoint(adjoint)
        self.solver = solver
        self.adjoint = adjoint

    def forward(
        self,
        means: Tensor,
        *,
        weights: Tensor | None = None,
        anchor: Tensor | None = None,
        proximity: float = 0.0,
    ) -> Tensor:
        """The frame W, ``(K, d)``, nearest to ``means`` of the same shape.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit.
            NonFiniteError: NaN or infinity in the means.
        """
        if proximity == 0:
            return nearest_etf(means, weights=weights, solver=self.solver, adjoint=self.adjoint)
        wide, omega, near = _widened(means, weights, anchor)
        require_means(means)
        check_pull(wide, omega, near, proximity)
        # These are about their weighted mean already, which the linear form of weights would take off again.
        spread = unit_spread(wide, omega, rounding=torch.finfo(means.dtype).eps)
        linear = linear_form(omega.unsqueeze(-1) * spread, anchor=near, proximity=proximity)
        frame = frame_of(linear, solver=self.solver, adjoint=self.adjoint, precision=means.dtype)
        return frame.to(means.dtype)


def _widened(
    means: Tensor, weights: Tensor | None, anchor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Means, weights and anchor in float64.

    Where a class is unseen only the anchor decides, and the condition number of what is solved is 1 / delta:
    joined in float32, means and anchor would lose three of seven digits.
    """
    weights = means.new_ones(means.shape[:-1]) if weights is None else weights
    return means.double(), weights.double(), None if anchor is None else anchor.double()


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
        adjoint: Adjoint | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_size("in_features", in_features)
        as_stiefel_solver(solver)
        as_adjoint(adjoint)
        self.factor = nn.Parameter(torch.eye(in_features, device=device, dtype=dtype))
        self.solver = solver
        self.adjoint = adjoint

    def forward(
        self,
        means: Tensor,
        *,
        weights: Tensor | None = None,
        anchor: Tensor | None = None,
        proximity: float = 0.0,
    ) -> Tensor:
        """The frames W, ``(..., K, d)``, nearest to ``means`` of the same shape.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, or means that all coincide without an
                anchor.
            NonFiniteError: NaN or infinity in the means or the factor.
        """
        wide, weights, anchor = _widened(means, weights, anchor)
        frame = mahalanobis_nearest_etf(
            wide,
            self.factor,
            weights=weights,
            anchor=anchor,
            proximity=proximity,
            solver=self.solver,
            adjoint=self.adjoint,
        )
        return frame.to(means.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the metric the plain one again."""
        overwrite(
            self.factor, torch.eye(len(self.factor), device=self.factor.device, dtype=self.factor.dtype)
        )

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
        adjoint: Adjoint | None = None,
    ) -> None:
        super().__init__()
        require_number("threshold", threshold, positive=True)
        as_stiefel_solver(solver)
        as_adjoint(adjoint)
        self.threshold = threshold
        self.solver = solver
        self.adjoint = adjoint

    def forward(
        self,
        means: Tensor,
        *,
        weights: Tensor | None = None,
        anchor: Tensor | None = None,
        proximity: float = 0.0,
    ) -> Tensor:
        """The frames W, ``(..., K, d)``, nearest to ``means`` of the same shape.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, or means of which half coincide without
                an anchor.
            NonFiniteError: NaN or infinity in the means.
        """
        wide, weights, anchor = _widened(means, weights, anchor)
        frame = huber_nearest_etf(
            wide,
            threshold=self.threshold,
            weights=weights,
            anchor=anchor,
            proximity=proximity,
            solver=self.solver,
            adjoint=self.adjoint,
        )
        return frame.to(means.dtype)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"threshold={self.threshold}"
