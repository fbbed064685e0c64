r"""Kernels of a fully connected ReLU network whose hidden layers are infinitely wide.

**The network.** ``h_0 = s_w W_0 x / sqrt(p) + s_b b_0`` and ``h_l = s_w W_l relu(h_(l-1)) / sqrt(width) + s_b
b_l`` up to ``h_L``, the output, where all entries of W and b are drawn from N(0, 1). As the widths grow, each
h_l becomes a Gaussian process, with independent entries of covariance K_l (Lee et al. 2018, arXiv
1711.00165),

    K_0(x, y) = s_w^2 <x, y> / p + s_b^2,      K_l = s_w^2 E[relu(u) relu(v)] + s_b^2,

(u, v) Gaussian with the covariance that K_(l-1) gives to x and y. Trained by gradient flow, the network
follows the kernel of its tangents, ``T(x, y) = <df(x)/dtheta, df(y)/dtheta>`` (Jacot et al. 2018, arXiv
1806.07572). The parameters of layer l add K_l; those before it pass through relu', so that

    T_0 = K_0,      T_l = K_l + s_w^2 E[relu'(u) relu'(v)] T_(l-1).

**The two moments** (arc-cosine kernels; Cho and Saul 2009). With variances a, b, covariance c, and the angle
t in [0, pi], ``cos t = c / sqrt(ab)``, ``s = sqrt(ab - c^2) = sqrt(ab) sin t``,

    E[relu'(u) relu'(v)] = (pi - t) / 2 pi,      E[relu(u) relu(v)] = (s + c (pi - t)) / 2 pi.

**Where the samples are aligned,** s = 0 and both s and t have an infinite derivative in c. To leading order

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
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.checks import require, require_number
from etflayers.distill.kernels import sample_rows
from etflayers.precision import full_precision

__all__ = ["NNGPKernel", "NTKKernel"]

# sin^2 of the angle is a difference of numbers with a rounding error of some eps: below this many, noise.
_ALIGNED = 64


@dataclass(frozen=True)
class _ReLUNetwork:
    """The architecture, and the recursion over its layers that both kernels run."""

    depth: int = 1
    weight_variance: float = 2.0
    bias_variance: float = 0.0

    def __post_init__(self) -> None:
        require(
            self.depth >= 1,
            f"depth must be at least one hidden layer, got {self.depth}: LinearKernel is the kernel of none",
        )
        require_number("weight_variance", self.weight_variance, positive=True)
        require_number("bias_variance", self.bias_variance)

    def _layers(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """``(K_l, s_w^2 E[relu'(u) relu'(v)])`` for l = 0 to L; the second of the first is zero."""
        x, y = sample_rows(x, y)
        scale = self.weight_variance / x.shape[1]
        a = (scale * (x * x).sum(-1) + self.bias_variance)[:, None]
        b = scale * (y * y).sum(-1) + self.bias_variance
        c = scale * (x @ y.mT) + self.bias_variance
        yield c, torch.zeros_like(c)
        for _ in range(self.depth):
            slopes, products = _relu_moments(a, b, c)
            c = self.weight_variance * products + self.bias_variance
            yield c, self.weight_variance * slopes
            a, b = (self.weight_variance / 2 * variance + self.bias_variance for variance in (a, b))


@dataclass(frozen=True)
class NNGPKernel(_ReLUNetwork):
    r"""The covariance of the output of an infinitely wide ReLU network at initialization, ``E[f(x) f(y)]``.

    Regression with it is what training the last layer alone does.

    Args:
        depth: L >= 1, the number of hidden layers.
        weight_variance: s_w^2 > 0, times 1 over the width that a layer sees; 2 keeps the variance of the
            samples from layer to layer.
        bias_variance: s_b^2 >= 0. At 0 the kernel is homogeneous: it scales with the samples.

    Raises:
        InvalidArgumentError: arguments out of range; when called, samples that do not fit.

    Reference:
        Lee, Bahri, Novak, Schoenholz, Pennington, Sohl-Dickstein (2018), arXiv 1711.00165.

    >>> NNGPKernel(depth=3)(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([[1.0000, 0.6048]])
    """

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """K(x_i, y_j), ``(n, m)``."""
        with full_precision(x):
            *_, (covariance, _) = self._layers(x, y)
            return covariance


@dataclass(frozen=True)
class NTKKernel(_ReLUNetwork):
    r"""The tangent kernel ``<df(x)/dtheta, df(y)/dtheta>`` of an infinitely wide ReLU network.

    Regression with it is what training all of the network to convergence does.

    Args:
        depth: L >= 1, the number of hidden layers.
        weight_variance: s_w^2 > 0, times 1 over the width that a layer sees; 2 keeps the variance of the
            samples from layer to layer.
        bias_variance: s_b^2 >= 0. At 0 the kernel is homogeneous: it scales with the samples.

    Raises:
        InvalidArgumentError: arguments out of range; when called, samples that do not fit.

    Reference:
        Jacot, Gabriel, Hongler (2018), arXiv 1806.07572; Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein,
        Pennington (2019), arXiv 1902.06720.

    >>> NTKKernel(depth=1)(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([[2.0000, 0.3183]])
    """

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """K(x_i, y_j), ``(n, m)``."""
        with full_precision(x):
            tangents = torch.zeros((), dtype=x.dtype, device=x.device)
            for covariance, slopes in self._layers(x, y):
                tangents = covariance + slopes * tangents
            return tangents


def _relu_moments(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """``E[relu'(u) relu'(v)]`` and ``E[relu(u) relu(v)]`` at variances a, b and covariance c."""
    squared = a * b - c * c
    aligned = squared <= _ALIGNED * torch.finfo(c.dtype).eps * a * b
    s = torch.where(aligned, 1, squared).sqrt()  # 1: a derivative that is finite, where it is not used
    rest = torch.atan2(s, -c)  # pi - t, without a difference
    on_line = (1 + c.sign()) / 4  # 1/2 in one direction, 0 in opposite ones, 1/4 where one vanishes
    slopes = torch.where(aligned, on_line, rest / (2 * math.pi))
    products = torch.where(aligned, c * on_line, (s + c * rest) / (2 * math.pi))
    return slopes, products
