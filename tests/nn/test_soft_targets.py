"""Soft targets: what they share with class indices, and the definition where they do not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers import (
    ClassMeanHead,
    ETFCrossEntropy,
    FixedETFHead,
    LearnedETFHead,
    NearestETFHead,
    provide_targets,
)
from etflayers.errors import InvalidArgumentError
from etflayers.functional import class_means, class_sums, code_cross_entropy, etf_cross_entropy
from etflayers.nn import FeatureMovingAverage
from etflayers.nn.averages import Momentum

MOMENTA: list[Momentum] = [0.3, 1.0, "2/(t+1)"]
INDICES = torch.tensor([0, 1, 2, 0, 1, 1])


def features_of(seed: int = 0, batch: int = 6, width: int = 5) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(targets: Tensor, num_classes: int = 4) -> Tensor:
    return F.one_hot(targets, num_classes).double()


def mixed(share: float = 0.7) -> Tensor:
    """What mixup makes of a batch and its roll: 0.7 of one class and 0.3 of another."""
    return share * one_hot(INDICES) + (1 - share) * one_hot(INDICES.roll(1))


def test_sums_and_masses_are_weighted() -> None:
    features, targets = features_of(), mixed()
    sums, mass = class_sums(features, targets, 4)
    for k in range(4):
        expected = sum(float(targets[i, k]) * features[i] for i in range(6))
        torch.testing.assert_close(sums[k], expected, rtol=1e-12, atol=1e-12)
    assert mass.tolist() == pytest.approx(targets.sum(0).tolist())
    means, _ = class_means(features, targets, 4)
    torch.testing.assert_close(means * mass.unsqueeze(-1), sums)
    assert not means[3].any()


def test_a_class_with_a_small_mass_has_its_mean() -> None:
    features = features_of(batch=1)
    means, _ = class_means(features, torch.tensor([[0.999, 0.001]], dtype=torch.float64), 2)
    torch.testing.assert_close(means, features.expand(2, -1))


def test_whole_shares_are_class_indices() -> None:
    features = features_of()
    hard, soft = class_sums(features, INDICES, 4), class_sums(features, one_hot(INDICES), 4)
    torch.testing.assert_close(soft[0], hard[0], rtol=1e-14, atol=1e-14)
    assert soft[1].tolist() == hard[1].tolist()


def test_sums_are_differentiable_in_both_and_batched() -> None:
    features, targets = features_of().requires_grad_(), mixed().requires_grad_()

    def sums_of_shares(rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return class_means(rows, logits.softmax(-1), 4)

    assert torch.autograd.gradcheck(sums_of_shares, (features, targets))
    assert torch.autograd.gradgradcheck(sums_of_shares, (features, targets))
    batches = torch.stack((features, 2 * features)), torch.stack((targets, targets.flip(0)))
    mapped = torch.vmap(sums_of_shares)(*batches)[0]
    looped = torch.stack([sums_of_shares(f, t)[0] for f, t in zip(*batches, strict=True)])
    torch.testing.assert_close(mapped, looped)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_averages_of_whole_shares_are_those_of_indices(momentum: Momentum) -> None:
    hard, soft = (FeatureMovingAverage(5, 4, momentum=momentum, dtype=torch.float64) for _ in range(2))
    for step in range(5):
        expected = hard(features_of(step), INDICES.roll(step))
        found = soft(features_of(step), one_hot(INDICES.roll(step)))
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(soft.counts, hard.counts)
    assert torch.equal(soft.updates, hard.updates)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_shares_are_copies_of_a_sample(momentum: Momentum) -> None:
    """A sample with shares (3/4, 1/4) is four copies of it, three of one class and one of another."""
    hard, soft = (FeatureMovingAverage(5, 4, momentum=momentum, dtype=torch.float64) for _ in range(2))
    copies = torch.cat((INDICES, INDICES, INDICES, INDICES.roll(1)))
    for step in range(5):
        features = features_of(step)
        # Every class here has a mass of more than one sample, so that all steps are whole.
        found = soft(features, mixed(0.75))
        torch.testing.assert_close(found, hard(features.repeat(4, 1), copies), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_less_than_a_sample_moves_its_class_by_that_much_less(momentum: Momentum) -> None:
    average = FeatureMovingAverage(1, 2, momentum=momentum, dtype=torch.float64)
    average(torch.zeros(2, 1, dtype=torch.float64), torch.tensor([0, 1]))
    whole = copy.deepcopy(average)
    one = torch.ones(1, 1, dtype=torch.float64)
    step = whole(one, torch.tensor([0]))[0]
    found = average(one, torch.tensor([[0.25, 0.75]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.stack((0.25 * step, 0.75 * step)))


def test_the_first_share_of_a_class_is_its_mean() -> None:
    average = FeatureMovingAverage(1, 2, momentum=0.1)
    average(torch.tensor([[3.0]]), torch.tensor([[0.9, 0.1]]))
    assert average.means.flatten().tolist() == pytest.approx([3.0, 3.0])
    assert average.counts.tolist() == [1, 1]
    assert average.seen.all()


def make_head(kind: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"scale": 2.0, "normalize": True, "dtype": torch.float64}
    if kind == "canonical":
        return FixedETFHead(5, 4, rotation="canonical", **options)
    if kind == "learned":
        return LearnedETFHead(5, 4, generator=generator, **options)
    if kind == "class means":
        return ClassMeanHead(5, 4, momentum=0.3, detach=False, generator=generator, **options)
    return NearestETFHead(5, 4, momentum=0.3, generator=generator, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["canonical", "learned", "nearest", "class means"])
def test_the_loss_from_features_is_that_of_the_logits(kind: str, reduction: Any, training: bool) -> None:
    head = make_head(kind)
    head(features_of(9), INDICES)
    head.train(training)
    twin = copy.deepcopy(head)
    criterion = ETFCrossEntropy(head, label_smoothing=0.1, reduction=reduction).train(training)
    features = features_of().requires_grad_()
    targets = mixed()
    loss = criterion(features, targets)
    expected = F.cross_entropy(twin(features, targets), targets, label_smoothing=0.1, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(loss.sum(), features)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected.sum(), features)[0], rtol=1e-10, atol=1e-12
    )
    for name, tensor in head.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=0, atol=1e-14)


def test_whole_shares_give_the_loss_of_indices() -> None:
    features, frame = features_of(), make_head("canonical").frame
    for loss in (
        lambda targets: etf_cross_entropy(features, targets, 4, label_smoothing=0.2),
        lambda targets: code_cross_entropy(features, frame, targets, label_smoothing=0.2),
    ):
        torch.testing.assert_close(loss(one_hot(INDICES)), loss(INDICES), rtol=1e-13, atol=0)


def test_the_gradient_of_a_head_in_training_is_the_derivative() -> None:
    head = make_head("nearest")
    head(features_of(9), INDICES)
    state = copy.deepcopy(head.state_dict())

    def loss(features: Tensor, targets: Tensor) -> Tensor:
        head.load_state_dict(state)
        shares = targets.softmax(-1)
        return F.cross_entropy(head(features, shares), shares)

    assert torch.autograd.gradcheck(loss, (features_of().requires_grad_(), mixed().requires_grad_()))


def test_leading_dimensions_and_provided_targets() -> None:
    flat, cube = make_head("nearest"), make_head("nearest")
    expected = flat(features_of(), mixed())
    with provide_targets(cube, mixed().view(2, 3, 4)):
        logits = cube(features_of().view(2, 3, 5))
    torch.testing.assert_close(logits.flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_shares_are_close_enough_to_probabilities(dtype: torch.dtype) -> None:
    shares = torch.rand(64, 100, generator=torch.Generator().manual_seed(0)).softmax(-1).to(dtype)
    features = torch.randn(64, 120, generator=torch.Generator().manual_seed(1)).to(dtype)
    head = NearestETFHead(120, 100)
    assert head(features, shares).dtype == dtype
    assert head.averages.means.isfinite().all()


def test_compiles_as_one_graph() -> None:
    eager, head = make_head("nearest"), make_head("nearest")
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for step in range(3):
        torch.testing.assert_close(compiled(features_of(step), mixed()), eager(features_of(step), mixed()))


NOT_SUMMING = mixed()
NOT_SUMMING[2] *= 1.1
NEGATIVE = mixed()
NEGATIVE[1, :2] += torch.tensor([0.9, -0.9])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (mixed()[:, :3], r"shape \(..., num_classes\) = \(6, 4\)"),
        (mixed()[:4], r"shape \(..., num_classes\) = \(6, 4\)"),
        (NOT_SUMMING, r"rows that sum to 1, got .* off by up to 0.1"),
        (NEGATIVE, r"not negative .* got entries from -0.[0-9]+ on"),
        (mixed() * torch.nan, "must be probabilities"),
        (one_hot(INDICES).long(), r"got \(6, 4\)"),
    ],
)
def test_bad_targets_are_named_before_anything_changes(targets: Tensor, message: str) -> None:
    head = make_head("nearest")
    head(features_of(), INDICES)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(InvalidArgumentError, match=message):
        head(features_of(), targets)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    with pytest.raises(InvalidArgumentError, match="targets"):
        code_cross_entropy(features_of(), head.frame, targets)
    with pytest.raises(InvalidArgumentError, match="targets"):
        etf_cross_entropy(features_of(), targets, 4)


def test_the_cumulative_mean_asks_for_whole_samples() -> None:
    head = NearestETFHead(5, 4, momentum=None, dtype=torch.float64)
    with pytest.raises(InvalidArgumentError, match=r"momentum=None .* take a number or '2/\(t\+1\)'"):
        head(features_of(), mixed())
