"""Free features: where they start, what the head is given, and where descent takes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etflayers.errors import InvalidArgumentError
from etflayers.metrics import class_statistics, collapse_measures, read_classifier
from etflayers.nn import NearestETFHead, UnitRowHead
from etflayers.unconstrained import UnconstrainedFeatures


def test_features_start_on_the_sphere_by_the_generator() -> None:
    first, second = (
        UnconstrainedFeatures(nn.Linear(5, 3), 4, generator=torch.Generator().manual_seed(7)).features
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.shape == (12, 5)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(12))


@pytest.mark.parametrize("head", [nn.Linear(5, 3), UnitRowHead(5, 3)])
def test_logits_are_those_of_the_head(head: nn.Module) -> None:
    model = UnconstrainedFeatures(head, 2)
    assert torch.equal(model(), head(model.features))
    assert set(dict(model.named_parameters())) == {"features"} | {
        f"head.{n}" for n, _ in head.named_parameters()
    }


def test_a_head_that_learns_from_targets_gets_them() -> None:
    model = UnconstrainedFeatures(head := NearestETFHead(5, 3, momentum=1.0), 2)
    model()
    means = model.features.detach().view(3, 2, 5).mean(1)
    torch.testing.assert_close(head.averages.means, means)


def test_descent_collapses() -> None:
    """With decay of both factors the minimum is a simplex ETF, of features and of weights."""
    model = UnconstrainedFeatures(nn.Linear(4, 3), 5, dtype=torch.float64).double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1000, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        decay = sum(parameter.square().sum() for parameter in model.parameters())
        loss = F.cross_entropy(model(), model.targets) + 0.005 * decay
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    statistics = class_statistics(model.features.detach(), model.targets, 3)
    measures = collapse_measures(statistics, read_classifier(model.head))
    for name in ("nc1_trace", "nc2_etf_distance_means", "nc2_etf_distance_weights", "nc3_distance"):
        assert measures[name] < 1e-3, name


@pytest.mark.parametrize(
    ("head", "per_class", "message"),
    [
        (nn.Identity(), 1, "head must say in_features, .* Identity has None and None"),
        (nn.Linear(2, 3), 0, "per_class must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(head: nn.Module, per_class: int, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        UnconstrainedFeatures(head, per_class)
