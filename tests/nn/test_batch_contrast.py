"""The modules of NTCE and NONL: with heads, with weights, in training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etflayers import CodeHead, NONLLoss, NTCELoss
from etflayers.errors import InvalidArgumentError, MissingTargetsError
from etflayers.functional import nonl_loss, ntce_loss
from etflayers.nn import NearestETFHead
from tests.nn.conftest import MakeHead

LOSSES: Any = {NTCELoss: ntce_loss, NONLLoss: nonl_loss}
TARGETS = torch.tensor([0, 1, 2, 3, 0, 1, -100, 3])
both = pytest.mark.parametrize("kind", LOSSES)


def centered(head: CodeHead, features: Tensor) -> Tensor:
    return features if head.center is None else features - head.center


@both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_head_gives_its_frame_and_its_center(make_head: MakeHead, kind: Any, reduction: Any) -> None:
    head = make_head(scale=7.0, dtype=torch.float64)
    features = torch.randn(8, 6, dtype=torch.float64) + 1
    loss = kind(0.3, reduction=reduction)
    first = loss(features, TARGETS, head)
    # What a training pass has changed is what it has used.
    expected = LOSSES[kind](centered(head, features), head.frame, TARGETS, tau=0.3, reduction=reduction)
    torch.testing.assert_close(first, expected)
    head.eval()
    torch.testing.assert_close(loss(features, TARGETS, head), expected)
    torch.testing.assert_close(copy.deepcopy(loss)(centered(head, features), TARGETS, head.frame), expected)


@both
def test_a_head_learns_in_training_and_asks_for_targets(kind: Any) -> None:
    head = NearestETFHead(6, 4)
    kind(0.3)(torch.randn(8, 6), TARGETS, head)
    assert int(head.averages.updates.sum()) == 4
    with pytest.raises(MissingTargetsError):
        kind(0.3)(torch.randn(8, 6), None, head)


@both
def test_a_linear_layer_and_its_features_learn_the_classes(kind: Any) -> None:
    torch.manual_seed(0)
    targets = torch.arange(4).repeat(4)
    features = nn.Parameter(torch.randn(16, 6))
    linear = nn.Linear(6, 4, bias=False)
    optimizer = torch.optim.SGD([features, *linear.parameters()], lr=1.0)
    loss = kind(tau=0.5)
    for _ in range(800):
        optimizer.zero_grad()
        loss(features, targets, linear.weight).backward()
        optimizer.step()
    cosines = nn.functional.normalize(features) @ nn.functional.normalize(linear.weight).T
    assert bool((cosines.argmax(-1) == targets).all())
    # Collapse: each sample has the direction of its row.
    assert cosines[torch.arange(16), targets].min() > 0.99


@both
def test_compiles_as_one_graph(kind: Any) -> None:
    features, weight = torch.randn(8, 6), torch.randn(4, 6)
    compiled = torch.compile(kind(0.3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, TARGETS, weight), kind(0.3)(features, TARGETS, weight))


@both
def test_bad_arguments_are_named(kind: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="tau must be a finite number > 0, got -1"):
        kind(-1)
    with pytest.raises(InvalidArgumentError, match="reduction must be"):
        kind(1.0, reduction="avg")
    with pytest.raises(InvalidArgumentError, match=r"got Linear: of a linear layer pass its \.weight"):
        kind(1.0)(torch.randn(8, 6), TARGETS, nn.Linear(6, 4))
    assert repr(kind(0.5)) == f"{kind.__name__}(tau=0.5, ignore_index=-100, reduction='mean')"
