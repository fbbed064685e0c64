"""Class sums and means against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from etflayers.distill.peak_memory import PeakMemory
from etflayers.errors import EtfLayersError, InvalidArgumentError, NonFiniteError
from etflayers.functional.class_means import class_means, class_sums, some_ignored

IGNORE = -100


def loop_sums(features: Tensor, targets: Tensor, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    sums = np.zeros((num_classes, features.shape[1]))
    counts = np.zeros(num_classes, dtype=np.int64)
    for row, target in zip(features.double().numpy(), targets.tolist(), strict=True):
        if target != IGNORE:
            sums[target] += row
            counts[target] += 1
    return sums, counts


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_sums_and_counts_agree_with_loops(generator: torch.Generator, target_dtype: torch.dtype) -> None:
    features = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (50,), generator=generator).to(target_dtype)  # class 4 of 5 is absent

    sums, counts = class_sums(features, targets, 5)

    expected_sums, expected_counts = loop_sums(features, targets, 5)
    np.testing.assert_allclose(sums, expected_sums, atol=1e-13)
    np.testing.assert_array_equal(counts, expected_counts)
    assert counts.dtype == torch.int64


def test_means_are_sums_over_counts_and_zero_for_absent_classes(generator: torch.Generator) -> None:
    features = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(1, 4, (30,), generator=generator)

    means, counts = class_means(features, targets, 5)

    sums, expected_counts = loop_sums(features, targets, 5)
    np.testing.assert_allclose(means, sums / np.maximum(expected_counts, 1)[:, None], atol=1e-14)
    assert means[0].tolist() == means[4].tolist() == [0.0, 0.0, 0.0]
    assert counts[0] == counts[4] == 0


@pytest.mark.parametrize("ignore_index", [IGNORE, 1])
def test_ignored_rows_do_not_count_even_if_the_ignored_index_is_a_class(
    generator: torch.Generator, ignore_index: int
) -> None:
    features = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (20,), generator=generator)
    targets[::3] = ignore_index

    sums, counts = class_sums(features, targets, 3, ignore_index=ignore_index)

    expected = loop_sums(features, torch.where(targets == ignore_index, IGNORE, targets), 3)
    np.testing.assert_allclose(sums, expected[0], atol=1e-14)
    np.testing.assert_array_equal(counts, expected[1])
    means, counts = class_means(features, targets, 3, ignore_index=ignore_index)
    np.testing.assert_allclose(means, expected[0] / np.maximum(expected[1], 1)[:, None], atol=1e-14)
    np.testing.assert_array_equal(counts, expected[1])


def test_an_ignore_index_that_wraps_around_uint8_ignores_nothing() -> None:
    targets = torch.tensor([156, 0], dtype=torch.uint8)  # 156 = -100 modulo 256

    _, counts = class_sums(torch.ones(2, 1), targets, 200)

    assert counts[156] == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("ignore_index", [IGNORE, 1, 156])
def test_a_look_at_the_extremes_tells_what_a_comparison_of_each_tells(
    dtype: torch.dtype, ignore_index: int
) -> None:
    for targets in ([0, 2, 1], [0, 2], [], [ignore_index], [0, ignore_index]):
        if min(targets, default=0) < 0 and dtype == torch.uint8:
            continue
        found = some_ignored(torch.tensor(targets, dtype=dtype), 3, ignore_index)
        expected = [target == ignore_index for target in targets]
        assert (found is None and not any(expected)) or (found is not None and found.tolist() == expected)
    for wrong in (3, 255):
        with pytest.raises(InvalidArgumentError, match=rf"got {wrong} \(1 of 2 out of range\)"):
            some_ignored(torch.tensor([wrong, 0], dtype=dtype), 3, ignore_index)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    # In float16 the sum 4096 + 1 + 1 + ... stays at 4096; in bfloat16 already 256 + 1 does.
    features = torch.ones(6000, 1, dtype=dtype)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums, _ = class_sums(features, torch.zeros(6000, dtype=torch.int64), 2)

    assert sums.dtype == torch.float32
    assert sums.tolist() == [[6000.0], [0.0]]


def test_gradient_reaches_each_row_once(generator: torch.Generator) -> None:
    features = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 2, 0, IGNORE, 0, 2])
    assert torch.autograd.gradcheck(lambda f: class_means(f, targets, 4)[0], features)


def test_empty_and_entirely_ignored_batches_give_zeros() -> None:
    for features, targets in [
        (torch.ones(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.ones(4, 3), torch.full((4,), IGNORE)),
    ]:
        means, counts = class_means(features, targets, 2)
        assert means.tolist() == [[0.0] * 3] * 2
        assert counts.tolist() == [0, 0]


def test_vmap_over_batches_equals_a_loop(generator: torch.Generator) -> None:
    features = torch.randn(3, 10, 4, generator=generator)
    targets = torch.randint(2, (3, 10), generator=generator)

    mapped, _ = torch.vmap(lambda f, t: class_means(f, t, 2))(features, targets)

    looped = torch.stack([class_means(f, t, 2)[0] for f, t in zip(features, targets, strict=True)])
    torch.testing.assert_close(mapped, looped)


def test_more_classes_than_samples_are_scattered(generator: torch.Generator) -> None:
    """The same sums, derivatives and transforms, without a matrix of samples and classes."""
    features = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[0, 2, 2, IGNORE, 0, 8], [8, 8, 8, 1, IGNORE, IGNORE]])
    sums, counts = torch.vmap(lambda f, t: class_sums(f, t, 9))(features, targets)
    for i in range(2):
        expected_sums, expected_counts = loop_sums(features[i], targets[i], 9)
        np.testing.assert_allclose(sums[i], expected_sums, atol=1e-14)
        np.testing.assert_array_equal(counts[i], expected_counts)
    assert torch.autograd.gradcheck(
        lambda f: class_sums(f, targets[0], 9)[0], features[0].requires_grad_(), check_forward_ad=True
    )
    many, samples = 50_000, torch.randn(200, 2, generator=generator)
    with PeakMemory() as memory:
        class_sums(samples, torch.arange(200), many)
    assert memory.peak < 32 * many  # bytes; the matrix alone would take 200 * many


@pytest.mark.parametrize("k", [3, 20])
def test_compiles_as_one_graph(generator: torch.Generator, k: int) -> None:
    features = torch.randn(10, 4, generator=generator)
    targets = torch.randint(3, (10,), generator=generator)
    compiled = torch.compile(class_means, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, targets, k), class_means(features, targets, k))
    with pytest.raises(RuntimeError, match="targets must be class indices"):
        compiled(features, targets + k - 1, k)
    with pytest.raises(RuntimeError, match="features must be finite"):
        compiled(features / 0, targets, k)


LABELS = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("features", "targets", "error", "message"),
    [
        (
            torch.ones(4),
            LABELS,
            InvalidArgumentError,
            r"features must have shape \(B, in_features\), got \(4,\)",
        ),
        (
            torch.ones(4, 2, 1),
            LABELS,
            InvalidArgumentError,
            r"features must have shape \(B, in_features\), got \(4, 2, 1\)",
        ),
        (
            torch.ones(4, 2),
            LABELS[:3],
            InvalidArgumentError,
            r"targets must have shape \(B,\) = \(4,\).* got \(3,\)",
        ),
        (
            torch.ones(4, 2).long(),
            LABELS,
            InvalidArgumentError,
            "features must have a real floating-point dtype",
        ),
        (torch.ones(4, 2), LABELS.float(), InvalidArgumentError, "targets must be integers"),
        (torch.ones(4, 2), LABELS.bool(), InvalidArgumentError, "targets must be integers"),
        (torch.ones(4, 2), LABELS * 3, InvalidArgumentError, r"in \[0, 3\).* got 3 \(2 of 4 out of range\)"),
        (torch.ones(4, 2), -LABELS, InvalidArgumentError, r"got -1 \(2 of 4 out of range\)"),
        (
            torch.tensor([[1.0, torch.nan]] * 4),
            LABELS,
            NonFiniteError,
            "features must be finite.* got 4 NaN or infinite values among 8",
        ),
        (torch.tensor([[1.0, -torch.inf]] * 4), LABELS, NonFiniteError, "features must be finite"),
        (torch.full((4, 2), 1e38), LABELS, NonFiniteError, r"small enough to be summed.* up to 1e\+38"),
    ],
)
def test_bad_input_is_named(
    features: Tensor, targets: Tensor, error: type[EtfLayersError], message: str
) -> None:
    with pytest.raises(error, match=message):
        class_sums(features, targets, 3)


def test_a_number_of_classes_that_is_none_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="num_classes must be at least 1, got 0"):
        class_sums(torch.ones(4, 2), LABELS, 0)


def test_nan_is_found_in_an_ignored_row_too() -> None:
    with pytest.raises(NonFiniteError):
        class_sums(torch.tensor([[torch.nan], [1.0]]), torch.tensor([IGNORE, 0]), 2)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]
)
def test_every_integer_dtype_gives_what_int64_gives(dtype: torch.dtype) -> None:
    """In uint8, -1 for an ignored sample is class 255: with K = 300 it had the ignored samples as its own."""
    features = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    largest = 255 if dtype == torch.uint8 else 127
    targets = torch.tensor([0, 7, largest, 7, 3, largest])
    sums, counts = class_sums(features, targets.to(dtype), 300, ignore_index=7)
    expected, expected_counts = class_sums(features, targets, 300, ignore_index=7)
    assert torch.equal(sums, expected)
    assert torch.equal(counts, expected_counts)
    assert int(counts[largest]) == 2
