"""The assignment of classes to words against every permutation there is."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.functional import assign_labels

pytest.importorskip("scipy")


def gaussian(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(means: Tensor, words: Tensor, assignment: Tensor) -> float:
    return float((F.normalize(means, dim=1) * words[assignment]).sum())


@pytest.mark.parametrize(("k", "n", "d"), [(1, 1, 2), (2, 4, 1), (5, 5, 3), (4, 6, 2), (6, 6, 8), (6, 7, 3)])
def test_no_permutation_is_better(k: int, n: int, d: int) -> None:
    for seed in range(5):
        means, words = gaussian(k, d, seed=seed) + 0.5, gaussian(n, d, seed=100 + seed)
        found = assign_labels(means, words)
        assert found.dtype == torch.int64
        assert found.shape == (k,)
        assert len(set(found.tolist())) == k
        best = max(value(means, words, torch.tensor(p)) for p in permutations(range(n), k))
        assert value(means, words, found) == pytest.approx(best, abs=1e-12)


def test_words_in_another_order_are_found() -> None:
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    words = F.normalize(gaussian(300, 20, seed=1), dim=1)
    means = 3 * words[order] + 0.1 * gaussian(300, 20, seed=2)
    assert torch.equal(assign_labels(means, words), order)
    assert torch.equal(assign_labels(means.float(), words.bfloat16()), order)


def test_what_the_assignment_does_not_depend_on() -> None:
    means, words = gaussian(6, 3, seed=0), gaussian(8, 3, seed=1)
    found = assign_labels(means, words)
    lengths = gaussian(6, 1, seed=2).exp()
    assert torch.equal(assign_labels(lengths * means, 5 * words), found)
    assert torch.equal(assign_labels(means, words + gaussian(1, 3, seed=3)), found)


def test_a_common_mean_counts_until_it_is_subtracted() -> None:
    means, vertices = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert assign_labels(means, vertices).tolist() == [0, 1]
    shifted = means + torch.tensor([5.0, 4.0])  # cosines with the first word: 0.77 and 0.80
    assert assign_labels(shifted, vertices).tolist() == [1, 0]
    assert assign_labels(shifted - shifted.mean(0), vertices).tolist() == [0, 1]


def test_a_mean_of_zero_takes_what_is_left() -> None:
    assert assign_labels(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.eye(2)).tolist() == [1, 0]


def test_gradients_are_not_recorded() -> None:
    assert not assign_labels(torch.eye(3, requires_grad=True), torch.eye(3)).requires_grad


@pytest.mark.parametrize(
    ("means", "words", "message"),
    [
        (torch.eye(3), torch.eye(2, 3), r"N >= K, got \(3, 3\) and \(2, 3\)"),
        (torch.eye(3), torch.eye(3, 4), r"got \(3, 3\) and \(3, 4\)"),
        (torch.ones(3), torch.eye(3), r"means must have two dimensions, got shape \(3,\)"),
        (torch.eye(3), torch.eye(3).long(), "words must have a real floating-point dtype"),
    ],
)
def test_bad_shapes_are_named(means: Tensor, words: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        assign_labels(means, words)


def test_values_that_are_not_there_or_not_finite_are_refused() -> None:
    with pytest.raises(NonFiniteError, match="means"):
        assign_labels(torch.full((2, 2), torch.nan), torch.eye(2))
    with pytest.raises(InvalidArgumentError, match="traced"):
        assign_labels(torch.eye(2, device="meta"), torch.eye(2))
