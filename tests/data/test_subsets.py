"""Long tails by their published formulas, and the samples that are chosen for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from etflayers.data import class_subset, long_tail_sizes
from etflayers.errors import InvalidArgumentError

TARGETS = torch.arange(4).repeat(50)


@pytest.mark.parametrize(("num_classes", "ratio"), [(10, 100), (10, 10), (100, 50), (3, 1.0)])
def test_exponential_sizes_are_those_of_cui_et_al(num_classes: int, ratio: float) -> None:
    """n_k = n mu^k with mu chosen so that the last class has n / r, in a loop."""
    mu = (1 / ratio) ** (1 / (num_classes - 1))
    expected = [max(1, round(5000 * mu**k)) for k in range(num_classes)]
    sizes = long_tail_sizes(5000, num_classes, ratio=ratio)
    assert sizes.tolist() == expected
    assert int(sizes[0]) == 5000
    assert int(sizes[-1]) == round(5000 / ratio)


@pytest.mark.parametrize(
    ("num_classes", "rare", "expected"),
    [(4, None, [50, 50, 5, 5]), (5, None, [50, 50, 50, 5, 5]), (4, 3, [50, 5, 5, 5]), (3, 0, [50, 50, 50])],
)
def test_step_sizes(num_classes: int, rare: int | None, expected: list[int]) -> None:
    assert long_tail_sizes(50, num_classes, ratio=10, kind="step", rare=rare).tolist() == expected


def test_no_class_dies_out() -> None:
    assert long_tail_sizes(50, 4, ratio=1e9).tolist()[-1] == 1


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(0, 9), min_size=4, max_size=4)
)
def test_a_subset_has_the_sizes_and_nothing_twice(targets: list[int], wanted: list[int]) -> None:
    labels = torch.tensor(targets)
    sizes = torch.minimum(torch.tensor(wanted), torch.bincount(labels, minlength=4))
    chosen = class_subset(targets, sizes)
    assert torch.equal(torch.bincount(labels[chosen], minlength=4), sizes)
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_the_choice_is_the_seeds_and_never_changes() -> None:
    """These numbers are what published subsets would be made of: NumPy guarantees them."""
    chosen = class_subset(TARGETS, [3, 2, 1, 1])
    assert chosen.tolist() == class_subset(TARGETS.tolist(), (3, 2, 1, 1)).tolist()
    random, expected = np.random.RandomState(0), []
    for label, size in enumerate((3, 2, 1, 1)):
        expected += [label + 4 * int(place) for place in random.permutation(50)[:size]]
    assert chosen.tolist() == sorted(expected)
    assert not torch.equal(chosen, class_subset(TARGETS, [3, 2, 1, 1], seed=1))


def test_every_sample_of_a_class_is_as_likely() -> None:
    counts = torch.zeros(5)
    for seed in range(500):
        counts[class_subset([0] * 5, [2], seed=seed)] += 1
    # 200 times each, standard deviation sqrt(500 * .4 * .6) = 11.
    assert (counts - 200).abs().max() < 5 * 11


def test_it_makes_a_subset_of_pytorch() -> None:
    data = TensorDataset(torch.arange(200), TARGETS)
    rare = Subset(data, class_subset(TARGETS, long_tail_sizes(50, 4, ratio=8)).tolist())
    assert torch.bincount(torch.stack([y for _, y in rare])).tolist() == [50, 25, 12, 6]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4), {"ratio": 2}, "largest must be at least 1, got 0"),
        ((5, 1), {"ratio": 2}, "num_classes must be at least 2, got 1"),
        ((5, 4), {"ratio": 0.5}, "ratio must be at least 1"),
        ((5, 4), {"ratio": float("inf")}, "ratio must be a finite number"),
        ((5, 4), {"ratio": 2, "kind": "linear"}, "kind must be 'exponential' or 'step', got 'linear'"),
        ((5, 4), {"ratio": 2, "rare": 1}, "rare is a part of kind='step'"),
        ((5, 4), {"ratio": 2, "kind": "step", "rare": 5}, "rare must be at most num_classes = 4, got 5"),
    ],
)
def test_bad_tails_are_named(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        long_tail_sizes(*arguments, **options)


@pytest.mark.parametrize(
    ("targets", "sizes", "options", "message"),
    [
        ([0, 1, 1], [1, 3], {}, "class 1 has 2, got 3"),
        ([0, 1, 1], [1, -1], {}, "class 1 has 2, got -1"),
        ([0, 1, 2], [1, 1], {}, r"targets must be class indices in \[0, 2\), got values from 0 to 2"),
        ([-1, 1], [1, 1], {}, "got values from -1 to 1"),
        ([], [1, 1], {}, "targets must hold at least one sample"),
        ([0.5], [1], {}, "targets must be integers of shape"),
        (torch.zeros(2, 2).long(), [1], {}, r"targets must be integers .* of shape \(2, 2\)"),
        ([0, 1], [0.5, 1.0], {}, "sizes must be integers"),
        ([0, 1], [1, 1], {"seed": -1}, "seed must be at least 0"),
        ([0, 1], [1, 1], {"seed": 2**32}, "seed must be less than"),
    ],
)
def test_bad_subsets_are_named(targets: Any, sizes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        class_subset(targets, sizes, **options)
