"""Batches that hold every class equally: by counting, over epochs and over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from etflayers.data import ClassBalancedSampler, balanced_order
from etflayers.errors import InvalidArgumentError

EVEN = torch.arange(4).repeat(50)
RARE = torch.tensor([0] * 90 + [1] * 7 + [2] * 2 + [3])


def order_of(targets: Tensor, seed: int = 0, **options: Any) -> Tensor:
    return balanced_order(targets, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("targets", [EVEN, RARE, RARE.flip(0)])
def test_batches_hold_every_class_equally(targets: Tensor) -> None:
    order = order_of(targets)
    assert len(order) == len(targets)
    for batch in targets[order].split(20)[:-1]:
        assert torch.bincount(batch, minlength=4).tolist() == [5, 5, 5, 5]
    assert torch.equal(order, order_of(targets))
    assert not torch.equal(order, order_of(targets, seed=1))


@pytest.mark.parametrize("targets", [EVEN, RARE])
def test_a_sample_comes_again_when_all_of_its_class_have_come(targets: Tensor) -> None:
    order = order_of(targets, num_samples=300)
    for label in range(4):
        mine = order[targets[order] == label]
        size = int((targets == label).sum())
        for turn in mine.split(size):
            assert len(turn.unique()) == len(turn)


def test_places_within_a_round_are_random() -> None:
    """Every class is first as often as the others: 500 of 2000 rounds, standard deviation 19."""
    firsts = EVEN[order_of(EVEN, num_samples=8000)].view(-1, 4)[:, 0]
    assert (torch.bincount(firsts) - 500).abs().max() < 5 * 20


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_ranks_share_one_order(replicas: int) -> None:
    options: dict[str, Any] = {"seed": 5, "num_replicas": replicas, "num_samples": 100}
    shares = [list(ClassBalancedSampler(RARE, rank=rank, **options)) for rank in range(replicas)]
    assert {len(share) for share in shares} == {-(-100 // replicas)}
    together = torch.tensor(shares).T.flatten()
    alone = ClassBalancedSampler(RARE, seed=5, num_samples=len(together))
    assert together.tolist() == list(alone)
    for batch in RARE[together].split(4):
        assert len(batch.unique()) == len(batch)


def test_epochs_differ_and_can_be_repeated() -> None:
    sampler = ClassBalancedSampler(RARE)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert first == again == list(sampler)
    assert second != first
    assert list(ClassBalancedSampler(RARE, seed=1)) != second  # seed 1 is not epoch 1


def test_it_is_a_sampler_of_a_loader_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    sampler = ClassBalancedSampler(RARE.tolist(), num_samples=40)
    assert len(sampler) == 40
    order = list(sampler)
    assert torch.equal(torch.get_rng_state(), before)
    loader = DataLoader(TensorDataset(torch.arange(100), RARE), batch_size=8, sampler=sampler)
    batches = list(loader)
    assert torch.cat([numbers for numbers, _ in batches]).tolist() == order
    assert all(torch.bincount(targets).tolist() == [2, 2, 2, 2] for _, targets in batches)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ([0, 2], {}, r"of 3 classes \[1\] have none"),
        ([0, 1], {"num_classes": 9}, r"of 9 classes \[2, 3, 4, 5, 6\] and more have none"),
        ([0, 1], {"num_classes": 1}, r"targets must be class indices in \[0, 1\)"),
        ([-1, 0], {}, r"targets must be class indices in \[0, K\), got values from -1 to 0"),
        ([0], {"num_samples": 0}, "num_samples must be at least 1"),
        ([0], {"seed": 2**31}, "seed must be less than"),
        ([0], {"num_replicas": 0}, "num_replicas must be at least 1"),
        ([0], {"num_replicas": 2, "rank": 2}, "rank must be less than num_replicas = 2, got 2"),
    ],
)
def test_bad_arguments_are_named(targets: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ClassBalancedSampler(targets, **options)
