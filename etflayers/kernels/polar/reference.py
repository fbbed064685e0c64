r"""The nearest frame and its adjoint by products of matrices alone.

For M (K x d), M_c = CM its centered rows and c = sqrt(K/(K-1)), the frame is (see ``solvers.state``)

    W = c^2 T^+ M_c,        T = c (M_c M_c')^(1/2).

**Any rank, without a look.** A factorization on a GPU waits for the device, and so does a branch on a value.
Here everything is computed always. In float64 the Gram matrix of float32 data tells a singular value of 1e-6
of the largest, below which there is only rounding, from zero. So

1. Newton-Schulz on the Gram matrix brings all singular values above that cutoff near 1 and leaves the others
   near 0; a polynomial of the result is the projector P on those directions of the classes that are present.
2. W_1 = c^2 T^+ M_c on the present directions: W_1 W_1' = c^2 P.
3. On the absent ones any completion to a simplex is equally near. With a fixed matrix N_0 of generic entries,
   N = (C - P) N_0 (I - W_1'W_1 / c^2) has the rank that is missing, and W = W_1 + c polar(N). Where nothing
   is missing, this adds rounding.

**Precision.** float64, throughout: the Gram matrix squares the condition number kappa, and the error of W is
about 1e-16 kappa^2. GPUs for data centers have float64 tensor cores, on which a product takes the time of one
in float32.

**Adjoint.** For a cotangent (or tangent) G of W, with G_c = CG (see ``adjoints.nearest_frame``),

    X W + c^2 T^+ G_c (I - W'W / c^2),        T X + X T = G_c W' - W G_c',

where the entries of X between absent directions are zero: the minimum-norm derivative.

M <-> linear, M_c <-> rows, W <-> frame, T <-> root, c^2 T^+ <-> inverse, P <-> present, N_0 <-> generic,
G <-> direction, G_c W' <-> inner.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from etflayers.checks import require_values
from etflayers.errors import ConvergenceError
from etflayers.geometry import centered, centered_rows, etf_radius
from etflayers.kernels.polar.state import CUTOFF, FrameState, RootState
from etflayers.linalg.newton_schulz import add_product, indicator, inverse_root, refine
from etflayers.precision import smallest_divisor

__all__ = ["polar", "polar_adjoint"]

# Largest deviation of W W'/c^2 from C, relative to C, before the last step squares it.
TOLERANCE = 1e-4


def polar(linear: Tensor, precision: torch.dtype) -> RootState:
    """The frame for M, ``(..., K, d)``, in float64, any rank."""
    num_classes = linear.shape[-2]
    radius = etf_radius(num_classes)
    rows, scale = centered_rows(linear, torch.float64, precision=precision, exact_zeros=True)
    gram = rows @ rows.mT
    # No eigenvalue is larger than the Frobenius norm. The null direction 1 is filled with 1.
    floor = (smallest_divisor(precision) / CUTOFF) ** 2 if scale is None else torch.finfo(torch.float64).tiny
    norm = torch.linalg.matrix_norm(gram, keepdim=True)
    size = norm.clamp_min(floor)
    root, inverse = inverse_root(gram / size + 1 / num_classes, CUTOFF)
    present = indicator(inverse @ root)
    # In ZY the large entries of Z along absent directions have multiplied the rounding of Y, but only in the
    # rows of these directions: P'P is P without that error.
    present = present.mT @ present
    root, inverse = refine(root @ present, present @ inverse @ present)
    root, inverse = root * (radius * size.sqrt()), inverse * (radius * torch.where(norm > 0, size.rsqrt(), 0))
    frame = inverse @ rows
    frame = frame + _completion(frame, present)
    if scale is not None:
        root, inverse = root * scale, inverse / scale
    frame, distance = _polished(frame)
    _require_frame(distance <= TOLERANCE * math.sqrt(num_classes))
    return RootState(frame, inverse, root, precision)


def polar_adjoint(direction: Tensor, state: FrameState) -> Tensor:
    """dW for dM = ``direction``, in three products of the size of the frame."""
    direction, frame = direction.to(state.dtype), state.frame.to(state.dtype)
    num_classes, in_features = frame.shape[-2:]
    if in_features == 1:
        return torch.zeros_like(direction)  # two frames, -1 and 1, with nothing between them
    inner = centered(direction @ frame.mT)  # G_c W': of size K, where G is of size d
    left = state.solve_sylvester(inner - inner.mT, skew=True)
    if in_features == num_classes - 1:
        # I - W'W / c^2 vanishes: computing it would only add rounding, divided by tau.
        return left @ frame
    # Both terms that stand left of W in one matrix.
    left = torch.sub(left, state.pseudo_inverse(inner), alpha=1 - 1 / num_classes)
    return add_product(state.pseudo_inverse(direction), left, frame)


def _completion(frame: Tensor, present: Tensor) -> Tensor:
    """c polar(N), the rows that the frame lacks: rounding if it lacks none."""
    num_classes, in_features = frame.shape[-2:]
    square = num_classes / (num_classes - 1)
    identity = torch.eye(num_classes, dtype=frame.dtype, device=frame.device)
    absent = identity - present
    generic = _generic(num_classes, in_features, frame.device)
    overlap = generic @ frame.mT / square
    # N_0 (I - W_1'W_1 / c^2) N_0', whose norm is that of N_0 N_0' at most.
    gram = generic @ generic.mT
    size = torch.linalg.matrix_norm(gram)
    gram = absent @ (gram - square * (overlap @ overlap.mT)) @ absent
    # Wide random matrices are well-conditioned, square ones are not.
    smallest = 5e-3 if in_features >= 2 * num_classes else CUTOFF
    root, inverse = inverse_root(gram / size + present, smallest)
    _, inverse = refine(root, inverse)
    left = (square / size).sqrt() * (inverse @ absent)
    rows: Tensor = left @ (generic - overlap @ frame)
    return rows


def _generic(num_classes: int, in_features: int, device: torch.device) -> Tensor:
    """N_0: like random numbers in (-1/2, 1/2), with no structure that data share, the same on each call."""
    row = torch.arange(num_classes, device=device, dtype=torch.float64) + math.e
    column = torch.arange(in_features, device=device, dtype=torch.float64) + math.pi
    return torch.outer(row.square(), column.square()).frac() - 0.5


def _polished(frame: Tensor) -> tuple[Tensor, Tensor]:
    """W + (C - W W'/c^2) W / 2, off a simplex ETF by the square of what W is off; and how much that is."""
    num_classes = frame.shape[-2]
    error = frame @ frame.mT * (1 / num_classes - 1)
    error.diagonal(dim1=-2, dim2=-1).add_(1)
    distance = torch.linalg.matrix_norm(error - 1 / num_classes).amax() if frame.numel() else frame.sum()
    # The rows are centered: W'1 = 0, so that I serves for C.
    return frame + 0.5 * (error @ frame), distance


def _require_frame(condition: Tensor) -> None:
    require_values(
        condition,
        "the iteration for the nearest simplex ETF did not end at one: look for NaN, infinity or an overflow "
        "in the class means, or use solver=SVD()",
        ConvergenceError,
    )
