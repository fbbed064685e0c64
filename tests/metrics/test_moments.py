"""Streaming moments: order, batch size and merges do not matter, and a large mean costs no digits."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch

from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.metrics import ClassMoments, finish_moments, merge_moments, update_moments, zero_moments
from etflayers.metrics.moments import Scatter
from tests.metrics.definitions import KINDS, Data, direct_statistics, make_data

SCATTERS: tuple[Scatter, ...] = ("pooled", "per_class", "none")


def accumulate(data: Data, batch: int, scatter: Scatter = "pooled") -> ClassMoments:
    moments = zero_moments(data.num_classes, data.features.shape[1], scatter=scatter)
    for features, targets in zip(data.features.split(batch), data.targets.split(batch), strict=True):
        update_moments(moments, features, targets)
    return moments


def shuffled(data: Data, seed: int) -> Data:
    order = torch.randperm(len(data.targets), generator=torch.Generator().manual_seed(seed))
    return Data(data.features[order], data.targets[order], data.weight, data.bias)


def assert_same(first: ClassMoments, second: ClassMoments, rtol: float = 1e-10) -> None:
    for got, expected in zip(finish_moments(first), finish_moments(second), strict=True):
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scatter", SCATTERS)
def test_statistics_equal_their_definition(kind: str, scatter: Scatter) -> None:
    data = make_data(kind)
    statistics = finish_moments(accumulate(data, 17, scatter))
    direct = direct_statistics(data)
    torch.testing.assert_close(statistics.means, torch.from_numpy(direct["means"]), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.variances, torch.from_numpy(direct["variances"]), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        statistics.within_trace, torch.tensor(direct["within"].trace()), rtol=1e-9, atol=0
    )
    if scatter == "none":
        with pytest.raises(InvalidArgumentError, match="scatter='pooled'"):
            _ = statistics.within
    else:
        within = torch.from_numpy(direct["within"])
        torch.testing.assert_close(statistics.within, within, rtol=0, atol=1e-9 * within.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_batch_size_and_order_do_not_matter(kind: str) -> None:
    data = make_data(kind)
    whole = accumulate(data, len(data.targets))
    for batch in (1, 7, 64):
        assert_same(accumulate(shuffled(data, batch), batch), whole)


def test_more_columns_than_a_block() -> None:
    data = make_data("random", d=300, n=5)
    within = finish_moments(accumulate(data, 10)).within
    torch.testing.assert_close(within, torch.from_numpy(direct_statistics(data)["within"]))


@pytest.mark.parametrize("scatter", SCATTERS)
@pytest.mark.parametrize("kind", ["offset", "imbalanced"])
def test_merged_parts_equal_the_whole_and_go_on(kind: str, scatter: Scatter) -> None:
    data = make_data(kind)
    order = data.targets.argsort()  # so that parts lack classes, and none has all
    data = Data(data.features[order], data.targets[order], data.weight, data.bias)
    cuts = [0, 10, 11, 60, len(data.targets) - 20]
    parts = [
        accumulate(Data(data.features[i:j], data.targets[i:j], data.weight, data.bias), 8, scatter)
        for i, j in pairwise(cuts)
    ]
    empty = zero_moments(data.num_classes, data.features.shape[1], scatter=scatter)
    merged = merge_moments([empty, *parts])
    update_moments(merged, data.features[cuts[-1] :], data.targets[cuts[-1] :])
    assert_same(merged, accumulate(data, 8, scatter))


def test_a_spread_far_below_the_mean_survives_in_float32() -> None:
    # Means of 1e4 with deviations of 2^-6: their squares are 1e-12 of those of the features.
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-2, 3, (600, 3), generator=generator)
    features = 10000 + steps / 64  # multiples of the float32 spacing there, hence exact
    targets = torch.arange(2).repeat(300)
    moments = zero_moments(2, 3)
    for f, t in zip(features.split(50), targets.split(50), strict=True):
        update_moments(moments, f, t)
    deviations = features.double() - features.double().view(300, 2, 3).mean(0).repeat(300, 1)
    torch.testing.assert_close(
        finish_moments(moments).within, deviations.mT @ deviations / 600, rtol=1e-9, atol=1e-12
    )


def test_identical_samples_have_no_spread_at_all() -> None:
    features = torch.tensor([[0.1, 0.7], [1e4 / 3, -5.3]])
    moments = zero_moments(2, 2)
    for _ in range(7):
        update_moments(moments, features, torch.tensor([0, 1]))
    statistics = finish_moments(moments)
    assert not statistics.variances.any()
    assert not statistics.within.any()
    assert torch.equal(statistics.means, features.double())


def test_ignored_samples_may_hold_anything() -> None:
    data = make_data("random")
    features = torch.cat((data.features, torch.full((3, 7), torch.nan)))
    targets = torch.cat((data.targets, torch.full((3,), -100)))
    moments = zero_moments(5, 7)
    update_moments(moments, features, targets)
    assert_same(moments, accumulate(data, 1000))


def test_empty_batch() -> None:
    moments = zero_moments(2, 3)
    update_moments(moments, torch.empty(0, 3), torch.empty(0, dtype=torch.int64))
    assert not moments.counts.any()


@pytest.mark.parametrize(
    ("features", "targets", "match"),
    [
        (torch.ones(2, 4), torch.tensor([0, 1]), "features must have shape"),
        (torch.ones(2, 3, 1), torch.tensor([0, 1]), "features must have shape"),
        (torch.ones(2, 3).long(), torch.tensor([0, 1]), "features must have a real floating-point dtype"),
        (torch.ones(2, 3), torch.tensor([0]), "targets must have shape"),
        (torch.ones(2, 3), torch.tensor([0, 2]), "targets must be class indices"),
        (torch.ones(2, 3), torch.tensor([0.0, 1.0]), "targets must be integers"),
    ],
)
def test_bad_batches_name_the_argument(features: torch.Tensor, targets: torch.Tensor, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        update_moments(zero_moments(2, 3), features, targets)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e38])
def test_features_that_are_not_finite_change_nothing(bad: float) -> None:
    moments = zero_moments(2, 3)
    update_moments(moments, torch.randn(4, 3), torch.arange(4) % 2)
    before = [field.clone() for field in moments]
    features = torch.randn(4, 3)
    features[2, 1] = bad
    with pytest.raises(NonFiniteError, match="features must be finite"):
        update_moments(moments, features, torch.arange(4) % 2)
    assert all(torch.equal(a, b) for a, b in zip(before, moments, strict=True))


def test_classes_never_seen() -> None:
    data = make_data("random")
    moments = zero_moments(8, 7)
    spread = torch.tensor([0, 2, 3, 6, 7])
    update_moments(moments, data.features, spread[data.targets])
    with pytest.raises(InvalidArgumentError, match="3 of 8 classes have no sample"):
        finish_moments(moments)
    statistics = finish_moments(moments, unseen="exclude")
    expected = finish_moments(accumulate(data, 1000))
    assert torch.equal(statistics.classes, spread)
    for got, value in zip(statistics[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, value)
    with pytest.raises(InvalidArgumentError, match="at least two classes"):
        finish_moments(zero_moments(8, 7), unseen="exclude")


def test_bad_options_name_the_argument() -> None:
    with pytest.raises(InvalidArgumentError, match="num_classes must be at least 2"):
        zero_moments(1, 3)
    with pytest.raises(InvalidArgumentError, match="in_features must be at least 1"):
        zero_moments(2, 0)
    with pytest.raises(InvalidArgumentError, match="scatter must be"):
        zero_moments(2, 3, scatter="full")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="unseen must be"):
        finish_moments(zero_moments(2, 3), unseen="drop")  # type: ignore[arg-type]


def test_the_path_that_never_waits_for_a_device_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data("offset", torch.float32)
    targets = torch.where(torch.arange(len(data.targets)) % 9 == 0, -100, data.targets)
    data = Data(data.features, targets, data.weight, data.bias)
    expected = accumulate(data, 3)
    for module in ("etflayers.metrics.moments", "etflayers.functional.class_means"):
        monkeypatch.setattr(sys.modules[module], "reads_values", lambda tensor: False)
    for got, value in zip(accumulate(data, 3), expected, strict=True):
        assert torch.equal(got, value)
