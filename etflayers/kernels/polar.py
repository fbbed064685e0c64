r"""The nearest frame and its adjoint without a factorization: by products, or by kernels for few classes.

For M (K x d), M_c = CM its centered rows and c = sqrt(K/(K-1)), the frame and its factors are (see
``solvers.polar``)

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

**Adjoint.** For a cotangent (or tangent) G of W, with G_c = CG (see ``adjoints.implicit``),

    X W + c^2 T^+ G_c (I - W'W / c^2),        T X + X T = G_c W' - W G_c',

where the entries of X between absent directions are zero: the minimum-norm derivative.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require_values
from etflayers.errors import ConvergenceError
from etflayers.kernels.dispatch import Call, Impl, register, use_triton
from etflayers.kernels.newton_schulz import indicator, inverse_root, refine, sylvester

__all__ = ["Polar", "absent_directions", "polar", "polar_adjoint", "solve_with_root"]

# Singular values below this, relative to the fourth root of the sum of their fourth powers, count as absent.
CUTOFF = 1e-6
# Below this a division overflows float32, as in solvers.polar.
_SMALLEST_DIVISOR = float(torch.finfo(torch.float32).tiny ** 0.75)
# Largest deviation of W W'/c^2 from C, relative to C, before the last step squares it.
TOLERANCE = 1e-4
LARGEST_FUSED = 32


class Polar(NamedTuple):
    """The maximizing frame and its factors.

    Attributes:
        frame: W, ``(..., K, d)``.
        inverse: c^2 T^+, ``(..., K, K)`` float64; along 1 it may hold anything.
        root: T, ``(..., K, K)`` float64; along 1 it may hold any positive number.
    """

    frame: Tensor
    inverse: Tensor
    root: Tensor


def _supports(call: Call) -> str | None:
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernel takes float32, float16 and bfloat16, not {call.dtype}"
    if call.num_classes > LARGEST_FUSED:
        return f"K = {call.num_classes} classes do not fit in one program (at most {LARGEST_FUSED})"
    return None


register("polar", _supports)


def polar(linear: Tensor, *, impl: Impl = "auto") -> Polar:
    """The simplex ETF that maximizes <W, M>, and its factors, without a look at a value; any rank.

    Args:
        linear: M, ``(..., K, d)`` with d >= K - 1, finite.
        impl: path, see :func:`~etflayers.kernels.describe`.

    Returns:
        W, c^2 T^+ and T, as constants; W in the dtype of the path: that of M (kernel) or float64 (reference).

    Raises:
        InvalidArgumentError: ``impl="triton"`` where it cannot run.
        ConvergenceError: W is not a simplex ETF (M is not finite); on a device an asynchronous assertion.

    >>> polar(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).frame
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """
    num_classes, in_features = linear.shape[-2:]
    batch = linear.shape[:-2].numel()
    # Where the iteration ends, its derivative is not yet that of the limit: polar_adjoint is.
    linear = linear.detach()
    if batch and use_triton(
        "polar", linear, num_classes=num_classes, in_features=in_features, batch=batch, impl=impl
    ):
        from etflayers.kernels.triton.polar import fused_polar

        flat = linear.reshape(batch, num_classes, in_features)
        frame, inverse, root = fused_polar(flat)
        square = (*linear.shape[:-1], num_classes)
        return Polar(frame.reshape(linear.shape), inverse.reshape(square), root.reshape(square))
    return _reference(linear)


def polar_adjoint(
    direction: Tensor, frame: Tensor, inverse: Tensor, root: Tensor, *, impl: Impl = "auto"
) -> Tensor:
    """dW for dM = ``direction``, which is also the cotangent of M for that of W: the map is self-adjoint.

    Args:
        direction: G, ``(..., K, d)``.
        frame: W, as :func:`polar` returns it or rounded to the dtype of the data.
        inverse: c^2 T^+, from :func:`polar`.
        root: T, from :func:`polar`.
        impl: path, see :func:`~etflayers.kernels.describe`.

    Returns:
        ``(..., K, d)``, float64 from the reference, in the dtype of G from the kernel.

    Raises:
        InvalidArgumentError: ``impl="triton"`` where it cannot run.

    >>> means = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> polar_adjoint(torch.tensor([[4.0, -3.0], [0.0, 0.0]]), *polar(means))
    tensor([[ 0.8000, -0.6000],
            [-0.8000,  0.6000]], dtype=torch.float64)
    """
    num_classes, in_features = direction.shape[-2:]
    batch = direction.shape[:-2].numel()
    if batch and use_triton(
        "polar", direction, num_classes=num_classes, in_features=in_features, batch=batch, impl=impl
    ):
        from etflayers.kernels.triton.polar import fused_polar_adjoint

        factors = (tensor.reshape(batch, num_classes, -1) for tensor in (direction, frame, inverse, root))
        result: Tensor = fused_polar_adjoint(*factors).reshape(direction.shape)
        return result
    return _reference_adjoint(direction, frame, inverse, root)


def _reference(linear: Tensor) -> Polar:
    num_classes = linear.shape[-2]
    radius = math.sqrt(num_classes / (num_classes - 1))
    rows, scale = _centered_rows(linear)
    gram = rows @ rows.mT
    # No eigenvalue is larger than the Frobenius norm. The null direction 1 is filled with 1.
    floor = (_SMALLEST_DIVISOR / CUTOFF) ** 2 if scale is None else torch.finfo(torch.float64).tiny
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
    return Polar(frame, inverse, root)


def _centered_rows(linear: Tensor) -> tuple[Tensor, Tensor | None]:
    """M_c in float64, divided by a scale (``None`` for 1) so that its Gram matrix is finite."""
    rows = linear.double()
    # Means that coincide have to give exact zeros.
    rows = rows - rows[..., :1, :]
    scale = None
    if linear.dtype == torch.float64:
        # No range to spare.
        scale = rows.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        rows = rows / scale
    return rows - rows.mean(-2, keepdim=True), scale


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


def _reference_adjoint(direction: Tensor, frame: Tensor, inverse: Tensor, root: Tensor) -> Tensor:
    num_classes, in_features = frame.shape[-2:]
    change, wide_frame = direction.to(root.dtype), frame.to(root.dtype)
    change = change - change.mean(-2, keepdim=True)
    inner = change @ wide_frame.mT
    left = solve_with_root(root, inner - inner.mT, absent_directions(inverse, root), skew=True)
    if in_features == num_classes - 1:
        # I - W'W / c^2 vanishes: computing it would only add rounding, divided by tau.
        return left @ wide_frame
    left = torch.sub(left, inverse @ inner, alpha=1 - 1 / num_classes)
    return left @ wide_frame + inverse @ change


def absent_directions(inverse: Tensor, root: Tensor) -> Tensor:
    """I - T T^+, the projector on the directions of the classes that the data do not determine."""
    num_classes = root.shape[-1]
    identity = torch.eye(num_classes, dtype=root.dtype, device=root.device)
    return identity - (1 - 1 / num_classes) * (inverse @ root)


def solve_with_root(root: Tensor, rhs: Tensor, absent: Tensor, *, skew: bool = False) -> Tensor:
    """X with T X + X T = S, zero between absent directions.

    Args:
        root: T, ``(..., K, K)``, from :func:`polar`.
        rhs: S, ``(..., K, K)``.
        absent: from :func:`absent_directions`.
        skew: whether S' = -S.

    Returns:
        ``(..., K, K)``.
    """
    # The iteration halves an entry between an absent direction and a present one, which has to be whole.
    left = absent @ rhs
    right = -left.mT if skew else rhs @ absent
    rhs = rhs + left + right - 3 * (left @ absent)
    floor = torch.finfo(root.dtype).tiny
    size = torch.linalg.matrix_norm(root, keepdim=True).clamp_min(floor)
    # The norm of T is its largest eigenvalue times K^(1/2) at most; half of the cutoff, because a value near
    # it may count as present.
    smallest = 0.5 * CUTOFF / root.shape[-1] ** 0.25
    solution = sylvester(root / size, rhs / size, smallest, skew=skew)
    # What rounding left between absent directions has grown by up to 1e8.
    return solution - absent @ solution @ absent
