"""The head that decides by the directions of class means: its rule, classes without one, what it trains."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from etflayers import ClassMeanHead
from etflayers.errors import InvalidArgumentError, ManifoldError
from etflayers.nn import FeatureMovingAverage

K, D = 7, 3  # no simplex ETF


def make(**options: Any) -> ClassMeanHead:
    generator = torch.Generator().manual_seed(0)
    return ClassMeanHead(D, K, generator=generator, dtype=torch.float64, **options)


def batch(seed: int, classes: int = K) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(9, D, generator=generator, dtype=torch.float64) + 1
    return features, torch.randint(classes, (9,), generator=generator)


@pytest.mark.parametrize("normalize", [False, True])
def test_rows_are_directions_of_moving_averages(normalize: bool) -> None:
    """Against a loop over classes in NumPy; classes of no batch so far keep their first row."""
    head = make(scale=3.0, momentum=0.3, normalize=normalize)
    rows = head.frame.numpy().copy()
    means: dict[int, Any] = {}
    for step in range(8):
        features, targets = batch(step, classes=3 if step < 4 else K - 1)
        logits = head(features, targets)
        inputs = features.numpy()
        if normalize:
            inputs = inputs / np.linalg.norm(inputs, axis=1, keepdims=True)
        for k in set(targets.tolist()):
            new = inputs[targets.numpy() == k].mean(0)
            means[k] = 0.7 * means[k] + 0.3 * new if k in means else new
            rows[k] = means[k] / np.linalg.norm(means[k])
        np.testing.assert_allclose(head.frame, rows, atol=1e-14)
        np.testing.assert_allclose(logits, 3 * inputs @ rows.T, atol=1e-13)
    assert K - 1 not in means
    assert len(means) > 3


def test_a_class_not_seen_has_a_direction_that_no_feature_prefers() -> None:
    """Its logits are those of a uniform direction: of both signs, with the variance |z|^2 / d."""
    rows = ClassMeanHead(D, 4000, generator=torch.Generator().manual_seed(1)).frame
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4000))
    inputs = torch.tensor([2.0, -1.0, 0.5])
    logits = rows @ inputs
    assert abs(logits.mean()) < 4 * (inputs.norm() / (D * 4000) ** 0.5)
    assert logits.var() == pytest.approx(float(inputs.square().sum() / D), rel=0.1)


@pytest.mark.parametrize("detach", [False, True])
def test_a_mean_of_zero_has_no_direction_either(detach: bool) -> None:
    head = make(detach=detach)
    before = head.frame
    features = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0]], dtype=torch.float64, requires_grad=True)
    logits = head(features, torch.tensor([0, 0, 1]))
    assert torch.equal(head.frame[0], before[0])
    assert torch.equal(head.frame[1], torch.tensor([0.0, 1, 0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(logits.square().sum(), features)
    assert bool(gradient.isfinite().all())


def test_the_option_decides_whether_a_gradient_flows_through_the_means() -> None:
    features, targets = batch(1)
    for detach in (False, True):
        head = make(momentum=0.4, detach=detach)
        head(*batch(0))
        average = FeatureMovingAverage(D, K, momentum=0.4, dtype=torch.float64)
        average.load_state_dict(head.averages.state_dict())
        mine, other = (features.clone().requires_grad_() for _ in range(2))
        means = average(other.detach() if detach else other, targets)
        rows = torch.where(average.seen[:, None], F.normalize(means, dim=1), head.initial_rows)
        expected = torch.autograd.grad(F.cross_entropy(other @ rows.T, targets), other)
        found = torch.autograd.grad(F.cross_entropy(head(mine, targets), targets), mine)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_constant_frame_is_one_in_forward_mode_too() -> None:
    features, targets = batch(1)
    head = make()
    head(*batch(0))
    twin = copy.deepcopy(head)
    twin(features, targets)
    tangent = torch.randn(features.shape, dtype=torch.float64)
    with forward_ad.dual_level():
        logits = head(forward_ad.make_dual(features, tangent), targets)
        found = forward_ad.unpack_dual(logits).tangent
    torch.testing.assert_close(found, tangent @ twin.frame.T)


def test_soft_targets_weigh_the_samples() -> None:
    features, _ = batch(0)
    shares = torch.rand(9, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    shares = shares / shares.sum(1, keepdim=True)
    head = make()
    head(features, shares)
    torch.testing.assert_close(head.frame, F.normalize(shares.T @ features, dim=1), rtol=1e-12, atol=0)


def test_an_average_of_models_averages_means() -> None:
    one, other = make(), make()
    one(*batch(0))
    other(*batch(1))
    states = one.state_dict(), other.state_dict()
    mean = {name: ((states[0][name] + states[1][name]) / 2).to(states[0][name].dtype) for name in states[0]}
    head = make()
    head.load_state_dict(mean)
    both = one.averages.seen & other.averages.seen
    expected = F.normalize(one.averages.means + other.averages.means, dim=1)
    torch.testing.assert_close(head.frame[both], expected[both])
    torch.testing.assert_close(head.frame.norm(dim=1), torch.ones(K, dtype=torch.float64))


def test_free_features_spread_over_the_circle() -> None:
    """Generalized collapse at K = 5, d = 2: equal angles between neighbors, features at their class means.

    Without a gradient through the means: they follow the features, and the features flee the other means.
    """
    torch.manual_seed(0)
    targets = torch.arange(5).repeat(4)
    features = torch.nn.Parameter(torch.randn(20, 2, dtype=torch.float64))
    head = ClassMeanHead(2, 5, scale=8.0, normalize=True, dtype=torch.float64)
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(head(features, targets), targets))
        optimizer.step()
    angles = torch.atan2(head.frame[:, 1], head.frame[:, 0]).sort().values
    gaps = torch.diff(torch.cat((angles, angles[:1] + 2 * torch.pi)))
    torch.testing.assert_close(gaps, torch.full_like(gaps, 2 * torch.pi / 5), rtol=0.02, atol=0)
    cosines = (F.normalize(features, dim=1) * head.frame[targets]).sum(1)
    assert float(cosines.detach().min()) > 1 - 1e-3


def test_what_no_training_wrote_is_refused() -> None:
    head = make()
    state = head.state_dict()
    for name, value in (("initial_rows", 0.0), ("initial_rows", torch.nan), ("initial_rows", torch.inf)):
        broken = {**state, name: torch.full_like(state[name], value)}
        head.load_state_dict(broken)
        for training in (True, False):
            before = head.averages.means.clone()
            with pytest.raises(ManifoldError, match="reset_parameters"):
                head.train(training)(*batch(0, classes=3))
            assert torch.equal(head.averages.means, before)
    with pytest.raises(RuntimeError, match=r"averages\.means must be finite"):
        head.load_state_dict({**state, "averages.means": torch.full((K, D), torch.nan)})


def test_bad_options_are_named() -> None:
    for options, name in (
        ({"detach": 1}, "detach"),
        ({"momentum": 0.0}, "momentum"),
        ({"scale": -1.0}, "scale"),
        ({"dtype": torch.int64}, "dtype"),
    ):
        with pytest.raises(InvalidArgumentError, match=name):
            ClassMeanHead(D, K, **options)
