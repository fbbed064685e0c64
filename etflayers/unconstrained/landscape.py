r"""The regularized model with a linear classifier: its convex counterpart, and its critical points.

    f(W, H, b) = 1/N sum_i l(W h_i + b, y_i) + lw/2 |W|^2 + lh/2 |H|^2 + lb/2 |b|^2.

Symbols: W <-> weight, H <-> features, b <-> bias, Z <-> product, N <-> num_classes * per_class,
lw, lh, lb <-> weight_decay, feature_decay, bias_decay, G <-> gradient.

**The convex program.** Among all factors of Z = W H the decay terms are least where they are balanced:
``min lw/2 |W|^2 + lh/2 |H|^2 = sqrt(lw lh) |Z|_*``, and d >= K features leave Z free. Hence

    min f = min_{Z, b} 1/N sum_i l(z_i + b, y_i) + sqrt(lw lh) |Z|_* + lb/2 |b|^2,

which has no bad minimum to end in.

**Critical points.** Let W and H use the first r features only and minimize there. The other features have
the gradients ``G H_o' + lw W_o`` and ``W_o' G + lh H_o``, with G the gradient of the loss in Z, and these are
zero: the point is critical for f. Along unused directions the Hessian is ``lw |dW|^2 + lh |dH|^2 +
2 <G, dW dH>``. Its least eigenvalue is that of [[lw, -s], [-s, lh]], s the largest singular value of G, and
negative exactly if ``s > sqrt(lw lh)``, which is where the convex program is not optimal: every critical
point is a global minimum or has a direction of negative curvature (Zhu et al. 2021, arXiv 2105.02375).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_module, require_number, require_size
from etflayers.functional.losses import code_mse_loss

__all__ = ["Landscape", "Point", "convex_optimum", "minimize"]


class Point(NamedTuple):
    """Where f is evaluated.

    Attributes:
        weight: W, ``(K, d)``.
        features: H, ``(d, N)``, a column for each sample.
        bias: b, ``(K,)``.
    """

    weight: Tensor
    features: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class Landscape:
    r"""The function f of W, H and b: mean loss of ``W h_i + b`` over the samples, plus three decay terms.

    A point is one vector of coordinates, in float64, which :meth:`unflatten` takes apart.

    Args:
        loss: l: ``"ce"``, cross-entropy, or ``"mse"``, half the squared distance to the one-hot target.
        num_classes: K >= 2.
        per_class: n >= 1; N = nK.
        dim: d > K, so that there is an unused direction.
        weight_decay: lw.
        feature_decay: lh; sqrt(lw lh) is positive and less than 1 / (K sqrt(n)), or zero is the minimum.
        bias_decay: lb > 0.

    Raises:
        InvalidArgumentError: decays so large that zero is the minimum, or too few features.

    Reference:
        Zhu, Ding, Zhou, Li, You, Sulam, Qu (2021), arXiv 2105.02375.

    >>> landscape = Landscape(loss="mse", num_classes=3, per_class=2, dim=4)
    >>> landscape.value(torch.zeros(landscape.size, dtype=torch.float64))
    tensor(0.5000, dtype=torch.float64)
    """

    loss: Literal["ce", "mse"] = "ce"
    num_classes: int = 4
    per_class: int = 3
    dim: int = 6
    weight_decay: float = 0.01
    feature_decay: float = 0.01
    bias_decay: float = 0.01

    def __post_init__(self) -> None:
        require(self.loss in ("ce", "mse"), f"loss must be 'ce' or 'mse', got {self.loss!r}")
        require_size("num_classes", self.num_classes, at_least=2)
        require_size("per_class", self.per_class)
        require_size("dim", self.dim)
        for name in ("weight_decay", "feature_decay", "bias_decay"):
            require_number(name, getattr(self, name), positive=True)
        require(
            self.dim > self.num_classes, f"dim must be greater than K = {self.num_classes}, got {self.dim}"
        )
        # At Z = 0 the largest singular value of G is 1 / (K sqrt n).
        largest = 1 / (self.num_classes * math.sqrt(self.per_class))
        require(
            self.threshold < largest,
            "sqrt(weight_decay * feature_decay) must be less than 1 / (K sqrt n) = "
            f"{largest:.3g}, or zero is the minimum; got {self.threshold:.3g}",
        )

    @property
    def threshold(self) -> float:
        """The weight of the nuclear norm, sqrt(lw lh)."""
        return math.sqrt(self.weight_decay * self.feature_decay)

    @property
    def targets(self) -> Tensor:
        """The class of each sample, ``(N,)``."""
        return torch.arange(self.num_classes).repeat_interleave(self.per_class)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of W, H and b."""
        samples = self.num_classes * self.per_class
        return ((self.num_classes, self.dim), (self.dim, samples), (self.num_classes,))

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return sum(math.prod(shape) for shape in self.shapes)

    def unflatten(self, vector: Tensor) -> Point:
        """The point whose coordinates are the entries of the vector, as views of it.

        Raises:
            InvalidArgumentError: a vector of another length.
        """
        require(
            vector.shape == (self.size,), f"vector must have shape ({self.size},), got {tuple(vector.shape)}"
        )
        parts = torch.split(vector, [math.prod(shape) for shape in self.shapes])
        return Point(*(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)))

    def data_loss(self, outputs: Tensor) -> Tensor:
        """Mean of l over the columns of ``WH + b``, ``(K, N)``."""
        loss = F.cross_entropy if self.loss == "ce" else code_mse_loss
        value: Tensor = loss(outputs.mT, self.targets)
        return value

    def value(self, vector: Tensor) -> Tensor:
        """f at the point with these coordinates."""
        weight, features, bias = self.unflatten(vector)
        return (
            self.data_loss(weight @ features + bias.unsqueeze(-1))
            + self.weight_decay / 2 * weight.square().sum()
            + self.feature_decay / 2 * features.square().sum()
            + self.bias_decay / 2 * bias.square().sum()
        )

    def gradient_norm(self, vector: Tensor) -> float:
        """The length of the gradient of f."""
        return float(torch.func.grad(self.value)(vector).norm())

    def least_eigenvalue(self, vector: Tensor) -> float:
        """Of the whole Hessian of f, over all coordinates: negative at a strict saddle."""
        return float(torch.linalg.eigvalsh(torch.func.hessian(self.value)(vector))[0])

    def unused_curvature(self, vector: Tensor) -> float:
        """The least eigenvalue of the Hessian along unused features, from the singular values of G."""
        weight, features, bias = self.unflatten(vector)
        gradient = torch.func.grad(self.data_loss)(weight @ features + bias.unsqueeze(-1))
        s = float(torch.linalg.matrix_norm(gradient, ord=2))
        lw, lh = self.weight_decay, self.feature_decay
        return (lw + lh) / 2 - math.hypot((lw - lh) / 2, s)


def minimize(
    landscape: Landscape, *, rank: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    r"""A critical point of f: where L-BFGS ends, from a normal random start.

    Args:
        landscape: f.
        rank: number r of features that may be used, in [0, d]; default: all. With r < K - 1 the point is a
            minimum among those that use r features and, by the theorem, a saddle of f.
        generator: random numbers of the start.

    Returns:
        The coordinates, float64. How near the point is to a critical one, ``landscape.gradient_norm`` says.

    Raises:
        InvalidArgumentError: a rank out of its range.

    >>> landscape = Landscape(num_classes=3, per_class=1, dim=4)
    >>> point = minimize(landscape, generator=torch.Generator().manual_seed(0))
    >>> landscape.gradient_norm(point) < 1e-8
    True
    """
    used = landscape.dim if rank is None else rank
    require_size("rank", used, at_least=0)
    require(used <= landscape.dim, f"rank must be at most dim = {landscape.dim}, got {rank}")
    start = torch.randn(landscape.size, generator=generator, dtype=torch.float64)
    mask = torch.ones_like(start)
    weight, features, _ = landscape.unflatten(mask)
    weight[:, used:] = 0
    features[used:] = 0
    vector = (start * mask).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [vector],
        max_iter=5000,
        max_eval=20000,
        history_size=50,
        tolerance_grad=1e-11,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = landscape.value(vector * mask)
        torch.autograd.backward(value)
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return (vector * mask).detach()


def convex_optimum(landscape: Landscape) -> float:
    r"""The least value of f: ``min_{Z, b} 1/N sum_i l(z_i + b, y_i) + sqrt(lw lh) |Z|_* + lb/2 |b|^2``.

    An interior-point method solves the convex program (Clarabel, through cvxpy). It knows nothing of the
    factors W and H, and so is a peer for any descent on f.

    Args:
        landscape: f.

    Returns:
        The value, to a duality gap of 1e-8.

    Raises:
        MissingDependencyError: cvxpy is not installed.

    Reference:
        Zhu, Ding, Zhou, Li, You, Sulam, Qu (2021), arXiv 2105.02375.

    >>> landscape = Landscape(num_classes=3, per_class=1, dim=4)
    >>> point = minimize(landscape, generator=torch.Generator().manual_seed(0))
    >>> abs(float(landscape.value(point)) - convex_optimum(landscape)) < 1e-6
    True
    """
    cvxpy = require_module("cvxpy", extra="solvers")
    num_classes, samples = landscape.num_classes, len(landscape.targets)
    wanted = F.one_hot(landscape.targets, num_classes).mT.double().numpy()
    product, bias = cvxpy.Variable((num_classes, samples)), cvxpy.Variable((num_classes, 1))
    outputs = product + bias @ np.ones((1, samples))
    if landscape.loss == "ce":
        normalizers = cvxpy.log_sum_exp(outputs, axis=0)
        loss = cvxpy.sum(normalizers) - cvxpy.sum(cvxpy.multiply(wanted, outputs))
    else:
        loss = cvxpy.sum_squares(outputs - wanted) / 2
    objective = (
        loss / samples
        + landscape.threshold * cvxpy.normNuc(product)
        + landscape.bias_decay / 2 * cvxpy.sum_squares(bias)
    )
    return float(cvxpy.Problem(cvxpy.Minimize(objective)).solve(solver=cvxpy.CLARABEL))
