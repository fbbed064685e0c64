r"""The two moments of a ReLU under a Gaussian that kernels of infinitely wide networks are made of.

**The moments** (arc-cosine kernels; Cho and Saul 2009). For (u, v) Gaussian of mean zero with variances a, b
and covariance c, and the angle t in [0, pi], ``cos t = c / sqrt(ab)``, ``s = sqrt(ab - c^2) = sqrt(ab) sin
t``,

    E[relu'(u) relu'(v)] = (pi - t) / 2 pi,      E[relu(u) relu(v)] = (s + c (pi - t)) / 2 pi.

**Where u and v are aligned,** s = 0 and both s and t have an infinite derivative in c. To leading order

    E[relu(u) relu(v)] = c/2 + O(t^3)   (t -> 0),      O((pi - t)^3)   (t -> pi):

its first two derivatives in the samples are those of ``max(c, 0) / 2``. ``(pi - t)/2pi`` is 1/2 minus a cone
in the distance of the samples, or 0 plus one. Where both samples are one (the diagonal of K(S, S)) they move
together, the cone stays at its tip, and the derivative is that of the constant. Where they only coincide, it
is the symmetric derivative, the mean of the two one-sided ones, which central differences find too. Without
biases the kernel is also a cone in a sample that vanishes. One hidden layer has a symmetric derivative there,
as if (pi - t)/2pi were 1/4; more layers have none, and what is returned for them is finite, no more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["relu_moments"]

# sin^2 of the angle is a difference of numbers with a rounding error of some eps: below this many, noise.
_ALIGNED = 64


def relu_moments(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """``E[relu'(u) relu'(v)]`` and ``E[relu(u) relu(v)]`` at variances a, b and covariance c.

    Args:
        a: the variance of u, of a shape that broadcasts to that of c.
        b: the variance of v, likewise.
        c: their covariance.

    Returns:
        Both moments, in the shape of c.

    Reference:
        Cho, Saul (2009), Kernel methods for deep learning, NeurIPS.

    >>> one = torch.ones(2)
    >>> relu_moments(one, one, torch.tensor([1.0, 0.0]))
    (tensor([0.5000, 0.2500]), tensor([0.5000, 0.1592]))
    """
    squared = a * b - c * c
    aligned = squared <= _ALIGNED * torch.finfo(c.dtype).eps * a * b
    s = torch.where(aligned, 1, squared).sqrt()  # 1: a derivative that is finite, where it is not used
    rest = torch.atan2(s, -c)  # pi - t, without a difference
    on_line = (1 + c.sign()) / 4  # 1/2 in one direction, 0 in opposite ones, 1/4 where one vanishes
    slopes = torch.where(aligned, on_line, rest / (2 * math.pi))
    products = torch.where(aligned, c * on_line, (s + c * rest) / (2 * math.pi))
    return slopes, products
