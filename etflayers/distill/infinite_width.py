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

The two moments, and their derivatives where samples are aligned, are in :mod:`etflayers.distill.arc_cosine`.

**The standard parametrization** (Sohl-Dickstein et al. 2020, arXiv 2001.07301) is that of frameworks: entries
of W_l are drawn from N(0, s_w^2 / n_l), n_l inputs of the layer, and W_l itself is trained. So that its
tangents stay finite, the layers of a base network of width N are made r times as wide and read ``h_l = W_l
relu(h_(l-1)) / sqrt(r) + b_l`` with W_l as of N inputs; r then goes to infinity, N stays. The outputs are
drawn as before, K_l is the same. A derivative by W_l no longer carries s_w / sqrt(n_l), one by b_l no longer
s_b:

    T_0 = <x, y> + 1,      T_l = N E[relu(u) relu(v)] + 1 + s_w^2 E[relu'(u) relu'(v)] T_(l-1).

Against the other, layers count by the number of their inputs, and biases are trained also where they start at
zero (s_b = 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from etflayers.checks import require, require_number, require_size
from etflayers.distill.arc_cosine import relu_moments
from etflayers.distill.kernels import sample_rows
from etflayers.precision import full_precision

__all__ = ["NNGPKernel", "NTKKernel", "Parametrization", "check_parametrization"]

Parametrization = Literal["ntk", "standard"]
_PARAMETRIZATIONS = ("ntk", "standard")


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

    def _layers(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The mean product of what layer l is given, K_l, and ``s_w^2 E[relu'(u) relu'(v)]``, l = 0 to L.

        The third is zero for l = 0.
        """
        scale = self.weight_variance / x.shape[1]
        a = (scale * (x * x).sum(-1) + self.bias_variance)[:, None]
        b = scale * (y * y).sum(-1) + self.bias_variance
        inner = x @ y.mT
        c = scale * inner + self.bias_variance
        yield inner / x.shape[1], c, torch.zeros_like(c)
        for _ in range(self.depth):
            slopes, products = relu_moments(a, b, c)
            c = self.weight_variance * products + self.bias_variance
            yield products, c, self.weight_variance * slopes
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
            *_, (_, covariance, _) = self._layers(*sample_rows(x, y))
            return covariance


@dataclass(frozen=True)
class NTKKernel(_ReLUNetwork):
    r"""The tangent kernel ``<df(x)/dtheta, df(y)/dtheta>`` of an infinitely wide ReLU network.

    Regression with it is what training all of the network to convergence does.

    Args:
        depth: L >= 1, the number of hidden layers.
        weight_variance: s_w^2 > 0, times 1 over the width that a layer sees; 2 keeps the variance of the
            samples from layer to layer.
        bias_variance: s_b^2 >= 0. At 0 the kernel is homogeneous in the parametrization ``"ntk"``: it scales
            with the samples.
        parametrization: ``"ntk"``, where the parameters are standard normal and their scales stand in front
            of them, or ``"standard"``, where they are trained as they are drawn, as in PyTorch.
        width: N >= 1, the units of a hidden layer of the base network of ``"standard"``: how much the hidden
            layers count beside the first. Without a meaning for ``"ntk"``.

    Raises:
        InvalidArgumentError: arguments out of range; when called, samples that do not fit.

    Reference:
        Jacot, Gabriel, Hongler (2018), arXiv 1806.07572; Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein,
        Pennington (2019), arXiv 1902.06720; Sohl-Dickstein, Novak, Schoenholz, Lee (2020), arXiv 2001.07301.

    >>> NTKKernel(depth=1)(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    tensor([[2.0000, 0.3183]])
    """

    parametrization: Parametrization = "ntk"
    width: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parametrization(self.parametrization, self.width)

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """K(x_i, y_j), ``(n, m)``."""
        with full_precision(x):
            x, y = sample_rows(x, y)
            tangents = torch.zeros((), dtype=x.dtype, device=x.device)
            for layer, (products, covariance, slopes) in enumerate(self._layers(x, y)):
                if self.parametrization == "ntk":
                    own = covariance
                else:
                    own = (self.width if layer else x.shape[1]) * products + 1
                tangents = own + slopes * tangents
            return tangents


def check_parametrization(parametrization: str, width: int) -> None:
    """Raise unless they are a parametrization by name, and a number of units or channels."""
    require(
        parametrization in _PARAMETRIZATIONS,
        f'parametrization must be "ntk" or "standard", got {parametrization!r}',
    )
    require_size("width", width)
