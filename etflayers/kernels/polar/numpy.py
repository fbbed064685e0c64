r"""The nearest frame and its adjoint for few classes on a CPU, in NumPy.

At K = 10 arithmetic is a few percent of the time of an eager PyTorch operation, and a frame with its adjoint
takes about sixty of them; NumPy's cost a third. So the formulas of ``solvers.gram`` and of
``reference.polar_adjoint`` stand here once more, in their fewest operations, for one matrix in float64, where
PyTorch has nothing to record. With M_c = CM and an eigenbasis V of what is orthogonal to 1,

    M_c M_c' = V diag(v^2) V',    tau = c v,    c^2 T^+ = V diag(c / v) V',    W = c^2 T^+ M_c,

and for a direction G, with Z = V'(G W')V,

    V [(Z - Z') / (tau_i + tau_j) - Z / tau_i] V' W + c^2 T^+ G.

V' maps 1 to zero, so that G is never centered. The null direction of the Gram matrix is its first
eigenvector, which rounding mixes with the next ones by eps kappa^2, the error of the eigenvalues.

M <-> linear, M_c <-> rows, V <-> basis, tau <-> values, W <-> frame, c^2 T^+ <-> inverse, G <-> direction,
Z <-> turned.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

__all__ = ["MOST_WORK", "SmallPolar", "small_polar", "small_polar_adjoint"]

# K K d up to which OpenBLAS takes one thread, whatever it is allowed: PyTorch's setting does not reach it.
MOST_WORK = 2**18


class SmallPolar(NamedTuple):
    """W, c^2 T^+, V ``(K, K-1)``, tau ``(K-1,)`` and kappa; all in float64."""

    frame: Array
    inverse: Array
    basis: Array
    values: Array
    kappa: float


@np.errstate(over="ignore", invalid="ignore")
def small_polar(linear: Array, smallest: float) -> SmallPolar | None:
    """The frame for M, ``(K, d)``; ``None`` unless all singular values of M_c are above ``smallest``."""
    num_classes = linear.shape[0]
    radius = math.sqrt(num_classes / (num_classes - 1))
    rows = linear - np.add.reduce(linear, 0) * (1 / num_classes)
    gram = rows @ rows.T
    # With the mean, NaN and infinity have come into every row.
    if not math.isfinite(gram[0, 0]):
        return None
    eigenvalues, basis = np.linalg.eigh(gram)
    least = float(eigenvalues[1])
    if not least > smallest**2:
        return None
    basis, values = basis[:, 1:], np.sqrt(eigenvalues[1:])
    inverse = (basis * (radius / values)) @ basis.T
    kappa = math.sqrt(float(eigenvalues[-1]) / least)
    return SmallPolar(inverse @ rows, inverse, basis, radius * values, kappa)


def small_polar_adjoint(direction: Array, solved: SmallPolar) -> Array:
    """dW for dM = ``direction``, ``(K, d)``."""
    frame, inverse, basis, values, _ = solved
    num_classes, in_features = frame.shape
    if in_features == 1:
        return np.zeros_like(direction)  # two frames, -1 and 1, with nothing between them
    column = values[:, None]
    turned = basis.T @ (direction @ frame.T) @ basis
    inner = (turned - turned.T) / (column + values)
    if in_features == num_classes - 1:
        # I - W'W / c^2 vanishes: computing it would only add rounding, divided by tau.
        found: Array = (basis @ inner @ basis.T) @ frame
        return found
    inner -= turned / column
    found = (basis @ inner @ basis.T) @ frame
    found += inverse @ direction
    return found
