"""A head for more classes: where its old rows go, what it keeps, and what cannot grow."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from etflayers.codes import KerdockCode, OrthoplexCode
from etflayers.errors import InvalidArgumentError
from etflayers.geometry import is_simplex_etf, random_stiefel, simplex_etf
from etflayers.nn import (
    ClassMeanHead,
    CodeHead,
    ETFHead,
    FixedCodeHead,
    FixedETFHead,
    LearnedETFHead,
    NearestCodeHead,
    NearestETFHead,
    UnitRowHead,
    expand_classes,
)

if TYPE_CHECKING:
    from tests.nn.conftest import MakeHead


def least(before: int, after: int) -> float:
    """The distance that each vertex of a simplex has to move at least when there are more of them."""
    return math.sqrt(2 - 2 * math.sqrt((before - 1) * after / (before * (after - 1))))


def batch(num_classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed)).double()
    return features, torch.arange(12) % num_classes


@pytest.mark.parametrize("after", [5, 6, 7])
def test_old_rows_move_as_little_as_they_can(make_head: MakeHead, after: int) -> None:
    head = make_head(dtype=torch.float64)
    head(*batch())
    old = head.frame.detach().clone()
    grown, moved = expand_classes(head, after)
    assert type(grown) is type(head)
    assert grown.num_classes == after
    assert grown.frame.shape == (after, 6)
    torch.testing.assert_close(grown.frame.norm(dim=-1), torch.ones(after).double())
    distances = (grown.frame[:4] - old).norm(dim=-1).detach()
    assert float(distances.max()) == pytest.approx(moved.largest, abs=1e-12)
    assert float(distances.mean()) == pytest.approx(moved.mean, abs=1e-12)
    if isinstance(head, ETFHead):
        assert is_simplex_etf(grown.frame, atol=1e-10)
        assert moved.largest == pytest.approx(least(4, after), abs=1e-7)
        assert moved.mean == pytest.approx(least(4, after), abs=1e-7)
    else:
        assert moved == (0, 0)
    torch.testing.assert_close(head.frame, old, rtol=0, atol=0)  # the old head stays


def test_no_frame_is_nearer() -> None:
    """Against frames around the one that was found, and any others."""
    old, found = simplex_etf(4, 9, rotation="haar"), None
    head = FixedETFHead(9, 4, rotation="haar")
    assert head.vertices is not None
    head.vertices.copy_(old)
    found, _ = expand_classes(head, 7)
    distance = (found.frame[:4] - old).square().sum()
    generator = torch.Generator().manual_seed(0)
    for size in (1e-2, 1e-1, 10.0):
        for _ in range(50):
            turn = torch.linalg.matrix_exp(size * _skew(torch.randn(9, 9, generator=generator)))
            assert ((found.frame @ turn)[:4] - old).square().sum() >= distance - 1e-5


def _skew(matrix: Tensor) -> Tensor:
    return (matrix - matrix.mT) / 2


def test_a_reserved_frame_does_not_move(make_head: MakeHead) -> None:
    head = make_head().deactivate([2, 3])
    old = head.frame.detach().clone()
    head.activate([2])
    assert torch.equal(head.frame.detach(), old)


def test_what_was_learned_is_kept_and_training_goes_on(make_head: MakeHead) -> None:
    head = make_head(scale=2.0, normalize=True, dtype=torch.float64)
    head(*batch())
    head.scale = nn.Parameter(torch.tensor(3.0).double())
    head.deactivate([1])
    grown, _ = expand_classes(head.eval(), 6)
    assert not grown.training
    assert grown.active_classes.tolist() == [0, 2, 3, 4, 5]
    assert float(grown.scale.detach()) == 3
    assert grown.normalize
    if isinstance(head, (NearestETFHead, ClassMeanHead)):
        for name, old in head.averages.state_dict().items():
            new = grown.averages.state_dict()[name]
            assert torch.equal(new[:4], old)
            assert not new[4:].any()
    grown.activate([1])
    fresh = make_head(6, 6, seed=5, dtype=torch.float64)
    state = copy.deepcopy(grown.state_dict())
    fresh.scale = nn.Parameter(torch.tensor(1.0).double())
    fresh.normalize = True
    fresh.load_state_dict(state)  # a state dict of the new head is that of a head made for 6 classes
    torch.testing.assert_close(fresh.eval()(batch(6)[0]), grown(batch(6)[0]), rtol=1e-6, atol=1e-6)
    features, targets = batch(6)
    logits = grown.train()(features.requires_grad_(), targets)
    torch.autograd.backward(torch.nn.functional.cross_entropy(logits, targets))
    assert torch.isfinite(logits).all()


def test_options_of_the_nearest_head_grow() -> None:
    anchor = simplex_etf(4, 6, rotation="haar")
    head = NearestETFHead(6, 4, anchor=anchor, class_weights=torch.tensor([1.0, 2.0, 3.0, 4.0]), momentum=0.3)
    grown, _ = expand_classes(head, 6)
    assert grown.anchor is not None
    assert is_simplex_etf(grown.anchor)
    assert (grown.anchor[:4] - anchor).norm(dim=-1).max() == pytest.approx(least(4, 6), abs=1e-5)
    assert grown.class_weights is not None
    assert grown.class_weights.tolist() == [1, 2, 3, 4, 1, 1]
    grown.reset_parameters()
    assert torch.equal(grown.frame, grown.anchor)
    assert grown.class_weights.tolist() == [1, 2, 3, 4, 1, 1]
    assert grown.averages.momentum == 0.3


def test_a_canonical_head_stays_canonical_where_it_can() -> None:
    grown, moved = expand_classes(FixedETFHead(8, 5, rotation="canonical"), 8)
    assert grown.canonical
    assert grown.state_dict() == {}
    assert moved.largest == pytest.approx(least(5, 8), abs=1e-6)
    stored, moved = expand_classes(grown, 9)
    assert not stored.canonical
    assert moved.largest == pytest.approx(least(8, 9), abs=1e-6)
    assert is_simplex_etf(stored.frame)
    stored.reset_parameters()


def test_a_given_rotation_grows() -> None:
    grown, moved = expand_classes(FixedETFHead(6, 4, rotation=random_stiefel(6, 3)), 5)
    frame = grown.frame.clone()
    grown.reset_parameters()
    assert torch.equal(grown.frame, frame)
    assert moved.largest == pytest.approx(least(4, 5), abs=1e-6)


@pytest.mark.parametrize("code", [OrthoplexCode(10, 16), KerdockCode(40, 16)])
def test_a_code_by_formula_has_more_words(code: Any) -> None:
    grown, moved = expand_classes(FixedCodeHead(16, code.num_classes, code=code), code.num_classes + 20)
    assert moved == (0, 0)
    assert grown(torch.eye(16)).shape == (16, code.num_classes + 20)


def test_new_rows_come_from_the_generator() -> None:
    for kind in (UnitRowHead, ClassMeanHead):
        head = kind(6, 4)
        frames = [
            expand_classes(head, 9, generator=torch.Generator().manual_seed(seed))[0].frame
            for seed in (0, 0, 1)
        ]
        assert torch.equal(frames[0], frames[1])
        assert not torch.allclose(frames[1][4:], frames[2][4:])


class Axes(CodeHead):
    @property
    def frame(self) -> Tensor:
        return torch.eye(self.num_classes, self.in_features)


@pytest.mark.parametrize(
    ("head", "num_classes", "message"),
    [
        (lambda: FixedETFHead(6, 4), 8, "in_features must be at least num_classes - 1 = 7.*FixedCodeHead"),
        (lambda: NearestETFHead(6, 4), 8, "in_features must be at least num_classes - 1 = 7.*FixedCodeHead"),
        (lambda: LearnedETFHead(6, 4), 4, "num_classes must be more than the 4 classes of the head, got 4"),
        (lambda: UnitRowHead(6, 4), 3, "num_classes must be more than the 4 classes"),
        (lambda: UnitRowHead(6, 4), 5.0, "num_classes must be an integer, got 5.0"),
        (
            lambda: FixedCodeHead(4, 5, code=OrthoplexCode(5, 4)),
            9,
            "num_classes must be at most 2 . in_features",
        ),
        (
            lambda: FixedCodeHead(2, 3, code=simplex_etf(3, 2)),
            4,
            "stored as a matrix, which has no more words",
        ),
        (lambda: NearestCodeHead(4, 5), 6, "head must be one that can grow, got NearestCodeHead"),
        (lambda: Axes(6, 4), 5, "head must be one that can grow, got Axes: make one for all classes"),
    ],
)
def test_what_cannot_grow_is_named(head: Any, num_classes: Any, message: str) -> None:
    made = head()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(InvalidArgumentError, match=message):
        expand_classes(made, num_classes)
    torch.testing.assert_close(made.state_dict(), before, rtol=0, atol=0)
