"""Targets that travel along great circles, against the angle of the path and SLERP's end points."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from etflayers import CodeCrossEntropy
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.geometry import simplex_etf
from etflayers.nn import FixedETFHead, TransitHead

Bad = InvalidArgumentError
MEANS = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def made() -> TransitHead:
    generator = torch.Generator().manual_seed(0)
    return TransitHead(
        simplex_etf(4, 6, rotation="haar", generator=generator, dtype=torch.float64), scale=2.0
    )


def angle(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return 2 * torch.asin((one - other).norm(dim=-1) / 2)


def test_without_departures_it_is_the_fixed_head() -> None:
    head, fixed = made(), FixedETFHead(6, 4, rotation="haar", scale=2.0, dtype=torch.float64)
    assert fixed.vertices is not None
    fixed.vertices.copy_(head.vertices)
    features = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(head.transit(0.5)(features), fixed(features))


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_rows_are_on_the_great_circle_between_mean_and_vertex(t: float) -> None:
    head = made().depart([1, 3], 7 * MEANS).transit(t)
    start, end, row = F.normalize(MEANS, dim=-1), head.vertices[[1, 3]], head.frame[[1, 3]]
    torch.testing.assert_close(row.norm(dim=-1), torch.ones(2).double())
    # On the shortest path the two angles add up to that of the whole path.
    torch.testing.assert_close(angle(start, row) + angle(row, end), angle(start, end))
    if t in (0.0, 0.5, 1.0):
        torch.testing.assert_close(angle(start, row), t * angle(start, end), rtol=0, atol=1e-7)
    assert torch.equal(head.frame[[0, 2]], head.vertices[[0, 2]])
    assert t < 1 or torch.equal(head.frame, head.vertices)


def test_classes_of_a_later_session_travel_alone() -> None:
    head = made().depart([1], MEANS[:1]).transit(1.0)
    head.depart([3], MEANS[1:]).transit(0.25)
    assert torch.equal(head.frame[1], head.vertices[1])
    assert not torch.allclose(head.frame[3], head.vertices[3])
    assert head.progress.tolist() == [1, 1, 1, 0.25]


def test_losses_follow_the_rows() -> None:
    head = made().depart([1, 3], MEANS).transit(0.4).deactivate([0])
    features, targets = torch.randn(6, 6, dtype=torch.float64), torch.tensor([1, 2, 3, 3, 2, 1])
    logits = 2 * features @ head.frame[1:].T
    torch.testing.assert_close(
        CodeCrossEntropy(head)(features, targets), F.cross_entropy(logits, targets - 1)
    )


def test_state_travels_with_copies() -> None:
    head = made().depart([1, 3], MEANS).transit(0.4)
    twin = made()
    twin.load_state_dict(head.state_dict())
    for other in (twin, copy.deepcopy(head)):
        assert torch.equal(other.frame, head.frame)
        assert torch.equal(other.transit(1.0).frame, head.vertices)
    head.half()
    assert head.vertices.dtype == torch.float64  # which half() leaves
    head.reset_parameters()
    assert torch.equal(head.frame, head.vertices)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda h: h.transit(1.5),
            Bad,
            r"t must be in \[0, 1\], the share of",
        ),
        (lambda h: h.transit(-0.1), Bad, "t must be a finite number >= 0, got -0.1"),
        (lambda h: h.depart([4], MEANS[:1]), Bad, r"classes must be in \[0, 4\)"),
        (lambda h: h.depart([1, 1], MEANS), Bad, r"classes must differ, got \[1, 1\]"),
        (
            lambda h: h.depart([1], MEANS),
            Bad,
            r"means must have shape .* \(1, 6\), got \(2, 6\)",
        ),
        (
            lambda h: h.depart([1], 0 * MEANS[:1]),
            Bad,
            r"classes \[1\] are zero, or opposite",
        ),
        (
            lambda h: h.depart([2], -3 * h.vertices[2:3]),
            Bad,
            r"classes \[2\] are zero, or opp",
        ),
        (lambda h: h.depart([2], torch.nan * MEANS[:1]), NonFiniteError, "means must be finite"),
        (lambda h: TransitHead(2 * h.vertices), Bad, "rows must be unit vectors"),
        (lambda h: TransitHead(6), Bad, "vertices must be a matrix"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call: Any, error: Any, message: str) -> None:
    head = made()
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(error, match=message):
        call(head)
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
