r"""The simplex ETF nearest to class means in distances that have no closed form: Mahalanobis and Huber.

Every simplex ETF is W = c E'Q' with Q in St(d, K-1) (see ``geometry.frames``), so both are minimizations over
the Stiefel manifold. The plain nearest ETF is linear in Q: it does not care how long the means are, because
WW' is the same for every frame. Here the lengths matter. The means are compared with frames of their own
size r:

    minimize  sum_k rho(x_k / r - w_k - t)   over simplex ETFs W and translations t in R^d.

**Mahalanobis**, rho(u) = |L'u|^2: the best t is the mean of what it is subtracted from, so that with EX in
place of the means t disappears,

    f(Q) = |(EX / r - c Q') L|^2,       r = |EX| / sqrt(K),

r being the size that gives means and frame the same Frobenius norm. With L = I it is the plain problem.

**Huber**, rho(u) = |u|^2 / 2 up to |u| = delta and delta |u| - delta^2 / 2 beyond: a class far from its
vertex pulls with force delta, however far it is. The best t is a weighted mean of u_k = x_k / r - w_k with
weights min(1, delta / |u_k - t|), which depend on t; it is found by repeating that. The means are first
centered at their coordinatewise median, where the repetition starts, and r is the median distance from there:
a few corrupted means move neither. The solver starts from the nearest ETF of means clipped to the length r.

X <-> means or rows, EX / r <-> coordinates, L <-> factor, Q <-> rotation, r <-> size, c <-> radius,
delta <-> threshold, t <-> center, u_k - t <-> gap - center.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from etflayers.adjoints import Adjoint
from etflayers.checks import require, require_finite, require_floating, require_values
from etflayers.functional.nearest import nearest_etf, require_means
from etflayers.functional.stiefel import stiefel_argmin
from etflayers.geometry import centered_basis_adjoint, centered_basis_apply, etf_radius
from etflayers.precision import full_precision, working_dtype
from etflayers.solvers import StiefelSolver

__all__ = ["huber_nearest_etf", "mahalanobis_nearest_etf"]

# Each repetition brings the Huber center nearer by a factor of about the share of classes beyond delta.
_REWEIGHTINGS = 10


def mahalanobis_nearest_etf(
    means: Tensor,
    factor: Tensor,
    *,
    solver: StiefelSolver | None = None,
    adjoint: Adjoint | None = None,
) -> Tensor:
    r"""Minimize ``sum_k |L'(x_k / r - w_k - t)|^2`` over simplex ETFs W and translations t.

    The metric on features is A = LL'. Differentiable, to any order in reverse mode, in ``means`` and
    ``factor``. The solver starts from the plain nearest ETF; a local minimum is what it finds.

    Args:
        means: X, ``(..., K, d)`` with d >= K - 1, not all equal.
        factor: L, ``(d, m)``. With rank below d, many frames may be equally near.
        solver: see :func:`~etflayers.functional.stiefel_argmin`.
        adjoint: see :func:`~etflayers.functional.stiefel_argmin`.

    Returns:
        W, ``(..., K, d)``, unit rows.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, or means that all coincide.
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
    coordinates = centered_basis_apply(rows)
    size = torch.linalg.matrix_norm(coordinates, keepdim=True) / rows.shape[-2] ** 0.5
    coordinates = coordinates / _positive(size)
    return _nearest(_mahalanobis, rows, coordinates, factor, like=means, solver=solver, adjoint=adjoint)


def _mahalanobis(rotation: Tensor, coordinates: Tensor, factor: Tensor) -> Tensor:
    gap = coordinates - etf_radius(coordinates.shape[-2] + 1) * rotation.mT
    return (gap @ factor).square().sum((-2, -1))


def huber_nearest_etf(
    means: Tensor,
    *,
    threshold: float | Tensor = 0.25,
    solver: StiefelSolver | None = None,
    adjoint: Adjoint | None = None,
) -> Tensor:
    r"""Minimize the Huber loss ``sum_k rho(|x_k / r - w_k - t|)`` over simplex ETFs W and translations t.

    Grossly corrupted class means pull with a bounded force; means swapped with each other do so in the plain
    distance already, and gain nothing. Differentiable, to any order in
    reverse mode, in ``means`` and ``threshold``, but for means exactly at the threshold. What is found is a
    local minimum.

    Args:
        means: X, ``(..., K, d)`` with d >= K - 1, not all equal.
        threshold: delta > 0, a number or a scalar tensor, in units of the length of a frame vector.
        solver: see :func:`~etflayers.functional.stiefel_argmin`.
        adjoint: see :func:`~etflayers.functional.stiefel_argmin`.

    Returns:
        W, ``(..., K, d)``, unit rows.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, a threshold that is not positive, or means
            of which half coincide.
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
    delta = torch.as_tensor(threshold, dtype=rows.dtype, device=rows.device)
    require(delta.ndim == 0, f"threshold must be a number, got shape {tuple(delta.shape)}")
    require_values((delta > 0) & torch.isfinite(delta), "threshold must be a finite number > 0")
    median = rows.median(-2, keepdim=True).values
    size = torch.linalg.vector_norm(rows - median, dim=-1).median(-1).values[..., None, None]
    rows = (rows - median) / _positive(size)
    clipped = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(1)
    return _nearest(_huber, clipped, rows, delta, like=means, solver=solver, adjoint=adjoint)


def _huber(rotation: Tensor, rows: Tensor, delta: Tensor) -> Tensor:
    gap = rows - etf_radius(rows.shape[-2]) * centered_basis_adjoint(rotation.mT)
    center = torch.zeros_like(gap[..., :1, :])
    for _ in range(_REWEIGHTINGS):
        # A weight is delta / max(delta, |u|), with a root only where it can be differentiated.
        weights = delta * (gap - center).square().sum(-1, keepdim=True).clamp_min(delta.square()).rsqrt()
        center = (weights * gap).sum(-2, keepdim=True) / weights.sum(-2, keepdim=True)
    square = (gap - center).square().sum(-1)
    beyond = delta * square.clamp_min(delta.square()).sqrt() - delta.square() / 2
    return torch.where(square <= delta.square(), square / 2, beyond).sum(-1)


def _nearest(
    objective: Callable[..., Tensor],
    plain: Tensor,
    rows: Tensor,
    parameter: Tensor,
    *,
    like: Tensor,
    solver: StiefelSolver | None,
    adjoint: Adjoint | None,
) -> Tensor:
    """The frame of the minimizing rotation, which is looked for from the nearest ETF of ``plain``."""
    radius = etf_radius(like.shape[-2])
    with torch.no_grad(), full_precision(plain):
        start = centered_basis_apply(nearest_etf(plain)).mT / radius
    rotation = stiefel_argmin(
        objective, rows, parameter.to(rows.dtype), start=start, solver=solver, adjoint=adjoint
    )
    return (radius * centered_basis_adjoint(rotation.mT)).reshape(like.shape).to(like.dtype)


def _checked(means: Tensor) -> Tensor:
    """The means as a batch ``(B, K, d)`` in the working precision, after checks."""
    require_means(means)
    require_finite(means, "means hold NaN or infinity: look for an overflow in what produced them")
    return means.to(working_dtype(means.dtype)).reshape(-1, *means.shape[-2:])


def _positive(size: Tensor) -> Tensor:
    require_values(
        (size > 0).all(),
        "means must differ from each other, so that they have a size: leave out the classes that have not "
        "been seen",
    )
    return size
