"""Label noise: what shares of which class it makes of each class, against the transition matrix meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from etflayers.data import NoisyLabels, latent_classes, symmetric_noise, transition_noise
from etflayers.errors import InvalidArgumentError

K = 4
TARGETS = torch.arange(K).repeat(10_000)
RATES = torch.tensor([0.0, 0.3, 0.9, 1.0])
MATRIX = torch.tensor(
    [[0.7, 0.1, 0.2, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5], [0.25, 0.25, 0.25, 0.25]]
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies(noisy: Tensor, num_labels: int = K) -> Tensor:
    """T as found: the share of the samples of k that have label j."""
    pairs = torch.bincount(TARGETS * num_labels + noisy, minlength=K * num_labels).view(K, num_labels)
    return pairs / pairs.sum(1, keepdim=True)


def assert_frequencies(found: Tensor, expected: Tensor) -> None:
    """Within five standard deviations of a binomial share of 10000; exactly where nothing is random."""
    spread = (expected * (1 - expected) / 10_000).sqrt()
    assert ((found - expected).abs() <= 5 * spread).all(), found


@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0, RATES])
def test_symmetric_noise_is_a_step_of_its_transition_matrix(eta: float | Tensor) -> None:
    noisy = symmetric_noise(TARGETS, K, eta, generator=seeded())
    rates = torch.as_tensor(eta).expand(K).unsqueeze(1)
    assert_frequencies(frequencies(noisy.targets), (1 - rates) * torch.eye(K) + rates / K)
    drawn = torch.stack([noisy.redrawn[k == TARGETS].float().mean() for k in range(K)])
    assert_frequencies(drawn, rates.squeeze(1))


def test_transition_noise_is_a_step_of_its_matrix() -> None:
    noisy = transition_noise(TARGETS, MATRIX, generator=seeded())
    assert_frequencies(frequencies(noisy.targets), MATRIX)
    assert noisy.redrawn.all()


def test_a_class_of_probability_zero_is_never_drawn() -> None:
    """Even where a row falls short of one by rounding, and its last classes have no probability."""
    short = torch.tensor([[0.5, 0.5 - 9e-6, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    noisy = transition_noise(torch.zeros(1_000_000).long(), short, generator=seeded())
    assert noisy.targets.unique().tolist() == [0, 1]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, RATES])
def test_latent_classes_take_their_share_of_each_class(share: float | Tensor) -> None:
    noisy = latent_classes(TARGETS, K, share, generator=seeded())
    rates = torch.as_tensor(share).expand(K)
    expected = torch.cat([torch.diag(1 - rates), torch.diag(rates)], dim=1)
    assert_frequencies(frequencies(noisy.targets, 2 * K), expected)
    assert torch.equal(noisy.targets % K, TARGETS)


NOISES: list[Callable[..., NoisyLabels]] = [
    lambda y, g=None: symmetric_noise(y, K, 0.5, generator=g),
    lambda y, g=None: transition_noise(y, MATRIX, generator=g),
    lambda y, g=None: latent_classes(y, K, 0.5, generator=g),
]


@pytest.mark.parametrize("noise", NOISES)
def test_the_record_says_what_changed_and_the_seed_decides(noise: Callable[..., NoisyLabels]) -> None:
    before = torch.get_rng_state()
    noisy = noise(TARGETS, seeded())
    assert torch.equal(noisy.changed, noisy.targets != TARGETS)
    assert not (noisy.changed & ~noisy.redrawn).any()
    assert all(map(torch.equal, noisy, noise(TARGETS.tolist(), seeded())))
    assert not torch.equal(noisy.targets, noise(TARGETS, seeded(1)).targets)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    first = noise(TARGETS)
    torch.manual_seed(3)
    assert torch.equal(noise(TARGETS).targets, first.targets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: symmetric_noise([0, 1], 2, 1.5), r"eta must be a probability in \[0, 1\], got 1.5"),
        (lambda: symmetric_noise([0, 1], 2, -0.1), r"eta must be a probability in \[0, 1\], got -0.1"),
        (lambda: symmetric_noise([0, 1], 2, float("nan")), r"eta must be a probability in \[0, 1\], got nan"),
        (lambda: symmetric_noise([0, 1], 2, torch.ones(3)), r"shape \(num_classes,\) = \(2,\), got \(3,\)"),
        (lambda: symmetric_noise([0, 2], 2, 0.1), r"targets must be class indices in \[0, 2\)"),
        (lambda: symmetric_noise([0, 0], 1, 0.1), "num_classes must be at least 2"),
        (lambda: latent_classes([0, 1], 2, torch.tensor([0.0, 2.0])), "share must be a probability"),
        (lambda: latent_classes([0, 1], 1, 0.5), "targets must be class indices"),
        (lambda: transition_noise([0], torch.ones(2, 2)), "sum to one, got 2 for class 0: divide"),
        (lambda: transition_noise([0], torch.tensor([[2.0, -1.0], [0.0, 1.0]])), "finite numbers >= 0"),
        (lambda: transition_noise([0], torch.full((2, 2), torch.nan)), "finite numbers >= 0"),
        (lambda: transition_noise([0], torch.ones(2, 3) / 3), r"shape \(K, K\), got \(2, 3\)"),
        (lambda: transition_noise([0], [[1.0]]), r"shape \(K, K\), got list"),
        (lambda: transition_noise([0], torch.eye(2).long()), "transition must have a real floating"),
        (lambda: transition_noise([2], torch.eye(2)), r"targets must be class indices in \[0, 2\)"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call()
