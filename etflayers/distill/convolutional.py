r"""Kernels of a convolutional ReLU network whose hidden layers have infinitely many channels.

**The network.** L convolutions with filters of k x k pixels, images padded by zeros so that they keep their
size, a ReLU after each and averages over 2 x 2 pixels after chosen ones; then a linear layer, on all pixels
of all channels (``"flatten"``) or on the mean of each channel (``"average"``). Every layer multiplies its
weights, drawn from N(0, 1), by s_w / sqrt(fan-in) and its biases by s_b; fan-in is k^2 times the channels.

**Covariances** (Novak et al. 2019, arXiv 1810.05148; Garriga-Alonso et al. 2019, arXiv 1808.05587). Channels
become independent Gaussian processes over samples *and pixels*. With ``V(x_p, y_q)`` the mean over channels
of the product of what layer l is given at pixel p of x and q of y (for l = 1: ``<x_p, y_q> / C``), its
outputs have the covariance

    K(x_p, y_q) = s_w^2 M[V](x_p, y_q) + s_b^2,      M[V](x_p, y_q) = sum_d V(x_(p+d), y_(q+d)) / k^2,

d over the offsets of a filter, V zero outside of the image. Behind the ReLU, V is ``E[relu(u) relu(v)]`` at
the variances K(x_p, x_p), K(y_q, y_q) and this covariance (:mod:`etflayers.distill.arc_cosine`). A layer that
averages pixels averages V over all pairs of them. The last layer takes the mean of V over the pairs (p, p)
where it sees pixels one by one, over all pairs (p, q) where it sees their mean.

**Tangents** (Arora et al. 2019, arXiv 1904.11955). A filter's own derivatives add K; those of earlier layers
pass through relu' and the same linear maps, because weights are independent between channels:

    T = K + s_w^2 M[U],      U = E[relu'(u) relu'(v)] T      (0 in front of the first layer),

U averaged like V. In the standard parametrization (:mod:`etflayers.distill.infinite_width`) K is replaced by
fan-in times M[V] plus 1, fan-in that of a base network of ``width`` channels.

**What has to be kept.** M moves both pixels alike. Without pooling, and all pixels flattened, the pairs (p,
p) of a pair of samples are a world of their own, HW numbers. An average mixes p and q, and needs all of the
(HW)^2: a thousand times the time for images of 32 x 32 pixels. The variances come from the same recursion for
the pair (x, x).

**Memory.** Pairs of samples are computed in blocks. Where there are several, a block keeps no graph and is
computed again on the way back, so that what is held are the samples, the kernel and one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from etflayers._torch import forward_mode, inside_transform
from etflayers.checks import require, require_number, require_size
from etflayers.distill.arc_cosine import relu_moments
from etflayers.distill.infinite_width import Parametrization, check_parametrization
from etflayers.distill.kernels import sample_rows
from etflayers.precision import full_precision

__all__ = ["ConvNNGPKernel", "ConvNTKKernel", "Readout"]

Readout = Literal["flatten", "average"]
_READOUTS = ("flatten", "average")
_BLOCK = 2**22  # numbers in each of the some twenty tensors of a block: fewer would leave threads idle


class _SamePixel:
    """Products of two samples at one pixel, ``(..., H, W)``."""

    @staticmethod
    def products(x: Tensor, y: Tensor) -> Tensor:
        """Means over channels, of all pairs of samples."""
        return torch.einsum("ncij,mcij->nmij", x, y) / x.shape[1]

    @staticmethod
    def own_products(x: Tensor) -> Tensor:
        """The same of each sample with itself."""
        return x.square().mean(1)

    @staticmethod
    def patches(c: Tensor, size: int) -> Tensor:
        """M[c]."""
        return _averaged(c, size, stride=1, padding=size // 2)

    @staticmethod
    def pooled(c: Tensor) -> Tensor:
        """What other pixels are needed for."""
        raise NotImplementedError

    @staticmethod
    def variances(c: Tensor) -> Tensor:
        """Of covariances of samples with themselves, those of pixels with themselves, ``(..., H, W)``."""
        return c

    @staticmethod
    def spread(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Variances of both samples, ``(..., H, W)``, as they broadcast to covariances."""
        return a, b

    @staticmethod
    def mean(c: Tensor, readout: Readout) -> Tensor:
        """Over what the last layer sees, ``(...)``."""
        return c.mean((-2, -1))


class _AllPixels:
    """Products of two samples at all pairs of pixels, ``(..., H, W, H, W)``."""

    @staticmethod
    def products(x: Tensor, y: Tensor) -> Tensor:
        """Means over channels, of all pairs of samples."""
        return torch.einsum("ncij,mckl->nmijkl", x, y) / x.shape[1]

    @staticmethod
    def own_products(x: Tensor) -> Tensor:
        """The same of each sample with itself."""
        return torch.einsum("ncij,nckl->nijkl", x, x) / x.shape[1]

    @staticmethod
    def patches(c: Tensor, size: int) -> Tensor:
        """M[c]: rows, then columns of both samples move along together, which is 2 k sums and not k^2."""
        reach = size // 2
        for both in ((-4, -2), (-3, -1)):
            padding = [reach if dim in both else 0 for dim in (-1, -2, -3, -4) for _ in range(2)]
            padded, lengths = F.pad(c, padding), [c.shape[dim] for dim in both]
            windows = (
                padded.narrow(both[0], i, lengths[0]).narrow(both[1], i, lengths[1]) for i in range(size)
            )
            c = sum(windows, torch.zeros((), dtype=c.dtype, device=c.device))
        return c / size**2

    @staticmethod
    def pooled(c: Tensor) -> Tensor:
        """Means over 2 x 2 pixels of both samples; an odd row or column at the end is left over."""
        for _ in range(2):  # the pixels of the second sample, then those of the first
            c = _averaged(c, 2, stride=2).movedim((-2, -1), (-4, -3))
        return c

    @staticmethod
    def variances(c: Tensor) -> Tensor:
        """Of covariances of samples with themselves, those of pixels with themselves, ``(..., H, W)``."""
        return c.diagonal(dim1=-4, dim2=-2).diagonal(dim1=-3, dim2=-2)

    @staticmethod
    def spread(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Variances of both samples, ``(..., H, W)``, as they broadcast to covariances."""
        return a[..., None, None], b[..., None, None, :, :]

    @staticmethod
    def mean(c: Tensor, readout: Readout) -> Tensor:
        """Over what the last layer sees, ``(...)``."""
        if readout == "average":
            return c.mean((-4, -3, -2, -1))
        return _AllPixels.variances(c).mean((-2, -1))


def _averaged(c: Tensor, size: int, stride: int, padding: int = 0) -> Tensor:
    """Means over squares of the last two dimensions."""
    means = F.avg_pool2d(c.flatten(0, -3).unsqueeze(1), size, stride, padding)
    return means.view(*c.shape[:-2], *means.shape[-2:])


@dataclass(frozen=True)
class _ConvReLUNetwork:
    """The architecture, and the recursion over its layers that both kernels run."""

    depth: int = 3
    pool_after: tuple[int, ...] = ()
    readout: Readout = "flatten"
    kernel_size: int = 3
    weight_variance: float = 2.0
    bias_variance: float = 0.0
    block_pairs: int | None = None

    def __post_init__(self) -> None:
        require_size("depth", self.depth)
        require(
            isinstance(self.pool_after, tuple)
            and all(type(layer) is int and 1 <= layer <= self.depth for layer in self.pool_after)
            and len(set(self.pool_after)) == len(self.pool_after),
            f"pool_after must be a tuple of different numbers of convolutions, from 1 to depth={self.depth}, "
            f"got {self.pool_after!r}",
        )
        require(self.readout in _READOUTS, f'readout must be "flatten" or "average", got {self.readout!r}')
        require_size("kernel_size", self.kernel_size)
        require(
            self.kernel_size % 2 == 1,
            f"kernel_size must be odd, so that a filter has a central pixel, got {self.kernel_size}",
        )
        require_number("weight_variance", self.weight_variance, positive=True)
        require_number("bias_variance", self.bias_variance)
        if self.block_pairs is not None:
            require_size("block_pairs", self.block_pairs)

    def __call__(self, x: Tensor, y: Tensor, /) -> Tensor:
        """K(x_i, y_j), ``(n, m)``."""
        with full_precision(x):
            x, y = self._images(x, y)
            pairs = self.block_pairs or self._pairs_of_a_block(x)
            columns = torch.split(y, max(1, min(len(y), pairs)))
            rows = torch.split(x, max(1, pairs // max(1, len(columns[0]))))
            run = _recomputed if len(rows) * len(columns) > 1 else _at_once
            left, right = ([run(self._variances, part) for part in parts] for parts in (rows, columns))
            blocks = [
                torch.cat([run(self._block, a, b, *u, *v) for b, v in zip(columns, right, strict=True)], 1)
                for a, u in zip(rows, left, strict=True)
            ]
            return torch.cat(blocks)

    @property
    def _pixels(self) -> type[_SamePixel] | type[_AllPixels]:
        return _AllPixels if self.pool_after or self.readout == "average" else _SamePixel

    def _images(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = sample_rows(x, y)
        require(
            x.ndim == 4,
            "x and y must be images, (n, C, H, W) and (m, C, H, W), "
            f"got {tuple(x.shape)} and {tuple(y.shape)}",
        )
        halvings = len(self.pool_after)
        require(
            min(x.shape[-2:]) >= 2**halvings,
            f"images must have at least {2**halvings} pixels a side to be halved {halvings} times, got "
            f"{tuple(x.shape)}: shorten pool_after",
        )
        return rows.view(x.shape), columns.view(y.shape)

    def _pairs_of_a_block(self, x: Tensor) -> int:
        pixels = math.prod(x.shape[-2:])
        return max(1, _BLOCK // (pixels if self._pixels is _SamePixel else pixels**2))

    def _covariance(self, seen: Tensor) -> Tensor:
        return self.weight_variance * seen + self.bias_variance

    def _seen(self, products: Tensor, layer: int) -> Tensor:
        """What the layer behind convolution ``layer`` (0: the images) takes of products in front of it."""
        if layer in self.pool_after:
            products = self._pixels.pooled(products)
        if layer == self.depth:
            return self._pixels.mean(products, self.readout)
        return self._pixels.patches(products, self.kernel_size)

    def _variances(self, x: Tensor) -> tuple[Tensor, ...]:
        """K(x_p, x_p) behind each convolution, ``(n, H, W)`` of the size that images have there."""
        seen, variances = self._seen(self._pixels.own_products(x), 0), []
        for layer in range(1, self.depth + 1):
            covariance = self._covariance(seen)
            variances.append(self._pixels.variances(covariance))
            if layer < self.depth:
                a, b = self._pixels.spread(variances[-1], variances[-1])
                seen = self._seen(relu_moments(a, b, covariance)[1], layer)
        return tuple(variances)

    def _layers(
        self, x: Tensor, y: Tensor, variances: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor] | None]]:
        """Of each layer M[V] or its last mean, and what takes T of the one before to ``s_w^2 M[U]``."""
        seen = self._seen(self._pixels.products(x, y), 0)
        yield seen, None
        left, right = variances[: self.depth], variances[self.depth :]
        for layer, (a, b) in enumerate(zip(left, right, strict=True), 1):
            spread = self._pixels.spread(a[:, None], b)
            slopes, products = relu_moments(*spread, self._covariance(seen))
            seen = self._seen(products, layer)
            yield seen, partial(self._carried, slopes, layer)

    def _carried(self, slopes: Tensor, layer: int, tangents: Tensor) -> Tensor:
        return self.weight_variance * self._seen(slopes * tangents, layer)

    def _block(self, x: Tensor, y: Tensor, *variances: Tensor) -> Tensor:
        """The kernel of some pairs, from the images and the variances behind each layer, of x, then of y."""
        raise NotImplementedError


@dataclass(frozen=True)
class ConvNNGPKernel(_ConvReLUNetwork):
    r"""The covariance ``E[f(x) f(y)]`` of the output of a ReLU network of infinitely many channels.

    Regression with it is what training the last layer alone does.

    Args: depth: L >= 1, the number of convolutions, each with a ReLU behind it. pool_after: the numbers (1 to
        L) of the convolutions behind whose ReLU 2 x 2 pixels are averaged. readout: ``"flatten"``, a linear
        layer on all pixels of all channels, or ``"average"``, on the means of
            channels.
        kernel_size: k, odd, of a filter of k x k pixels.
        weight_variance: s_w^2 > 0, times 1 over the fan-in of a layer.
        bias_variance: s_b^2 >= 0. At 0 the kernel is homogeneous: it scales with the samples.
        block_pairs: pairs of samples computed at once; default as many as make 4 million numbers, or one.

    Raises: InvalidArgumentError: arguments out of range; when called, samples that are no images ``(n, C, H,
        W)``,
            do not fit, or are too small for the pooling.

    Reference:
        Novak, Xiao, Bahri, Lee, Yang, Hron, Abolafia, Pennington, Sohl-Dickstein (2019), arXiv 1810.05148.

    >>> x = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 1.0]]]])
    >>> ConvNNGPKernel(depth=1)(x, x)
    tensor([[0.2222, 0.0707],
            [0.0707, 0.2222]])
    """

    def _block(self, x: Tensor, y: Tensor, *variances: Tensor) -> Tensor:
        *_, (seen, _) = self._layers(x, y, variances)
        return self._covariance(seen)


@dataclass(frozen=True)
class ConvNTKKernel(_ConvReLUNetwork):
    r"""The tangent kernel ``<df(x)/dtheta, df(y)/dtheta>`` of a ReLU network of infinitely many channels.

    Regression with it is what training all of the network to convergence does.

    Args: depth: L >= 1, the number of convolutions, each with a ReLU behind it. pool_after: the numbers (1 to
        L) of the convolutions behind whose ReLU 2 x 2 pixels are averaged. readout: ``"flatten"``, a linear
        layer on all pixels of all channels, or ``"average"``, on the means of
            channels.
        kernel_size: k, odd, of a filter of k x k pixels.
        weight_variance: s_w^2 > 0, times 1 over the fan-in of a layer.
        bias_variance: s_b^2 >= 0. At 0 the kernel is homogeneous in the parametrization ``"ntk"``: it scales
            with the samples.
        block_pairs: pairs of samples computed at once; default as many as make 4 million numbers, or one.
        parametrization: ``"ntk"`` or ``"standard"``, as in :class:`~etflayers.distill.NTKKernel`.
        width: N >= 1, the channels of the base network of ``"standard"``. Without a meaning for ``"ntk"``.

    Raises: InvalidArgumentError: arguments out of range; when called, samples that are no images ``(n, C, H,
        W)``,
            do not fit, or are too small for the pooling.

    Reference:
        Arora, Du, Hu, Li, Salakhutdinov, Wang (2019), arXiv 1904.11955; for distillation Nguyen, Novak, Xiao,
        Lee (2021), arXiv 2107.13034.

    >>> x = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 1.0]]]])
    >>> ConvNTKKernel(depth=1)(x, x)
    tensor([[0.4444, 0.0707],
            [0.0707, 0.4444]])
    """

    parametrization: Parametrization = "ntk"
    width: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parametrization(self.parametrization, self.width)

    def _block(self, x: Tensor, y: Tensor, *variances: Tensor) -> Tensor:
        tangents = torch.zeros((), dtype=x.dtype, device=x.device)
        for layer, (seen, carry) in enumerate(self._layers(x, y, variances)):
            own = self._own(seen, layer, x)
            tangents = own if carry is None else own + carry(tangents)
        return tangents

    def _own(self, seen: Tensor, layer: int, x: Tensor) -> Tensor:
        """What the parameters of a layer add to the tangents."""
        if self.parametrization == "ntk":
            return self._covariance(seen)
        channels = x.shape[1] if layer == 0 else self.width
        inputs = self.kernel_size**2
        if layer == self.depth:
            sides = (side >> len(self.pool_after) for side in x.shape[-2:])
            inputs = math.prod(sides) if self.readout == "flatten" else 1
        return channels * inputs * seen + 1


def _at_once(function: Callable[..., Any], *tensors: Tensor) -> Any:
    return function(*tensors)


def _recomputed(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """The same without a graph, run again when it is needed; transforms have no rule for that."""
    if not torch.is_grad_enabled() or forward_mode() or inside_transform():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
