"""The head with free unit rows: its derivative, its start, and what its rows end as."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etflayers import UnitRowHead
from etflayers.geometry import is_simplex_etf
from etflayers.metrics import equinorm, read_classifier


@pytest.mark.parametrize("normalize", [False, True])
def test_value_and_gradients_are_those_of_normalized_rows(normalize: bool) -> None:
    """The lines that code without this head has, by autograd alone."""
    head = UnitRowHead(5, 3, scale=2.0, normalize=normalize, dtype=torch.float64)
    features = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows = head.prototypes.detach().clone().requires_grad_()
    inputs = F.normalize(features, dim=-1) if normalize else features
    expected = 2.0 * F.linear(inputs, F.normalize(rows, dim=-1))
    logits = head(features)
    torch.testing.assert_close(logits, expected, rtol=1e-14, atol=1e-14)
    ours = torch.autograd.grad(logits.sin().sum(), (features, head.prototypes))
    theirs = torch.autograd.grad(expected.sin().sum(), (features, rows))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)
    # Along a row the logits do not change.
    along = (ours[1] * head.prototypes).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-14)


def test_lengths_of_rows_do_not_count_for_who_reads_the_classifier() -> None:
    head = UnitRowHead(5, 3, scale=2.0)
    with torch.no_grad():
        head.prototypes *= torch.tensor([[1.0], [10.0], [100.0]])
    features = torch.randn(4, 5)
    torch.testing.assert_close(read_classifier(head).logits(features), head(features).detach())
    assert equinorm(read_classifier(head).weight) < 1e-6


def test_the_start_is_that_of_a_linear_layer() -> None:
    torch.manual_seed(3)
    linear = nn.Linear(6, 4, bias=False)
    torch.manual_seed(3)
    head = UnitRowHead(6, 4)
    assert torch.equal(head.prototypes, linear.weight)
    torch.manual_seed(3)
    head.reset_parameters()
    assert torch.equal(head.prototypes, linear.weight)
    given = UnitRowHead(6, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(given.prototypes, linear.weight)


def test_a_row_without_a_direction_gives_zero_logits_and_finite_gradients() -> None:
    head = UnitRowHead(5, 3)
    with torch.no_grad():
        head.prototypes[1] = 0
    logits = head(torch.randn(4, 5))
    assert not logits[:, 1].any()
    torch.autograd.backward(logits.square().sum())
    gradient = head.prototypes.grad
    assert gradient is not None
    assert not gradient[1].any()
    assert bool(torch.isfinite(gradient).all())


def test_rows_that_repel_each_other_become_a_simplex() -> None:
    """Cross-entropy of the rows themselves as features is least where all are equally far apart."""
    head = UnitRowHead(4, 4, scale=5.0, normalize=True, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(head.frame), torch.arange(4))
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    assert is_simplex_etf(head.frame.detach(), atol=1e-4)
