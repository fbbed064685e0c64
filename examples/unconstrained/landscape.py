r"""The regularized model, its convex counterpart, and its critical points, in float64.

    f(W, H, b) = 1/N sum_i l(W h_i + b, y_i) + lw/2 |W|^2 + lh/2 |H|^2 + lb/2 |b|^2.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_module
from etflayers.metrics import Classifier, class_statistics, collapse_measures
from lab.files import Row


class Point(NamedTuple):
    """W ``(K, d)``, H ``(d, N)``, b ``(K,)``."""

    weight: Tensor
    features: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """f for K classes with n samples each and d > K features.

    Raises:
        InvalidArgumentError: decays so large that zero is the minimum, or too few features.
    """

    loss: Literal["ce", "mse"] = "ce"
    num_classes: int = 4
    per_class: int = 3
    dim: int = 6
    weight_decay: float = 0.01
    feature_decay: float = 0.01
    bias_decay: float = 0.01

    def __post_init__(self) -> None:
        require(
            self.dim > self.num_classes, f"dim must be greater than K = {self.num_classes}, got {self.dim}"
        )
        # At Z = 0 the largest singular value of G is 1 / (K sqrt n).
        largest = 1 / (self.num_classes * math.sqrt(self.per_class))
        require(
            0 < self.threshold < largest,
            "sqrt(weight_decay * feature_decay) must be positive and less than 1 / (K sqrt n) = "
            f"{largest:.3g}, or zero is the minimum; got {self.threshold:.3g}",
        )
        require(self.bias_decay > 0, f"bias_decay must be positive, got {self.bias_decay}")

    @property
    def threshold(self) -> float:
        return math.sqrt(self.weight_decay * self.feature_decay)

    @property
    def targets(self) -> Tensor:
        return torch.arange(self.num_classes).repeat_interleave(self.per_class)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (
            (self.num_classes, self.dim),
            (self.dim, self.num_classes * self.per_class),
            (self.num_classes,),
        )

    def unflatten(self, vector: Tensor) -> Point:
        """The point whose coordinates are the entries of the vector."""
        parts = vector.split([math.prod(shape) for shape in self.shapes])
        return Point(*(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)))

    def data_loss(self, outputs: Tensor) -> Tensor:
        """Mean of l over the columns of ``WH + b``, ``(K, N)``."""
        if self.loss == "ce":
            return F.cross_entropy(outputs.mT, self.targets)
        wanted = F.one_hot(self.targets, self.num_classes).mT
        return 0.5 * (outputs - wanted).square().sum(0).mean()

    def value(self, vector: Tensor) -> Tensor:
        """f at the point with these coordinates."""
        weight, features, bias = self.unflatten(vector)
        return (
            self.data_loss(weight @ features + bias.unsqueeze(-1))
            + self.weight_decay / 2 * weight.square().sum()
            + self.feature_decay / 2 * features.square().sum()
            + self.bias_decay / 2 * bias.square().sum()
        )


def minimize(landscape: Landscape, seed: int, rank: int | None = None) -> Tensor:
    """Coordinates of the point where L-BFGS ends, from a random start.

    Args:
        landscape: f.
        seed: of the start.
        rank: number of features that may be used; default all.
    """
    start = torch.randn(
        sum(math.prod(shape) for shape in landscape.shapes),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    mask = torch.ones_like(start)
    if rank is not None:
        weight, features, _ = landscape.unflatten(mask)
        weight[:, rank:] = 0
        features[rank:] = 0
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
        value.backward()
        return value

    optimizer.step(closure)
    return (vector * mask).detach()


def convex_optimum(landscape: Landscape) -> float:
    """The value of the nuclear-norm program by an interior-point method, which knows nothing of factors."""
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
    problem = cvxpy.Problem(cvxpy.Minimize(objective))
    return float(problem.solve(solver=cvxpy.CLARABEL))


def gradient_norm(landscape: Landscape, vector: Tensor) -> float:
    return float(torch.func.grad(landscape.value)(vector).norm())


def least_eigenvalue(landscape: Landscape, vector: Tensor) -> float:
    """Of the whole Hessian of f, over all coordinates."""
    return float(torch.linalg.eigvalsh(torch.func.hessian(landscape.value)(vector))[0])


def predicted_eigenvalue(landscape: Landscape, vector: Tensor) -> float:
    """The least eigenvalue of the Hessian along unused features, from the singular values of G."""
    weight, features, bias = landscape.unflatten(vector)
    gradient = torch.func.grad(landscape.data_loss)(weight @ features + bias.unsqueeze(-1))
    s = float(torch.linalg.matrix_norm(gradient, ord=2))
    lw, lh = landscape.weight_decay, landscape.feature_decay
    return (lw + lh) / 2 - math.hypot((lw - lh) / 2, s)


def collapse(landscape: Landscape, vector: Tensor) -> dict[str, float]:
    """How far features and weight are from neural collapse."""
    weight, features, bias = landscape.unflatten(vector)
    statistics = class_statistics(features.mT, landscape.targets, landscape.num_classes)
    measures = collapse_measures(statistics, Classifier(weight, bias))
    names = ("nc1_trace", "nc2_gram_means", "nc2_gram_weights", "nc3_distance")
    return {name: measures[name].item() for name in names}


def landscape_rows(landscape: Landscape, seeds: Sequence[int]) -> list[Row]:
    """One row for each minimum from a random start, and for a critical point of each lower rank.

    ``gap`` is the value above the optimum of the convex program. Rank K - 1 is that of the minimum.
    """
    optimum = convex_optimum(landscape)
    starts: list[tuple[int | None, int]] = [(None, seed) for seed in seeds]
    starts += [(rank, seeds[0]) for rank in range(landscape.num_classes - 1)]
    rows = []
    for rank, seed in starts:
        point = minimize(landscape, seed, rank)
        value = float(landscape.value(point))
        rows.append(
            {
                "loss": landscape.loss,
                "rank": "free" if rank is None else rank,
                "seed": seed,
                "value": value,
                "convex_optimum": optimum,
                "gap": value - optimum,
                "gradient_norm": gradient_norm(landscape, point),
                "least_eigenvalue": least_eigenvalue(landscape, point),
                "predicted_eigenvalue": predicted_eigenvalue(landscape, point),
                "collapse": max(collapse(landscape, point).values()) if rank is None else None,
            }
        )
    return rows
