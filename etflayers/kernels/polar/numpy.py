r"""The nearest frame and its adjoint for few classes on a CPU, in NumPy.

At K = 10 arithmetic is a few percent of the time of an eager PyTorch operation, and a frame with its adjoint
takes about sixty of them; NumPy's cost a third. So the lines of ``solvers.gram`` and of
``reference.polar_adjoint`` stand here once more, for one matrix in float64, where PyTorch has nothing to
record: with M_c = CM,

    M_c M_c' + (g/2) 11'/(K-1) = V diag(v^2) V',    tau = c v,
    c^2 T^+ = C V diag(c/v) V',                     W = c^2 T^+ M_c,

g its first diagonal entry (which fills the null direction), and for a direction G

    (V [V'(S - S')V / (tau_i + tau_j)] V' - T^+ S) W + c^2 T^+ G,        S = C G W'.

M <-> linear, M_c <-> rows, V <-> basis, c v <-> values, 1/(tau_i + tau_j) <-> reciprocals, W <-> frame,
c^2 T^+ <-> inverse, G <-> direction, S <-> inner.
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
    """W, c^2 T^+, V and the reciprocals, and kappa: what a spectral state holds."""

    frame: Array
    inverse: Array
    basis: Array
    reciprocals: Array
    kappa: float


@np.errstate(over="ignore", invalid="ignore")
def small_polar(linear: Array, smallest: float) -> SmallPolar | None:
    """The frame for M, ``(K, d)``; ``None`` unless all singular values of M_c are above ``smallest``."""
    num_classes = linear.shape[0]
    radius = math.sqrt(num_classes / (num_classes - 1))
    rows = linear - np.add.reduce(linear, 0) * (1 / num_classes)
    gram = rows @ rows.T
    filling = gram[0, 0] * (0.5 / (num_classes - 1))
    if not math.isfinite(filling):
        return None
    eigenvalues, basis = np.linalg.eigh(gram + filling)
    if not eigenvalues[0] > smallest**2:
        return None
    values = np.sqrt(eigenvalues)
    inverse = (basis * (radius / values)) @ basis.T
    inverse -= np.add.reduce(inverse, 1)[:, None] * (1 / num_classes)
    kappa = float(values[-1] / values[0])
    values *= radius
    return SmallPolar(inverse @ rows, inverse, basis, 1 / (values[:, None] + values), kappa)


def small_polar_adjoint(
    direction: Array, frame: Array, inverse: Array, basis: Array, reciprocals: Array
) -> Array:
    """dW for dM = ``direction``, ``(K, d)``."""
    num_classes, in_features = frame.shape
    if in_features == 1:
        return np.zeros_like(direction)  # two frames, -1 and 1, with nothing between them
    inner = direction @ frame.T
    inner -= np.add.reduce(inner, 0) * (1 / num_classes)
    turned = basis.T @ (inner - inner.T) @ basis
    turned *= reciprocals
    left = basis @ turned @ basis.T
    if in_features == num_classes - 1:
        # I - W'W / c^2 vanishes: computing it would only add rounding, divided by tau.
        found: Array = left @ frame
        return found
    left -= (1 - 1 / num_classes) * (inverse @ inner)
    found = left @ frame
    found += inverse @ direction
    return found
