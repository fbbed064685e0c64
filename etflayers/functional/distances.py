r"""The simplex ETF nearest to class means in distances that have no closed form: Mahalanobis and Huber.

Symbols: X <-> rows, L <-> factor, omega <-> weights, A <-> anchor, r <-> size, t <-> center, Q <-> rotation.

Every simplex ETF is W = c E'Q' with Q in St(d, K-1) (see ``geometry.frames``), so both are minimizations over
the Stiefel manifold. The plain nearest ETF is linear in Q: it does not care how long the means are, because
WW' is the same for every frame. Here the lengths matter. The means are compared with frames of their own
size r:

    minimize  sum_k omega_k rho(x_k / r - w_k - t) + delta |W - A|^2   over simplex ETFs W and t in R^d.

A class of weight zero, which has not been seen, is ignored: only the anchor A says where its vertex goes.

**Mahalanobis**, rho(u) = |L'u|^2: the best t is the weighted mean of what it is subtracted from, and

    r^2 = sum_k omega_k |x_k - x_omega|^2 / sum_k omega_k

is the size that gives means and frame the same length. With L = I it is the plain problem.

**Huber**, rho(u) = |u|^2 / 2 up to |u| = tau and tau |u| - tau^2 / 2 beyond (and delta / 2 instead of delta):
a class far from its vertex pulls with force tau, however far it is. The best t is a weighted mean of
u_k = x_k / r - w_k with weights omega_k min(1, tau / |u_k - t|), which depend on t; it is found by repeating
that. The means are first centered at their coordinatewise median, where the repetition starts, and r is the
median distance from there: a few corrupted means move neither. The solver starts from the nearest ETF of
means clipped to the length r.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.adjoints import Adjoint
from etflayers.checks import require, require_finite, require_floating, require_values
from etflayers.functional.nearest import check_pull, nearest_etf, require_means
from etflayers.functional.stiefel import stiefel_argmin
from etflayers.geometry import centered_basis_apply, etf_from_coordinates, etf_radius
from etflayers.precision import full_precision, working_dtype
from etflayers.solvers import StiefelSolver

__all__ = ["huber_nearest_etf", "mahalanobis_nearest_etf"]

# Each repetition brings the Huber center nearer by a factor of about the share of classes beyond delta.
_REWEIGHTINGS = 10


def mahalanobis_nearest_etf(
    means: Tensor,
    factor: Tensor,
    *,
    weights: Tensor | None = None,
    anchor: Tensor | None = None,
    proximity: float = 0.0,
    solver: StiefelSolver | None = None,
    adjoint: Adjoint | None = None,
) -> Tensor:
    r"""Minimize ``sum_k omega_k |L'(x_k / r - w_k - t)|^2 + delta |W - A|^2`` over simplex ETFs W and t.

    The metric on features is LL'. Differentiable, to any order in reverse mode, in ``means`` and
    ``factor``. The solver starts from the plain nearest ETF; a local minimum is what it finds.

    Args:
        means: X, ``(..., K, d)`` with d >= K - 1; without an anchor not all equal.
        factor: L, ``(d, m)``. With rank below d, many frames may be equally near.
        weights: omega >= 0, ``(..., K)``; default all ones. A class of weight zero is ignored.
        anchor: A, ``(..., K, d)``; needed when ``proximity`` is not zero.
        proximity: delta >= 0, beside means of the size of a frame.
        solver: see :func:`~etflayers.functional.stiefel_argmin`.
        adjoint: see :func:`~etflayers.functional.stiefel_argmin`.

    Returns:
        W, ``(..., K, d)``, unit rows.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, or means that all coincide without an anchor.
        NonFiniteError: NaN or infinity in an input.

    Reference:
        Mahalanobis (1936), On the generalized distance in statistics.

    >>> means = torch.tensor([[3.0, 0.1], [-1.0, 2.0], [-2.0, -2.0]])
    >>> frame = mahalanobis_nearest_etf(means, torch.diag(torch.tensor([1.0, 3.0])))
    >>> (frame @ frame.T).round(decimals=4)
    tensor([[ 1.0000, -0.5000, -0.5000],
            [-0.5000,  1.0000, -0.5000],
            [-0.5000, -0.5000,  1.0000]])
    """
    rows = _checked(means)
    require_floating("factor", factor.dtype)
    require(
        factor.ndim == 2 and factor.shape[0] == means.shape[-1],
        f"factor must have shape (in_features, m) = ({means.shape[-1]}, m), got {tuple(factor.shape)}",
    )
    require_finite(factor, "factor holds NaN or infinity: look for an overflow in what produced it")
    pull = _Pull.checked(rows, means, weights, anchor, proximity)
    rows = rows - pull.mean(rows)
    square = (pull.weights * rows.square().sum(-1)).sum(-1) / pull.total
    rows = rows / pull.usable(square)[:, None, None].sqrt()
    return _nearest(_mahalanobis, rows, rows, factor, pull, like=means, solver=solver, adjoint=adjoint)


def _mahalanobis(rotation: Tensor, rows: Tensor, factor: Tensor, *pull: Tensor) -> Tensor:
    weights, total, _, _ = pull
    frame = etf_from_coordinates(rotation.mT)
    gap = rows - frame
    gap = gap - _weighted_mean(gap, weights, total)
    return (weights * (gap @ factor).square().sum(-1)).sum(-1) + _distance(frame, *pull)


def huber_nearest_etf(
    means: Tensor,
    *,
    threshold: float | Tensor = 0.25,
    weights: Tensor | None = None,
    anchor: Tensor | None = None,
    proximity: float = 0.0,
    solver: StiefelSolver | None = None,
    adjoint: Adjoint | None = None,
) -> Tensor:
    r"""Minimize ``sum_k omega_k rho(|x_k / r - w_k - t|) + delta/2 |W - A|^2`` over simplex ETFs W and t.

    rho is the Huber loss: half the square up to the threshold, linear beyond.

    Grossly corrupted class means pull with a bounded force; means swapped with each other do so in the plain
    distance already, and gain nothing. Differentiable, to any order in
    reverse mode, in ``means`` and ``threshold``, but for means exactly at the threshold. What is found is a
    local minimum.

    Args:
        means: X, ``(..., K, d)`` with d >= K - 1; without an anchor not all equal.
        threshold: tau > 0, a number or a scalar tensor, in units of the length of a frame vector.
        weights: omega >= 0, ``(..., K)``; default all ones. A class of weight zero is ignored.
        anchor: A, ``(..., K, d)``; needed when ``proximity`` is not zero.
        proximity: delta >= 0, beside means of the size of a frame.
        solver: see :func:`~etflayers.functional.stiefel_argmin`.
        adjoint: see :func:`~etflayers.functional.stiefel_argmin`.

    Returns:
        W, ``(..., K, d)``, unit rows.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, a threshold that is not positive, or means
            of which half coincide without an anchor.
        NonFiniteError: NaN or infinity in an input.

    Reference:
        Huber (1964), Robust estimation of a location parameter.

    >>> means = torch.eye(5)
    >>> means[4] = torch.tensor([50.0, -20.0, 10.0, 30.0, 0.0])
    >>> frame = huber_nearest_etf(means)
    >>> torch.allclose(frame @ frame.T, 1.25 * torch.eye(5) - 0.25, atol=1e-4)
    True
    """
    rows = _checked(means)
    tau = torch.as_tensor(threshold, dtype=rows.dtype, device=rows.device)
    require(tau.ndim == 0, f"threshold must be a number, got shape {tuple(tau.shape)}")
    require_values((tau > 0) & torch.isfinite(tau), "threshold must be a finite number > 0")
    pull = _Pull.checked(rows, means, weights, anchor, proximity)
    present = pull.weights > 0
    median = torch.where(present[..., None], rows, torch.nan).nanmedian(-2, keepdim=True).values
    rows = torch.where(present[..., None], rows - median, 0)
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    rows = rows / pull.usable(torch.where(present, lengths, torch.nan).nanmedian(-1).values)[:, None, None]
    clipped = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1)
    return _nearest(_huber, clipped, rows, tau, pull, like=means, solver=solver, adjoint=adjoint)


def _huber(rotation: Tensor, rows: Tensor, tau: Tensor, *pull: Tensor) -> Tensor:
    weights = pull[0]
    frame = etf_from_coordinates(rotation.mT)
    gap = rows - frame
    center = torch.zeros_like(gap[..., :1, :])
    for _ in range(_REWEIGHTINGS):
        # tau / max(tau, |u|), with a root only where it can be differentiated.
        shares = weights * tau * (gap - center).square().sum(-1).clamp_min(tau.square()).rsqrt()
        share = shares.sum(-1)
        center = _weighted_mean(gap, shares, torch.where(share > 0, share, 1))
    square = (gap - center).square().sum(-1)
    beyond = tau * square.clamp_min(tau.square()).sqrt() - tau.square() / 2
    losses = torch.where(square <= tau.square(), square / 2, beyond)
    return (weights * losses).sum(-1) + _distance(frame, *pull) / 2


class _Pull(NamedTuple):
    """How hard each class and the anchor pull at the frame, one entry for each member of the batch."""

    weights: Tensor  # omega, (B, K)
    total: Tensor  # their sum, 1 where it is zero, (B,)
    anchor: Tensor  # A, (B, K, d), or zero
    proximity: Tensor  # delta, a scalar

    @classmethod
    def checked(
        cls, rows: Tensor, means: Tensor, weights: Tensor | None, anchor: Tensor | None, proximity: float
    ) -> _Pull:
        """The arguments of a call for means ``(..., K, d)``, as a batch beside ``rows`` ``(B, K, d)``."""
        check_pull(means, weights, anchor, proximity)
        if weights is None:
            spread = rows.new_ones(rows.shape[:-1])
        else:
            spread = weights.to(rows.dtype).expand(means.shape[:-1]).reshape(rows.shape[:-1])
        if anchor is None:
            near = rows.new_zeros(()).expand_as(rows)
        else:
            near = anchor.to(rows.dtype).expand_as(means).reshape(rows.shape)
        total = spread.sum(-1)
        return cls(spread, torch.where(total > 0, total, 1), near, rows.new_tensor(proximity))

    def mean(self, rows: Tensor) -> Tensor:
        """The weighted mean of the rows, ``(B, 1, d)``."""
        return _weighted_mean(rows, self.weights, self.total)

    def usable(self, size: Tensor) -> Tensor:
        """``size``, ``(B,)``, which has to be positive, or 1 where it is not and the anchor decides."""
        if float(self.proximity) > 0:
            return torch.where(size > 0, size, 1)
        require_values(
            (size > 0).all(),
            "means must differ from each other, so that they have a size: leave out the classes that have "
            "not been seen, or give anchor= and proximity= > 0",
        )
        return size


def _weighted_mean(rows: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    return (weights[..., None] * rows).sum(-2, keepdim=True) / total[:, None, None]


def _distance(frame: Tensor, weights: Tensor, total: Tensor, anchor: Tensor, proximity: Tensor) -> Tensor:
    """delta |W - A|^2."""
    return proximity * (frame - anchor).square().sum((-2, -1))


def _nearest(
    objective: Callable[..., Tensor],
    plain: Tensor,
    rows: Tensor,
    parameter: Tensor,
    pull: _Pull,
    *,
    like: Tensor,
    solver: StiefelSolver | None,
    adjoint: Adjoint | None,
) -> Tensor:
    """The frame of the minimizing rotation, which is looked for from the nearest ETF of ``plain``."""
    radius = etf_radius(like.shape[-2])
    with torch.no_grad(), full_precision(plain):
        near = nearest_etf(plain, weights=pull.weights, anchor=pull.anchor, proximity=float(pull.proximity))
        start = centered_basis_apply(near).mT / radius
    rotation = stiefel_argmin(
        objective, rows, parameter.to(rows.dtype), *pull, start=start, solver=solver, adjoint=adjoint
    )
    return etf_from_coordinates(rotation.mT).reshape(like.shape).to(like.dtype)


def _checked(means: Tensor) -> Tensor:
    """The means as a batch ``(B, K, d)`` in the working precision, after checks."""
    require_means(means)
    require_finite(means, "means hold NaN or infinity: look for an overflow in what produced them")
    return means.to(working_dtype(means.dtype)).reshape(-1, *means.shape[-2:])
