r"""Conjugate gradients for symmetric systems A x = b of which only products are known, one a batch member.

Inside a ball the iterates stop at the boundary, or follow a direction of negative curvature to it: this is
the truncated method that trust regions need. Without a ball, such a direction ends the iteration: A is not
positive definite, and the caller has to say what that means.

A <-> product, b <-> rhs, x <-> solution, p <-> direction.

Reference:
    Steihaug (1983), The conjugate gradient method and trust regions in large scale optimization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.linalg.matrices import inner, norm
from etflayers.precision import default_tolerance

__all__ = ["ConjugateGradients", "LinearSolution", "conjugate_gradients"]


class LinearSolution(NamedTuple):
    r"""Where the iteration stopped, one entry for each member of the batch.

    Attributes:
        solution: x, ``(B, d, n)``.
        image: A x, ``(B, d, n)``.
        residual: \|b - A x\|, ``(B,)``.
        curvature: smallest <p, A p> / <p, p> over the directions p, in units of the largest \|A p\| / \|p\|,
            ``(B,)``: not positive where A is not positive definite.
        iterations: products with A.
    """

    solution: Tensor
    image: Tensor
    residual: Tensor
    curvature: Tensor
    iterations: int


@dataclass(frozen=True)
class ConjugateGradients:
    r"""How to solve a symmetric positive definite system of which only products are known.

    Args:
        tolerance: \|b - A x\| / \|b\| at which to stop; ``None``: eps^(3/4).
        max_iterations: products with A.

    >>> rhs = torch.ones(1, 2, 1)
    >>> ConjugateGradients().solve(lambda x: torch.tensor([[1.0], [4.0]]) * x, rhs).solution.flatten()
    tensor([1.0000, 0.2500])
    """

    tolerance: float | None = None
    max_iterations: int = 500

    def solve(self, product: Callable[[Tensor], Tensor], rhs: Tensor) -> LinearSolution:
        """x with A x = b, for a batch of right-hand sides b, ``(B, d, n)``."""
        stop = self.accuracy(rhs.dtype) * norm(rhs)
        return conjugate_gradients(product, rhs, stop=stop, max_iterations=self.max_iterations)

    def accuracy(self, dtype: torch.dtype) -> float:
        """The relative residual at which it stops in ``dtype``."""
        return default_tolerance(dtype) if self.tolerance is None else self.tolerance


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    stop: Tensor,
    max_iterations: int,
    radius: Tensor | None = None,
) -> LinearSolution:
    """Solve A x = b until the residual is at most ``stop``, or x reaches the boundary of the ball.

    Args:
        product: x to A x.
        rhs: b, ``(B, d, n)``.
        stop: ``(B,)``.
        max_iterations: products with A.
        radius: of the ball, ``(B,)``; none without.

    Returns:
        Within a ball the last iterate; without one that of the smallest residual, which for a singular A is
        not the last one.
    """
    tiny, rounding = torch.finfo(rhs.dtype).tiny, 10 * torch.finfo(rhs.dtype).eps
    solution, image, residual = torch.zeros_like(rhs), torch.zeros_like(rhs), rhs
    direction, square = rhs, inner(rhs, rhs)
    best, least = solution, square
    active = square.sqrt() > stop
    largest, curvature = torch.zeros_like(square), torch.full_like(square, torch.inf)
    iterations = 0
    while iterations < max_iterations and bool(active.any()):
        # A member that is not finite is never active, and must not enter by 0 * NaN.
        moved = torch.where(active[:, None, None], product(direction), 0)
        iterations += 1
        length, bend = inner(direction, direction).clamp_min(tiny), inner(direction, moved)
        largest = torch.where(active, torch.maximum(largest, norm(moved) / length.sqrt()), largest)
        curvature = torch.where(active, torch.minimum(curvature, bend / length), curvature)
        concave = ~(bend > rounding * largest * length)
        step = square / torch.where(concave, 1, bend)
        if radius is None:
            step, leaves = torch.where(concave, 0, step), concave
        else:
            to_boundary = _to_boundary(solution, direction, radius)
            leaves = concave | (step >= to_boundary)
            step = torch.where(leaves, to_boundary, step)
        step = torch.where(active, step, 0)[:, None, None]
        solution = solution + step * direction
        image = image + step * moved
        residual = residual - step * moved
        previous, square = square, inner(residual, residual)
        if radius is None:
            best = torch.where((square < least)[:, None, None], solution, best)
            least = torch.minimum(square, least)
        active = active & ~leaves & (square.sqrt() > stop)
        direction = residual + (square / previous.clamp_min(tiny))[:, None, None] * direction
    curvature = curvature / largest.clamp_min(tiny)
    if radius is None:
        return LinearSolution(best, image, least.sqrt(), curvature, iterations)
    return LinearSolution(solution, image, square.sqrt(), curvature, iterations)


def _to_boundary(solution: Tensor, direction: Tensor, radius: Tensor) -> Tensor:
    """The step >= 0 along ``direction`` that leads to the sphere, in the form that does not cancel."""
    a, b = inner(direction, direction), inner(solution, direction)
    gap = (radius.square() - inner(solution, solution)).clamp_min(0)
    root = (b.square() + a * gap).sqrt()
    towards = gap / torch.where(b > 0, b + root, 1)
    away = (root - b) / torch.where(a > 0, a, 1)
    return torch.where(b > 0, towards, away)
