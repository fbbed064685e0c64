r"""The simplex ETF nearest to class means, and the declarative node that computes it.

**The problem.** For class means X (K x d), weights omega_k >= 0 and an anchor A,

    minimize  sum_k omega_k |x_k - w_k - t|^2 + delta |W - A|^2   over unit-row simplex ETFs W and t in R^d.

**It is linear.** Put in the best t. The terms that are quadratic in W depend on W only through WW', which is
the same for every ETF, so what remains is: maximize <W, M> with

    M = diag(omega)(X - 1 x_omega') + delta A,      x_omega = sum_k omega_k x_k / sum_k omega_k.

**Closed form.** Every ETF is W = c E'R with R of orthonormal rows (see ``geometry.frames``), and <W, M> = c
<R, EM> is largest at the polar factor R of EM. Markou et al. (2024, arXiv 2411.01248) solve the same problem
by Riemannian trust regions; that method is the oracle of our tests. Theirs is the same problem for delta = 0
only: their proximal term holds a matrix of K orthonormal columns, one direction of which W does not show, and
measures its weight otherwise (``NearestETFHead.published`` converts it).

X <-> means, omega <-> weights, A <-> anchor, delta <-> proximity, M <-> linear, W <-> frame, R <-> factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.adjoints import Adjoint, FrameProblem, as_adjoint
from etflayers.checks import require, require_finite, require_floating, require_number, require_values
from etflayers.errors import InvalidArgumentError
from etflayers.geometry import centered_basis_apply, etf_radius, require_etf_dims
from etflayers.precision import full_precision, working_dtype
from etflayers.solvers import ByRegime, FrameSolver, StiefelSolver, as_frame_solver, rank_cutoff
from etflayers.status import Status

__all__ = ["NearestETFSolution", "frame_of", "linear_form", "nearest_etf", "solve_nearest_etf"]

_DEFAULT_SOLVER = ByRegime()


@dataclass(frozen=True)
class NearestETFSolution:
    """The nearest frame, how it was reached and how well it satisfies the optimality conditions.

    Attributes:
        frame: W, ``(..., K, d)``; NaN for the members of the batch whose input was not finite.
        codes: one :class:`~etflayers.status.Status` code for each member of the batch, ``(...)`` int64.
        spread: largest over smallest singular value of EM, ``(...)``: 1 at neural collapse, inf
            when they are rank-deficient.
        residual: ``(...)``, the larger of |RR' - I| / sqrt(K-1) (is it a frame?) and |BR' - RB'| / |B|
            (is it a critical point?), Frobenius norms.
    """

    frame: Tensor
    codes: Tensor
    spread: Tensor
    residual: Tensor

    @property
    def status(self) -> Status:
        """The worst status in the batch (waits for the device)."""
        return Status(int(self.codes.max())) if self.codes.numel() else Status.CONVERGED

    @property
    def message(self) -> str:
        """What the worst status means and what to do about it."""
        return self.status.message


def nearest_etf(
    means: Tensor,
    *,
    weights: Tensor | None = None,
    anchor: Tensor | None = None,
    proximity: float | Tensor = 0.0,
    solver: FrameSolver | StiefelSolver | None = None,
    adjoint: Adjoint | None = None,
) -> Tensor:
    r"""Minimize ``sum_k omega_k |x_k - w_k - t|^2 + delta |W - A|^2`` over simplex ETFs W and translations t.

    Differentiable, to any order and in both modes, in ``means``, ``weights``, ``anchor`` and ``proximity``.
    With ``proximity=0`` the answer depends neither on the scale of the means nor on a translation common to
    them. Rank-deficient means give one of the equally near frames and a finite, minimum-norm gradient.

    Args:
        means: X, ``(..., K, d)`` with d >= K - 1; batched over the leading dimensions.
        weights: omega >= 0, ``(..., K)``; default all ones. A class of weight zero is ignored.
        anchor: A, ``(..., K, d)``; needed when ``proximity`` is not zero.
        proximity: delta >= 0, a number or a tensor ``(...)``, in units of the (weighted) means.
        solver: how the polar factor is found; default :class:`~etflayers.solvers.ByRegime`. One for any
            objective on the Stiefel manifold (with a method ``minimize``) serves as well, in
            :class:`~etflayers.solvers.Iterative`.
        adjoint: how the gradient flows; default :class:`~etflayers.adjoints.Implicit`.

    Returns:
        W, ``(..., K, d)``, unit rows, in the dtype of ``means`` (half precision is computed in float32).

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, negative weights or proximity, a ``solver`` or
            an ``adjoint`` that is none.
        NonFiniteError: NaN or infinity in an input.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> means = torch.tensor([[3.0, 0.1], [-1.0, 2.0], [-2.0, -2.0]])
    >>> frame = nearest_etf(means)
    >>> (frame @ frame.T).round(decimals=4)
    tensor([[ 1.0000, -0.5000, -0.5000],
            [-0.5000,  1.0000, -0.5000],
            [-0.5000, -0.5000,  1.0000]])
    """
    linear = checked_linear_form(means, weights, anchor, proximity)
    require_finite(linear, f"means: {Status.NON_FINITE.message}")
    return frame_of(linear, solver=solver, adjoint=adjoint).to(means.dtype)


def frame_of(
    linear: Tensor,
    *,
    solver: FrameSolver | StiefelSolver | None = None,
    adjoint: Adjoint | None = None,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Maximize <W, M> over simplex ETFs W, by a differentiable function of M; no value is checked.

    Who has formed M himself calls this. A sum in which an anchor is much shorter than the means loses the
    anchor's digits to the means' rounding, and the condition number of M is then 1 / proximity: form it in
    float64 and say by ``precision`` what the data were, so that their rounding is told from their rank.

    Args:
        linear: M, ``(..., K, d)``, d >= K - 1, finite, float32 or float64.
        solver: as in :func:`nearest_etf`.
        adjoint: as in :func:`nearest_etf`.
        precision: of the data from which M was computed; ``None``: that of M.

    Returns:
        W, ``(..., K, d)``, in the dtype of M.

    Raises:
        InvalidArgumentError: a ``solver`` or an ``adjoint`` that is none.

    >>> frame_of(torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double(), precision=torch.float32)
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """
    problem = FrameProblem(linear, as_frame_solver(solver, _DEFAULT_SOLVER), precision)
    return as_adjoint(adjoint).attach(problem)


def solve_nearest_etf(
    means: Tensor,
    *,
    weights: Tensor | None = None,
    anchor: Tensor | None = None,
    proximity: float | Tensor = 0.0,
    solver: FrameSolver | StiefelSolver | None = None,
    adjoint: Adjoint | None = None,
) -> NearestETFSolution:
    """The frame of :func:`nearest_etf` with a status for each member of the batch instead of an exception.

    Args:
        means: as in :func:`nearest_etf`.
        weights: as in :func:`nearest_etf`.
        anchor: as in :func:`nearest_etf`.
        proximity: as in :func:`nearest_etf`.
        solver: as in :func:`nearest_etf`.
        adjoint: as in :func:`nearest_etf`.

    Returns:
        The solution record; its ``frame`` is differentiable, its diagnostics are not.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, negative weights or proximity, a ``solver`` or
            an ``adjoint`` that is none.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> solve_nearest_etf(torch.eye(3)).status
    <Status.CONVERGED: 0>
    >>> solve_nearest_etf(torch.zeros(3, 3)).status
    <Status.RANK_DEFICIENT: 1>
    """
    linear = checked_linear_form(means, weights, anchor, proximity)
    finite = torch.isfinite(linear).all(-1).all(-1)
    linear = torch.where(finite[..., None, None], linear, 0)
    frame = frame_of(linear, solver=solver, adjoint=adjoint)

    # The diagnostics do not trust the solver: they are computed anew, in float64.
    with torch.no_grad(), full_precision(linear):
        singular_values = torch.linalg.svdvals(centered_basis_apply(linear.double()))
        cutoff = rank_cutoff(singular_values, linear.shape[-1], linear.dtype).squeeze(-1)
        largest, smallest = singular_values[..., 0], singular_values[..., -1]
        deficient = smallest <= cutoff
        codes = torch.where(finite, deficient.long() * Status.RANK_DEFICIENT, int(Status.NON_FINITE))
        spread = torch.where(deficient, torch.inf, largest / torch.where(deficient, 1, smallest))
        residual = _residual(frame.double(), linear.double())
    nan = torch.nan
    return NearestETFSolution(
        frame=torch.where(finite[..., None, None], frame, nan).to(means.dtype),
        codes=codes,
        spread=torch.where(finite, spread, nan),
        residual=torch.where(finite, residual, nan),
    )


def _residual(frame: Tensor, linear: Tensor) -> Tensor:
    factor = centered_basis_apply(frame) / etf_radius(frame.shape[-2])
    b = centered_basis_apply(linear)
    identity = torch.eye(factor.shape[-2], dtype=factor.dtype, device=factor.device)
    feasibility = torch.linalg.matrix_norm(factor @ factor.mT - identity) / factor.shape[-2] ** 0.5
    inner = b @ factor.mT
    norm = torch.linalg.matrix_norm(b)
    symmetry = torch.linalg.matrix_norm(inner - inner.mT) / torch.where(norm > 0, norm, 1)
    return torch.maximum(feasibility, symmetry)


def linear_form(
    means: Tensor,
    weights: Tensor | None = None,
    anchor: Tensor | None = None,
    proximity: float | Tensor = 0.0,
) -> Tensor:
    """M of the derivation at the head of this module, for :func:`frame_of`; no argument is checked.

    Args:
        means: X, ``(..., K, d)``.
        weights: omega, ``(..., K)``; default all ones.
        anchor: A, ``(..., K, d)``; default none.
        proximity: delta, a number or a tensor ``(...)``.

    Returns:
        M, ``(..., K, d)``, in the dtype of the means.

    >>> linear_form(torch.eye(2), torch.ones(2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 0.5)
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """
    linear = means if weights is None else _weighted(means, weights.to(means.dtype))
    if anchor is None:
        return linear
    pull = proximity[..., None, None].to(means.dtype) if isinstance(proximity, Tensor) else proximity
    return linear + pull * anchor.to(means.dtype)


def checked_linear_form(
    means: Tensor, weights: Tensor | None, anchor: Tensor | None, proximity: float | Tensor
) -> Tensor:
    """M in the working precision, after checking every argument."""
    require_means(means)
    check_pull(means, weights, anchor, proximity)
    return linear_form(means.to(working_dtype(means.dtype)), weights, anchor, proximity)


def require_means(means: Tensor) -> None:
    """Raise unless ``means`` are floating point, ``(..., K, d)`` with d >= K - 1."""
    require_floating("means", means.dtype)
    if means.ndim < 2:
        raise InvalidArgumentError(
            "means must have shape (..., num_classes, in_features), one row for each class, "
            f"got {tuple(means.shape)}"
        )
    require_etf_dims(means.shape[-2], means.shape[-1])


def _weighted(means: Tensor, weights: Tensor) -> Tensor:
    # Subtracting one row first keeps a large common mean from cancelling in float32.
    rows = means - means[..., :1, :]
    column = weights.unsqueeze(-1)
    total = weights.sum(-1, keepdim=True).unsqueeze(-1)
    total = torch.where(total > 0, total, 1)
    return column * (rows - (column * rows).sum(-2, keepdim=True) / total)


def check_pull(
    means: Tensor, weights: Tensor | None, anchor: Tensor | None, proximity: float | Tensor
) -> None:
    """Raise unless weights, anchor and proximity, as far as they are given, fit the means and each other."""
    if weights is not None:
        _check_weights(weights, means)
    if anchor is not None:
        _check_anchor(anchor, means)
        _check_proximity(proximity)
    elif isinstance(proximity, Tensor) or proximity != 0:
        raise InvalidArgumentError(
            f"anchor is needed with proximity={proximity}: pass the frame to stay near to, or proximity=0"
        )


def _check_weights(weights: Tensor, means: Tensor) -> None:
    require_floating("weights", weights.dtype)
    require(
        weights.ndim >= 1 and weights.shape[-1] == means.shape[-2],
        f"weights must have shape (..., num_classes) = (..., {means.shape[-2]}), got {tuple(weights.shape)}",
    )
    require_values(
        (weights.detach() >= 0).all(), "weights must not be negative or NaN: one weight >= 0 for each class"
    )


def _check_anchor(anchor: Tensor, means: Tensor) -> None:
    require_floating("anchor", anchor.dtype)
    require(
        anchor.shape[-2:] == means.shape[-2:],
        f"anchor must have shape (..., num_classes, in_features) = (..., {means.shape[-2]}, "
        f"{means.shape[-1]}), got {tuple(anchor.shape)}",
    )


def _check_proximity(proximity: float | Tensor) -> None:
    if isinstance(proximity, Tensor):
        require_floating("proximity", proximity.dtype)
        require_values((proximity.detach() >= 0).all(), "proximity must not be negative or NaN")
    else:
        require_number("proximity", proximity)
