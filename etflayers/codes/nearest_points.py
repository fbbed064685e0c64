r"""The points of convex hulls that are nearest to the words: for each word, the hull of all others.

For word b let p_j = w_j - w_b. The nearest point of the hull of the others is w_b + x with x the shortest
vector in the hull of the p_j, x = sum_j lambda_j p_j. Wolfe's algorithm finds it in a finite number of steps.
It holds a *corral*, a few affinely independent points, and x in their hull:

1. The shortest vector of the affine hull of the corral has weights proportional to the solution u of (1 1' +
P P') u = 1,
   P the matrix of its points. If they are all positive, x is that vector. Else x goes towards it until a
   weight becomes zero, that point leaves the corral, and so on.
2. The point p_j with the smallest <x, p_j> enters. If <x, p_j> >= |x|^2 for all j, no hyperplane separates
further, and x is the
   shortest vector of the whole hull. The gap |x|^2 - min_j <x, p_j> bounds the error of |x|^2 / 2.

Both steps are taken for many words at once, each at its own stage; a word that has finished leaves the batch.

Symbols: b <-> targets, corral <-> corners and inside, lambda <-> weights, (1 1' + P P') <-> matrix,
u <-> solution, x <-> shortest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.errors import ConvergenceError

__all__ = ["NearestPoints", "nearest_points"]

# Of |x|^2 / 2, for words of length 1 in float64.
_TOLERANCE, _CERTAIN = 1e-13, 1e-8
# So often a step may fail to shorten x: with a gap of 1e-8 its gain is beyond rounding, yet the gap closes.
_PATIENCE = 20
_NO_WEIGHT = 1e-12


class NearestPoints(NamedTuple):
    """Corners and weights of the nearest points, ``(B, m)`` each; a weight is 0 where there are fewer."""

    corners: Tensor
    weights: Tensor


def nearest_points(words: Tensor, targets: Tensor) -> NearestPoints:
    """For each target the point of the convex hull of all other words that is nearest to it.

    Args:
        words: ``(K, d)`` in float64, unit rows, K >= 2.
        targets: ``(B,)``, numbers of words.

    Returns:
        Numbers of words, and their weights in the nearest point: not negative, with sum 1.

    Raises:
        ConvergenceError: rounding kept the algorithm from its end.

    Reference:
        Wolfe (1976), Finding the nearest point in a polytope, Mathematical Programming 11.
    """
    (num_classes, in_features), batch = words.shape, targets.shape[0]
    slots = min(num_classes - 1, in_features + 1) + 1
    own, live = targets, torch.arange(batch, device=words.device)
    corners = own.unsqueeze(1).repeat(1, slots)
    inside = torch.zeros_like(corners, dtype=torch.bool)
    weights = words.new_zeros(corners.shape)
    nearest = (words[own] @ words.mT).scatter_(1, own.unsqueeze(1), -torch.inf).argmax(1)
    corners[:, 0], inside[:, 0], weights[:, 0] = nearest, True, 1.0
    found = NearestPoints(corners.clone(), weights.clone())
    previous, failures = words.new_full((batch,), torch.inf), torch.zeros_like(own)
    largest_gap = words.new_zeros(())

    for _ in range(50 * (in_features + 2)):
        if not live.numel():
            break
        used = int(inside.any(0).nonzero().max()) + 1  # free slots are taken from the left
        weights[:, :used], feasible = _towards_affine_minimum(
            words[corners[:, :used]] - words[own].unsqueeze(1), weights[:, :used], inside[:, :used]
        )
        inside = weights > 0
        inner = weights[:, :used].unsqueeze(1) @ words[corners[:, :used]]
        shortest = inner.squeeze(1) - words[own]
        products = shortest @ words.mT - (shortest * words[own]).sum(-1, keepdim=True)
        least, entering = products.scatter_(1, own.unsqueeze(1), torch.inf).min(1)
        squared = shortest.square().sum(-1)
        gap = squared - least
        failures = failures + (feasible & ~(squared < previous))
        done = feasible & ((gap <= _TOLERANCE) | (failures > _PATIENCE))
        previous = torch.where(feasible, squared, previous)
        grows = (feasible & ~done).nonzero().squeeze(1)
        free = (~inside).to(torch.int8).argmax(1)
        corners[grows, free[grows]] = entering[grows]
        inside[grows, free[grows]] = True
        found.corners[live[done]], found.weights[live[done]] = corners[done], weights[done]
        largest_gap = torch.maximum(largest_gap, gap[done].max()) if bool(done.any()) else largest_gap
        live, own, corners, inside, weights, previous, failures = (
            tensor[~done] for tensor in (live, own, corners, inside, weights, previous, failures)
        )

    if live.numel() or not bool(largest_gap <= _CERTAIN):
        raise ConvergenceError(
            f"the nearest points of {live.numel()} convex hulls were not found, the others are certain to "
            f"{float(largest_gap):.1e} of the squared distance: words that nearly coincide do this"
        )
    return found


def _towards_affine_minimum(points: Tensor, weights: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """New weights of the corrals, and which of them have arrived at the minimum of their affine hulls."""
    present = inside.to(points.dtype)
    points = points * present.unsqueeze(-1)
    matrix = points @ points.mT + present.unsqueeze(-1) * present.unsqueeze(-2)
    matrix.diagonal(dim1=-2, dim2=-1).add_(1 - present)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(present.unsqueeze(-1), factor).squeeze(-1)
    minimum = solution / solution.sum(-1, keepdim=True)
    blocking = inside & (minimum <= _NO_WEIGHT)
    feasible = ~blocking.any(-1)
    share = torch.where(blocking, weights / (weights - minimum), torch.inf).amin(-1, keepdim=True)
    partial = weights + share.clamp(0, 1) * (minimum - weights)
    partial = torch.where(inside & (partial > _NO_WEIGHT), partial, 0)
    partial = partial / partial.sum(-1, keepdim=True)
    return torch.where(feasible.unsqueeze(-1), minimum * present, partial), feasible
