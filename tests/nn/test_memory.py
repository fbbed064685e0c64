"""The memory of features, against means and choices from all data at once."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from etflayers import FixedETFHead
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.nn import FeatureMemory
from etflayers.storage import write_tensors

Bad = InvalidArgumentError


def data(size: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Classes 0 to 3 of five, some samples ignored; the mean is large beside the spread."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, 3, generator=generator) + 50
    targets = torch.randint(4, (size,), generator=generator)
    targets[::7] = -100
    return features, targets


def filled(capacity: int = 4, parts: int = 1, seed: int = 0) -> FeatureMemory:
    memory, generator = FeatureMemory(3, 5, capacity=capacity), torch.Generator().manual_seed(seed)
    for features, targets in zip(*(tensor.chunk(parts) for tensor in data()), strict=True):
        memory.update(features, targets, generator=generator)
    return memory


def assert_same(one: FeatureMemory, other: FeatureMemory) -> None:
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.keys, other.keys)
    assert torch.equal(one.features, other.features)
    torch.testing.assert_close(one.means, other.means, rtol=1e-6, atol=0)


@pytest.mark.parametrize("parts", [1, 3, 60])
def test_means_and_counts_are_those_of_all_data(parts: int) -> None:
    memory, (features, targets) = filled(parts=parts), data()
    for k in range(4):
        rows = features[targets == k]
        assert int(memory.counts[k]) == len(rows)
        torch.testing.assert_close(memory.means[k], rows.double().mean(0).float(), rtol=1e-6, atol=0)
        kept = memory.features[k]
        assert len(kept.unique(dim=0)) == 4
        assert all(bool((rows == row).all(-1).any()) for row in kept)  # of its own class, as it was
    assert memory.remembered.tolist() == [0, 1, 2, 3]


def test_what_is_kept_does_not_depend_on_the_grouping() -> None:
    """The same keys, in one batch, in parts, or in two memories that are merged in any order."""
    whole, (features, targets) = filled(), data()
    assert_same(filled(parts=5), whole)
    halves, generator = [], torch.Generator().manual_seed(0)
    for rows, labels in zip(features.chunk(2), targets.chunk(2), strict=True):
        half = FeatureMemory(3, 5, capacity=4)
        halves.append(half.update(rows, labels, generator=generator))
    for one, other in (halves, halves[::-1]):
        before = copy.deepcopy(other.state_dict())
        assert_same(copy.deepcopy(one).merge(other), whole)
        torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)


def test_every_feature_has_the_same_chance() -> None:
    """Of 20 features 5 are kept: each in a quarter of 2000 runs, within 4.5 standard deviations."""
    features, runs = torch.arange(20.0).unsqueeze(-1), 2000
    generator, times = torch.Generator().manual_seed(0), torch.zeros(20)
    for _ in range(runs):
        memory = FeatureMemory(1, 1, capacity=5)
        for part in features.split(8):
            memory.update(part, torch.zeros(len(part), dtype=torch.int64), generator=generator)
        times[memory.features.flatten().long()] += 1
    deviation = (runs * 0.25 * 0.75) ** 0.5
    assert float(times.sum()) == 5 * runs
    assert float((times - runs / 4).abs().max()) < 4.5 * deviation


def test_a_memory_for_more_classes_takes_an_old_one() -> None:
    old = filled()
    grown = FeatureMemory(3, 9, capacity=4).merge(old)
    assert_same(FeatureMemory(3, 9, capacity=4).merge(grown), grown)
    assert torch.equal(grown.features[:5], old.features)
    assert not grown.counts[5:].any()


def test_replay_is_balanced_and_of_what_was_seen() -> None:
    memory = filled()
    generator = torch.Generator().manual_seed(1)
    features, targets = memory.sample(4000, generator=generator)
    counts = torch.bincount(targets, minlength=5)
    assert int(counts[4]) == 0
    assert float((counts[:4] - 1000).abs().max()) < 4.5 * (4000 * 0.25 * 0.75) ** 0.5
    for k in range(4):
        assert len(features[targets == k].unique(dim=0)) == 4
    assert (memory.features[targets] == features.unsqueeze(1)).all(-1).any(-1).all()
    assert memory.sample(50, classes=[2])[1].unique().tolist() == [2]
    sparse = FeatureMemory(3, 5, capacity=4).update(torch.ones(1, 3), torch.tensor([2]))
    assert torch.equal(sparse.sample(20)[0], torch.ones(20, 3))  # never an empty place
    means, classes = FeatureMemory(3, 5).merge(filled(capacity=0)).sample(30, generator=generator)
    assert torch.equal(means, filled(capacity=0).means[classes])


def test_a_head_takes_what_is_replayed() -> None:
    memory, head = filled(), FixedETFHead(3, 4)
    for features, targets in (memory.sample(8), memory.means_of()):
        assert torch.isfinite(torch.nn.functional.cross_entropy(head(features), targets))
    with pytest.raises(Bad, match="features must have shape"):
        FixedETFHead(4, 4)(memory.sample(8)[0])


def test_files_and_copies(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    memory = filled()
    memory.save(tmp_path / "memory.safetensors")
    loaded = FeatureMemory.load(tmp_path / "memory.safetensors")
    assert repr(loaded) == repr(memory)
    twin = FeatureMemory(3, 5, capacity=4)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, twin, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert_same(other, memory)
    write_tensors(tmp_path / "other.safetensors", {"rows": torch.ones(1)}, {"spherical_code": {}})
    with pytest.raises(Bad, match="holds no FeatureMemory"):
        FeatureMemory.load(tmp_path / "other.safetensors")
    memory.reset_parameters()
    assert_same(memory, FeatureMemory(3, 5, capacity=4))


def test_half_precision_is_remembered_in_float32() -> None:
    memory = FeatureMemory(3, 5, capacity=2).half()
    memory.update(torch.ones(2, 3).bfloat16(), torch.tensor([0, 1]))
    assert memory.means.dtype == memory.features.dtype == torch.float32
    assert memory.keys.dtype == torch.int64


def test_nothing_is_part_of_a_graph() -> None:
    features = torch.ones(2, 3, requires_grad=True)
    memory = FeatureMemory(3, 5, capacity=2).update(features, torch.tensor([0, 1]))
    assert not any(buffer.requires_grad for buffer in memory.buffers())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.update(torch.ones(2, 4), torch.tensor([0, 1])), Bad, r"\(..., 3\), as the memory, got"),
        (lambda m: m.update(torch.ones(2, 3), torch.tensor([0])), Bad, "targets must have the leading shape"),
        (
            lambda m: m.update(torch.ones(2, 3), torch.tensor([0, 5])),
            Bad,
            r"targets must be class indices in",
        ),
        (lambda m: m.update(torch.ones(2, 3), torch.ones(2)), Bad, "targets must be integers"),
        (lambda m: m.update(torch.full((1, 3), torch.nan), torch.tensor([0])), NonFiniteError, "features"),
        (lambda m: m.merge(FeatureMemory(4, 5, capacity=4)), Bad, "other must have in_features = 3 and cap"),
        (lambda m: m.merge(FeatureMemory(3, 5, capacity=2)), Bad, "capacity = 4, got 3 and 2"),
        (lambda m: m.merge(FeatureMemory(3, 6, capacity=4)), Bad, "at most num_classes = 5, got 6"),
        (lambda m: m.merge(m), Bad, "other must not be the memory itself"),
        (lambda m: m.merge(None), Bad, "other must be a FeatureMemory, got NoneType"),
        (lambda m: m.means_of([4]), Bad, r"classes must have been seen by the memory, got \[4\]"),
        (lambda m: m.means_of([7]), Bad, r"classes must be in \[0, 5\)"),
        (lambda m: m.means_of([]), Bad, "classes must name at least one class"),
        (lambda m: m.sample(0), Bad, "batch_size must be at least 1, got 0"),
        (lambda m: FeatureMemory(3, 5).sample(1), Bad, "the memory is empty"),
        (lambda m: FeatureMemory(3, 5, capacity=-1), Bad, "capacity must be at least 0, got -1"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(call: Any, error: Any, message: str) -> None:
    memory = filled()
    before = copy.deepcopy(memory.state_dict())
    with pytest.raises(error, match=message):
        call(memory)
    torch.testing.assert_close(memory.state_dict(), before, rtol=0, atol=0)
