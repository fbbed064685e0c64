"""Largest cosines by brute force, and distances from convex hulls by another solver."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.codes import (
    KerdockCode,
    OrthoplexCode,
    RootCode,
    SimplexCode,
    coherence,
    measures,
    one_vs_rest_distance,
)
from etflayers.codes.nearest_points import nearest_points
from etflayers.errors import ConvergenceError, InvalidArgumentError, NonFiniteError


def random_rows(num_classes: int, in_features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_classes, in_features, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_the_largest_cosine_does_not_depend_on_the_blocks(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_BLOCK", block)
    rows = random_rows(20, 4)
    expected = (rows @ rows.mT).fill_diagonal_(-torch.inf).max()
    torch.testing.assert_close(coherence(rows), expected)
    assert coherence(rows.bfloat16()).dtype == torch.float32


def test_the_signed_cosine_is_what_counts() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert coherence(rows) == 0


def distances_by_cvxpy(rows: Tensor) -> Tensor:
    cvxpy = pytest.importorskip("cvxpy")
    found = []
    for k, row in enumerate(rows.numpy()):
        others = torch.cat((rows[:k], rows[k + 1 :])).numpy()
        weights = cvxpy.Variable(len(others))
        objective = cvxpy.Minimize(cvxpy.norm(weights @ others - row))
        problem = cvxpy.Problem(objective, [weights >= 0, cvxpy.sum(weights) == 1])
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-8, tol_gap_rel=1e-8, tol_feas=1e-8)
        found.append(problem.value)
    return torch.tensor(found, dtype=torch.float64)


# Below the dimension, and so many words that some are within the hull of the others but for rounding.
@pytest.mark.parametrize(("num_classes", "in_features"), [(2, 3), (5, 8), (12, 3), (25, 6), (9, 2)])
def test_distances_are_those_of_another_solver(num_classes: int, in_features: int) -> None:
    rows = random_rows(num_classes, in_features)
    torch.testing.assert_close(one_vs_rest_distance(rows), distances_by_cvxpy(rows), rtol=0, atol=1e-6)


def test_distances_of_codes_are_the_known_ones() -> None:
    def distances(code: object) -> Tensor:
        return one_vs_rest_distance(code)  # type: ignore[arg-type]

    simplex = distances(SimplexCode(9, 8))
    torch.testing.assert_close(simplex, torch.full_like(simplex, 9 / 8))
    orthoplex = distances(OrthoplexCode(12, 6))
    torch.testing.assert_close(orthoplex, torch.ones_like(orthoplex))
    # The distance of a vertex from its neighbors is that from a facet of its vertex figure.
    kerdock = distances(KerdockCode(288, 16))
    torch.testing.assert_close(kerdock, torch.full_like(kerdock, 3 / 4))
    roots = distances(RootCode(20, 5))
    torch.testing.assert_close(roots, torch.full_like(roots, 1 / 2))
    angles = 2 * math.pi / 7 * torch.arange(7)
    polygon = distances(torch.stack((angles.cos(), angles.sin()), 1).double())
    torch.testing.assert_close(
        polygon, torch.full_like(polygon, 1 - math.cos(2 * math.pi / 7)), atol=1e-6, rtol=0
    )


def test_a_word_that_occurs_twice_or_is_within_the_hull_has_distance_zero_and_no_gradient() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], requires_grad=True)
    found = one_vs_rest_distance(rows)
    torch.testing.assert_close(found, torch.tensor([0, 0, math.sqrt(2), math.sqrt(2)]))
    (grad,) = torch.autograd.grad(found[:2].sum(), rows)
    assert torch.equal(grad, torch.zeros_like(rows))
    within = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    assert one_vs_rest_distance(within)[3] < 1e-6


def test_the_gradient_is_that_of_danskins_theorem_and_there_is_no_second_one() -> None:
    rows = random_rows(9, 3).requires_grad_()
    assert torch.autograd.gradcheck(one_vs_rest_distance, rows)
    with pytest.raises(InvalidArgumentError, match="has no second derivative"):
        torch.autograd.grad(one_vs_rest_distance(rows).sum(), rows, create_graph=True)


def test_the_certificate_of_the_nearest_points_holds() -> None:
    rows = random_rows(300, 24)
    corners, weights = nearest_points(rows, torch.arange(300))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(300, dtype=torch.float64))
    assert not ((corners == torch.arange(300).unsqueeze(1)) & (weights > 0)).any()
    shortest = (weights.unsqueeze(1) @ rows[corners]).squeeze(1) - rows
    products = shortest @ rows.mT - (shortest * rows).sum(1, keepdim=True)
    least = products.fill_diagonal_(torch.inf).amin(1)
    assert (shortest.square().sum(1) - least).max() < 1e-12  # no point of a hull is nearer


def test_bad_input_is_named() -> None:
    for measure in (coherence, one_vs_rest_distance):
        with pytest.raises(InvalidArgumentError, match="at least 2 classes, got \\(1, 3\\)"):
            measure(torch.ones(1, 3))
    with pytest.raises(NonFiniteError, match="rows hold NaN"):
        one_vs_rest_distance(torch.full((3, 2), torch.nan))
    with pytest.raises(InvalidArgumentError, match="one_vs_rest_distance needs the values"):
        torch.vmap(one_vs_rest_distance)(torch.ones(2, 3, 2))
    with pytest.raises(ConvergenceError, match="were not found"):
        nearest_points(torch.full((3, 2), torch.nan, dtype=torch.float64), torch.arange(3))
