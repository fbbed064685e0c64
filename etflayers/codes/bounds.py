r"""How small the largest cosine between K unit vectors in R^d can be at best.

**Signed, not absolute.** Equiangular frames (and Welch's bound, which they meet) make the largest *absolute*
cosine small. A logit is a signed cosine: a word at -1 is as far from another one as can be and disturbs
nobody. For d + 1 < K <= 2 d the orthoplex has no positive cosine at all, while an equiangular frame of that
size has positive ones, so the orthoplex is better for classification than every such frame. Only
:func:`welch_bound` speaks of the absolute cosine.

**Levenshtein's bound.** With the Gegenbauer polynomials P_k of R^d, P_k(1) = 1, a code whose cosines are at
most s has no more words than

    L_{2k-1}(s) = C(k+d-3, k-1) ((2k+d-3)/(d-1) - (P_{k-1} - P_k) / ((1-s) P_k)),
    L_{2k}(s)   = C(k+d-2, k) ((2k+d-1)/(d-1) - (1+s) (P_k - P_{k+1}) / ((1-s) (P_k + P_{k+1}))),

the polynomials taken at s. L_m holds for s between the largest zeros of two Jacobi polynomials, t_{k-1}^{1,1}
<= s <= t_k^{1,0} for m = 2k - 1 and t_k^{1,0} <= s <= t_k^{1,1} for m = 2k, where t_k^{a,b} is that of degree
k with exponents (d-3)/2 + a and (d-3)/2 + b. Together the L_m are one increasing continuous function of s,
and at the ends of the intervals it has the sizes that the bound of Delsarte, Goethals and Seidel gives to
designs of strength m,

    R_{2k-1} = 2 C(d+k-2, d-1),    R_{2k} = C(d+k-1, d-1) + C(d+k-2, d-1).

So K tells m, and bisection tells s.

Symbols: K <-> num_classes, d <-> dimension, m <-> strength, k <-> degree, s <-> the value returned.
"""

from __future__ import annotations

import math

import torch

from etflayers.checks import require_size

__all__ = ["coherence_bound", "levenshtein_bound", "rankin_bound", "welch_bound"]

# Beyond, the eigenproblem for the zeros would take seconds; a bound for fewer words holds for more.
_LARGEST_DEGREE = 300


def coherence_bound(num_classes: int, dimension: int) -> float:
    """The best lower bound known here on the largest cosine between two of K unit vectors in R^d.

    The larger one of :func:`rankin_bound` and :func:`levenshtein_bound`: exact for K <= 2 d, and for some
    famous codes beyond.

    Args:
        num_classes: K >= 2.
        dimension: d >= 1; for d = 1 there are two unit vectors, and the bound for K > 2 is 1.

    Returns:
        A number in [-1, 1].

    >>> coherence_bound(5, 3), round(coherence_bound(12, 3), 6)
    (0.0, 0.447214)
    """
    return max(rankin_bound(num_classes, dimension), levenshtein_bound(num_classes, dimension))


def rankin_bound(num_classes: int, dimension: int) -> float:
    """Rankin's lower bound on the largest cosine: ``-1/(K-1)`` for K <= d + 1, and 0 for more vectors.

    The simplex and, up to K = 2 d, the orthoplex attain it.

    Args:
        num_classes: K >= 2.
        dimension: d >= 1.

    Returns:
        A number in [-1, 0].

    Reference:
        Rankin (1955), The closest packing of spherical caps in n dimensions.

    >>> rankin_bound(3, 2), rankin_bound(4, 2)
    (-0.5, 0.0)
    """
    _require_sizes(num_classes, dimension)
    return -1 / (num_classes - 1) if num_classes <= dimension + 1 else 0.0


def welch_bound(num_classes: int, dimension: int, *, order: int = 1) -> float:
    r"""Welch's lower bound on the largest *absolute* cosine: ``sqrt((K - d) / (d (K - 1)))`` for order 1.

    The mean over all pairs of ``<w_i, w_j>^{2q}`` is at least ``1 3 ... (2q-1) / (d (d+2) ... (d+2q-2))``;
    the K pairs of a vector with itself have 1, and the largest of the others is at least their mean.

    It says nothing about the largest signed cosine, the one that counts in classification.

    Args:
        num_classes: K >= 2.
        dimension: d >= 1.
        order: q >= 1; a higher one is better for many vectors.

    Returns:
        A number in [0, 1], 0 where the inequality says nothing.

    Reference:
        Welch (1974), Lower bounds on the maximum cross correlation of signals.

    >>> round(welch_bound(6, 3), 6)  # the six diagonals of the icosahedron attain it
    0.447214
    """
    _require_sizes(num_classes, dimension)
    require_size("order", order)
    mean = math.prod((2 * q + 1) / (dimension + 2 * q) for q in range(order))
    others = (num_classes * mean - 1) / (num_classes - 1)
    return float(min(max(others, 0.0), 1.0) ** (1 / (2 * order)))


def levenshtein_bound(num_classes: int, dimension: int) -> float:
    """Levenshtein's lower bound on the largest cosine: the s at which his upper bound on the size is K.

    Args:
        num_classes: K >= 2.
        dimension: d >= 1.

    Returns:
        A number in [-1, 1], with an error below 1e-9.

    Reference:
        Levenshtein (1998), Universal bounds for codes and designs, Handbook of Coding Theory, chapter 6.

    >>> round(levenshtein_bound(240, 8), 6), round(levenshtein_bound(196560, 24), 6)  # E8 and Leech attain it
    (0.5, 0.5)
    """
    _require_sizes(num_classes, dimension)
    if dimension == 1:
        return -1.0 if num_classes == 2 else 1.0
    if dimension == 2:
        return math.cos(2 * math.pi / num_classes)  # what the formulas give, without a degree of K / 2
    strength = 1
    while num_classes > _design_size(dimension, strength + 1):
        strength += 1
        if strength == 2 * _LARGEST_DEGREE:
            return _interval_end(dimension, strength)
    low, high = _interval_end(dimension, strength - 1), _interval_end(dimension, strength)
    for _ in range(60):
        middle = (low + high) / 2
        if _levenshtein_size(dimension, strength, middle) < num_classes:
            low = middle
        else:
            high = middle
    return low


def _require_sizes(num_classes: int, dimension: int) -> None:
    require_size("num_classes", num_classes, at_least=2)
    require_size("dimension", dimension)


def _design_size(dimension: int, strength: int) -> int:
    """R_m, the least size of a spherical design of strength m."""
    even = math.comb(dimension + strength // 2 - 1, dimension - 1)
    return even + math.comb(dimension + (strength - 1) // 2 - 1, dimension - 1)


def _levenshtein_size(dimension: int, strength: int, s: float) -> float:
    """L_m(s)."""
    d, k = dimension, (strength + 1) // 2
    p = _gegenbauer(d, k + 1, s)
    if strength % 2:
        ratio = (p[k - 1] - p[k]) / ((1 - s) * p[k])
        return math.comb(k + d - 3, k - 1) * ((2 * k + d - 3) / (d - 1) - ratio)
    ratio = (1 + s) * (p[k] - p[k + 1]) / ((1 - s) * (p[k] + p[k + 1]))
    return math.comb(k + d - 2, k) * ((2 * k + d - 1) / (d - 1) - ratio)


def _gegenbauer(dimension: int, degree: int, s: float) -> list[float]:
    """P_0(s), ..., P_degree(s), orthogonal on the sphere in R^d and 1 at s = 1."""
    values = [1.0, s]
    for k in range(1, degree):
        both = (2 * k + dimension - 2) * s * values[k] - k * values[k - 1]
        values.append(both / (k + dimension - 2))
    return values


def _interval_end(dimension: int, strength: int) -> float:
    """The largest s for which L_m is the bound: a zero of a Jacobi polynomial, by Golub and Welsch."""
    degree = (strength + 1) // 2
    if degree == 0:
        return -1.0
    a = (dimension - 1) / 2
    b = a - strength % 2
    k = torch.arange(degree, dtype=torch.float64, device="cpu")  # whatever the default device is
    both = 2 * k + a + b
    # For a = b the first entry is 0 / 0, and a + b > 0 in three dimensions and more.
    diagonal = (b * b - a * a) / (both * (both + 2))
    k, both = k[1:], both[1:]
    squares = 4 * k * (k + a) * (k + b) * (k + a + b) / (both**2 * (both + 1) * (both - 1))
    matrix = torch.diag(diagonal) + torch.diag(squares.sqrt(), 1) + torch.diag(squares.sqrt(), -1)
    return float(torch.linalg.eigvalsh(matrix)[-1])
