r"""Functions of symmetric matrices by products alone, which read no value.

**The step.** A quintic p(x) = x q(x^2), q(t) = a + b t + c t^2, maps every singular value x towards 1. On the
square roots Y and inverse square roots Z of a Gram matrix G (Higham 2008, section 6.7), from Y = G, Z = I,

    T = Z Y,    Y <- Y q(T),    Z <- q(T) Z    gives    Y -> G^(1/2),    Z -> G^(-1/2),    T -> I,

in four products. Zero eigenvalues stay zero in Y and T, and finite in Z. ``solvers.newton_schulz`` takes
cubic steps, whose coefficients follow the spectrum at hand; here no value is read, and all is fixed
beforehand.

**The coefficients.** On [l, 1] the quintic nearest to 1 deviates by e(l) at four points, 1 among them.
Divided by 1 + e it maps [l, 1] into [l', 1], l' = (1 - e)/(1 + e), and such steps compose to the best
polynomial of their form (Amsel et al. 2025, arXiv 2505.16932). Far from 1, a step multiplies x by at most
4.3; the quintic for l = 0.05 by 4.06, and it leaves no value of [0.05, 1] below 0.2, where that for a smaller
l would push some of them down to l' and lose their digits. So every schedule repeats that one until the
smallest value is 0.05, and then takes the steps for 0.05, 0.20, 0.64 and 0.987; the last one is q(t) = (15 -
10 t + 3 t^2)/8, whose error is the cube of the error before it.

G <-> gram, Y <-> root, Z <-> inverse, T <-> product, (a, b, c) <-> coefficients, l <-> smallest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["LAST_STEPS", "add_product", "indicator", "inverse_root", "refine", "schedule"]

Coefficients = tuple[float, float, float]

_REPEATED_FROM = 0.05
_GROWTH = 4.05628225015014
_FAR: Coefficients = (_GROWTH, -11.023781555912132, 7.967499305761992)
# For l = 0.2014 and 0.6423; then [0.98697, 1] is left.
_NEAR: tuple[Coefficients, ...] = (
    (3.469142532223001, -7.101285212648466, 4.632142680425464),
    (2.331373186889744, -2.34440344972914, 1.0130302628393963),
)
# For l = 0.98697, to within 2e-7 of 1; then to within rounding.
LAST_STEPS: tuple[Coefficients, ...] = (
    (1.8873458077328427, -1.2748138516073202, 0.3874680438744776),
    (1.875, -1.25, 0.375),
)


def schedule(smallest: float) -> Iterator[Coefficients]:
    """The steps that bring all values of ``[smallest, 1]`` into [0.98697, 1]; ``refine`` does the rest."""
    repeats = math.ceil(max(0.0, math.log(_REPEATED_FROM / smallest) / math.log(_GROWTH)))
    yield from [_FAR] * (repeats + 1)
    yield from _NEAR


def inverse_root(gram: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Y and Z near G^(1/2) and G^(-1/2): the roots of the eigenvalues of ZY are within 0.013 of 1.

    Args:
        gram: G, ``(..., n, n)``, eigenvalues in [0, 1].
        smallest: root of the smallest eigenvalue that has to be brought near 1; smaller ones stay behind.
    """
    root, inverse = gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    product = gram
    for step, coefficients in enumerate(schedule(smallest)):
        if step > 0:
            product = inverse @ root
        root, inverse = _advance(root, inverse, product, coefficients)
    return root, inverse


def refine(root: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The last steps: from Y and Z of :func:`inverse_root` to all digits."""
    for coefficients in LAST_STEPS:
        root, inverse = _advance(root, inverse, inverse @ root, coefficients)
    return root, inverse


def _advance(
    root: Tensor, inverse: Tensor, product: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor]:
    a, b, c = coefficients
    rest = add_product(product, product, product, beta=b, alpha=c)
    return add_product(root, root, rest, beta=a), add_product(inverse, rest, inverse, beta=a)


def indicator(product: Tensor) -> Tensor:
    """The projector on the eigenvalues of T above 1/2, for T whose other eigenvalues are below 0.1."""
    for _ in range(4):
        # t -> 3 t^2 - 2 t^3 leaves 0, 1/2 and 1 where they are and squares the distance to 0 and 1.
        square = product @ product
        product = add_product(square, square, product, beta=3.0, alpha=-2.0)
    return product


def add_product(
    total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """beta total + alpha left @ right, in one launch for matrices and for batches of them."""
    if left.ndim == 2:
        return torch.addmm(total, left, right, beta=beta, alpha=alpha)
    if left.ndim == 3:
        return torch.baddbmm(total, left, right, beta=beta, alpha=alpha)
    return torch.add(beta * total, left @ right, alpha=alpha)
