r"""Functions of symmetric matrices by products alone, which read no value.

**The step.** A quintic p(x) = x q(x^2), q(t) = a + b t + c t^2, maps every singular value x towards 1. On the
square roots Y and inverse square roots Z of a Gram matrix G (Higham 2008, section 6.7), from Y = G, Z = I,

    T = Z Y,    Y <- Y q(T),    Z <- q(T) Z    gives    Y -> G^(1/2),    Z -> G^(-1/2),    T -> I,

in four products. Zero eigenvalues stay zero in Y and T, and finite in Z.

**The coefficients.** On [l, 1] the quintic nearest to 1 deviates by e(l) at four points, 1 among them.
Divided by 1 + e it maps [l, 1] into [l', 1], l' = (1 - e)/(1 + e), and such steps compose to the best
polynomial of their form (Amsel et al. 2025, arXiv 2505.16932). Far from 1, a step multiplies x by at most
4.3; the quintic for l = 0.05 by 4.06, and it leaves no value of [0.05, 1] below 0.2, where that for a smaller
l would push some of them down to l' and lose their digits. So every schedule repeats that one until the
smallest value is 0.05, and then takes the steps for 0.05, 0.20, 0.64 and 0.987; the last one is q(t) = (15 -
10 t + 3 t^2)/8, whose error is the cube of the error before it.

**The Sylvester equation** T X + X T = S for T = T' > 0 comes from the same steps (Roberts 1980):

    sign [[T, S], [0, -T]] = [[I, 2X], [0, -I]].

A step keeps the form of the block matrix: with A = T^2 and D = TS - ST,

    T <- T q(A),    S <- T (b D + c (AD + DA)) + S q(A),

where ST = -(TS)' and DA = (AD)' are free if S is skew, which leaves seven products. Three products of the
whole block matrix are 3.4 times as many operations, and faster for small ones, which only wait for launches.
Zero eigenvalues of T: an entry of S between two of them grows without bound and has to be removed; one
between a zero and a positive one converges to half of what it should be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["indicator", "inverse_root", "refine", "schedule", "sylvester"]

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
_LAST: tuple[Coefficients, ...] = (
    (1.8873458077328427, -1.2748138516073202, 0.3874680438744776),
    (1.875, -1.25, 0.375),
)

# Up to this size a product takes about as long as its launch.
_LAUNCHES_COUNT = 128


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
    for coefficients in _LAST:
        root, inverse = _advance(root, inverse, inverse @ root, coefficients)
    return root, inverse


def _advance(
    root: Tensor, inverse: Tensor, product: Tensor, coefficients: Coefficients
) -> tuple[Tensor, Tensor]:
    a, b, c = coefficients
    rest = _add_product(product, product, product, beta=b, alpha=c)
    return _add_product(root, root, rest, beta=a), _add_product(inverse, rest, inverse, beta=a)


def indicator(product: Tensor) -> Tensor:
    """The projector on the eigenvalues of T above 1/2, for T whose other eigenvalues are below 0.1."""
    for _ in range(4):
        # t -> 3 t^2 - 2 t^3 leaves 0, 1/2 and 1 where they are and squares the distance to 0 and 1.
        square = product @ product
        product = _add_product(square, square, product, beta=3.0, alpha=-2.0)
    return product


def sylvester(root: Tensor, rhs: Tensor, smallest: float, *, skew: bool = False) -> Tensor:
    """X with T X + X T = S.

    Args:
        root: T, ``(..., n, n)``, symmetric, eigenvalues in [0, 1].
        rhs: S, ``(..., n, n)``, zero between eigenvectors of T of eigenvalue zero.
        smallest: the smallest eigenvalue of T that is not zero.
        skew: whether S' = -S, which saves two of nine products of large matrices.

    Returns:
        ``(..., n, n)``.
    """
    steps = (*schedule(smallest), *_LAST)
    num_rows = root.shape[-1]
    if num_rows <= _LAUNCHES_COUNT:
        zero = torch.zeros_like(root)
        block = torch.cat((torch.cat((root, rhs), -1), torch.cat((zero, -root), -1)), -2)
        for a, b, c in steps:
            square = block @ block
            rest = _add_product(square, square, square, beta=b, alpha=c)
            block = _add_product(block, block, rest, beta=a)
        return block[..., :num_rows, num_rows:] / 2
    for a, b, c in steps:
        square = root @ root
        rest = _add_product(square, square, square, beta=b, alpha=c)
        left = root @ rhs
        if skew:
            change = left + left.mT
            change = _add_product(change, square, change, beta=b / 2, alpha=c)
            change = change + change.mT
        else:
            change = _add_product(left, rhs, root, alpha=-1.0)
            change = _add_product(b * change, square, change, alpha=c) + c * (change @ square)
        rhs = _add_product(_add_product(rhs, rhs, rest, beta=a), root, change)
        root = _add_product(root, root, rest, beta=a)
    return rhs / 2


def _add_product(
    total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """beta total + alpha left @ right, in one launch for matrices and for batches of them."""
    if left.ndim == 2:
        return torch.addmm(total, left, right, beta=beta, alpha=alpha)
    if left.ndim == 3:
        return torch.baddbmm(total, left, right, beta=beta, alpha=alpha)
    return torch.add(beta * total, left @ right, alpha=alpha)
