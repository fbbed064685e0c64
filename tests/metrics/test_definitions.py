"""Every measure equals its definition, spelt out in float64, on data of every awkward kind."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from etflayers.errors import NonFiniteError
from etflayers.geometry import simplex_etf
from etflayers.metrics import (
    ClassStatistics,
    NeuralCollapse,
    between_whitening,
    class_statistics,
    collapse_measures,
    nearest_center,
    numerical_rank,
    variability_collapse_index,
)
from etflayers.metrics.centers import AboutCenters, center_coordinates
from etflayers.metrics.nc4 import confidences_of
from etflayers.metrics.statistics import GlobalMean
from tests.metrics.definitions import KINDS, Data, direct_measures, direct_statistics, ideal_data, make_data


def linear(data: Data) -> nn.Linear:
    layer = nn.Linear(data.weight.shape[1], data.num_classes, dtype=data.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(data.weight)
        layer.bias.copy_(data.bias)
    return layer


def measure(data: Data, batch: int = 32, **options: Any) -> dict[str, Tensor]:
    """Two passes: one for the centers, one for all metrics."""
    shape = (data.num_classes, data.features.shape[1])
    metrics = [NeuralCollapse(*shape, **options)]
    for second in (False, True):
        if second:
            centers = metrics[0].statistics()
            metrics.append(NeuralCollapse(*shape, classifier=linear(data), centers=centers, **options))
        for features, targets in zip(data.features.split(batch), data.targets.split(batch), strict=True):
            metrics[-1].update(features, targets)
    return metrics[1].compute()


@pytest.mark.parametrize("global_mean", get_args(GlobalMean))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_measure_equals_its_definition(kind: str, global_mean: GlobalMean, dtype: torch.dtype) -> None:
    # float32 features are exact data, too: only their deviations from a mean are rounded.
    data = make_data(kind, dtype)
    measured = measure(data, global_mean=global_mean, scatter="per_class")
    direct = direct_measures(data, global_mean)
    assert measured.keys() == direct.keys()
    for name, value in measured.items():
        assert value.dtype == torch.float64
        assert value.ndim == 0
        # A float32 cosine is rounded to 1e-7, whatever the mean margin is; so is a probability.
        absolute = 3e-7 if name in ("margin_mean", "calibration_error") else 0.0
        # Definition of the rank on features with a large mean: roots of eigenvalues at 1e-16 of the largest.
        relative = 1e-4 if name == "nc1_numerical_rank" and kind == "offset" else 1e-6
        assert value.item() == pytest.approx(direct[name], rel=relative, abs=absolute), name


def test_the_two_global_means_differ_only_under_imbalance() -> None:
    for kind, same in (("random", True), ("imbalanced", False)):
        data = make_data(kind)
        classes, samples = (direct_statistics(data, of)["overall"] for of in ("classes", "samples"))
        assert bool(abs(classes - samples).max() < 1e-12) is same


def test_ideal_values_on_a_collapsed_set() -> None:
    data = ideal_data()
    measured = measure(data, scatter="per_class")
    ideal = dict.fromkeys(measured, 0.0)
    ideal |= {"nc3_cosine": 1.0, "accuracy": 1.0, "nc1_numerical_rank": 1.0}
    free = {"calibration_error", "margin_mean"}  # of features as they are, with their common mean
    for name in measured.keys() - free:
        assert measured[name].item() == pytest.approx(ideal[name], abs=1e-13), name


def test_margins_at_collapse_are_those_of_the_simplex() -> None:
    frame = simplex_etf(4, 5, dtype=torch.float64)
    layer = linear(Data(frame, torch.arange(4), frame, torch.zeros(4, dtype=torch.float64)))
    metric = NeuralCollapse(4, 5, classifier=layer)
    metric.update(frame, torch.arange(4))
    assert metric.compute()["margin_mean"].item() == pytest.approx(4 / 3, abs=1e-14)


def test_fewer_dimensions_than_a_simplex_needs() -> None:
    data = make_data("random", k=6, d=3)
    statistics = class_statistics(data.features, data.targets, 6)
    measures = collapse_measures(statistics)
    assert not [name for name in measures if "etf" in name]
    direct = direct_statistics(data)
    between = torch.from_numpy(direct["between"])
    expected = (torch.from_numpy(direct["within"]) @ torch.linalg.pinv(between)).trace() / 6
    torch.testing.assert_close(measures["nc1_trace"], expected)


def test_coinciding_means() -> None:
    features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 2.0], [0.0, -2.0]])
    statistics = class_statistics(features, torch.tensor([0, 0, 1, 1]), 2)
    with pytest.raises(ValueError, match=r"must not all be zero|zero row"):
        collapse_measures(statistics)
    from etflayers import metrics

    for function in (
        metrics.covariance_trace_ratio,
        metrics.within_between_quotient,
        metrics.class_distance_normalized_variance,
    ):
        assert function(statistics).item() == float("inf")
    assert variability_collapse_index(statistics).item() == 1.0


def test_nc1_is_a_pseudo_inverse_where_two_of_three_means_coincide() -> None:
    features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 2.0], [0.0, -2.0], [3.0, 0.0], [5.0, 0.0]])
    statistics = class_statistics(features, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
    # Sigma_B is along the first axis: (4/3)^2 (1 + 1 + 4) / 3; Sigma_W has 2/6 there.
    expected = (2 / 6) / ((16 / 9) * 6 / 3) / 3
    assert collapse_measures_nc1(statistics) == pytest.approx(expected, rel=1e-12)


def collapse_measures_nc1(statistics: ClassStatistics) -> float:
    from etflayers.metrics import covariance_trace_ratio

    return covariance_trace_ratio(statistics).item()


def test_spread_of_other_data_about_centers() -> None:
    train, test = make_data("imbalanced"), make_data("wide")
    centers = class_statistics(train.features, train.targets, 5, scatter="none")
    squares = between_whitening(centers).squared_deviations(test.features, test.targets)
    residuals = test.features - centers.means[test.targets]
    between = torch.from_numpy(direct_statistics(train)["between"])
    inverse = torch.linalg.pinv(between, rtol=1e-9, hermitian=True)
    torch.testing.assert_close(squares, ((residuals @ inverse) * residuals).sum(-1))
    partial = class_statistics(train.features, train.targets % 3, 5, unseen="exclude")
    with pytest.raises(ValueError, match="centers must hold every class"):
        between_whitening(partial).squared_deviations(test.features, test.targets)


def test_a_large_common_mean_takes_no_digits_of_a_second_pass() -> None:
    """Centers of float32 features are no float32 numbers; the plain formula in float64 says what is lost."""
    data = make_data("wide")
    features = (data.features + 1e4).float()
    centers = class_statistics(features, data.targets, 5)
    whitening = between_whitening(centers)
    residuals = features.double() - centers.means[data.targets]
    expected = (residuals @ whitening.basis.mT).square().sum(-1)
    torch.testing.assert_close(
        whitening.squared_deviations(features, data.targets), expected, rtol=2e-5, atol=0.0
    )
    nearest = torch.cdist(features.double(), centers.means).argmin(-1)
    assert torch.equal(nearest_center(features, centers.means), nearest)


def test_a_second_pass_follows_the_dtype_of_its_batches() -> None:
    data = make_data("wide")
    about = AboutCenters(class_statistics(data.features, data.targets, 5), "classes")
    expected = about.whitening.squared_deviations(data.features, data.targets).sum()
    nearest = nearest_center(data.features, about.centers.means)
    for features, rtol in ((data.features.float(), 1e-5), (data.features, 1e-14)):
        deviations, disagreements = about.compare(features, data.targets, nearest)
        torch.testing.assert_close(deviations, expected, rtol=rtol, atol=0.0)
        assert disagreements == 0


CENTERS = (*KINDS, "far", "coinciding")


@pytest.mark.parametrize("global_mean", get_args(GlobalMean))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(5, 7), (7, 7), (12, 7)])
@pytest.mark.parametrize("kind", CENTERS)
def test_a_second_pass_finds_the_nearest_centers(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, global_mean: GlobalMean
) -> None:
    """Of coordinates, and of features themselves where K > d; distances in float64 say which are nearest."""
    k, d = shape
    train, test = (make_data(kind, k=k, d=d, n=n) for n in (40, 60))
    features, rounding = test.features.to(dtype), 16 * torch.finfo(dtype).eps
    centers = class_statistics(train.features.to(dtype), train.targets, k, scatter="none")
    if kind == "far":  # from the centers of their own classes, so that others are nearer
        features = features.roll(1, dims=0)
    if kind == "coinciding":  # two of them, which leave a coordinate less
        centers = centers._replace(means=centers.means[torch.arange(k).clamp(max=k - 2)])
    about = AboutCenters(centers, global_mean)
    distances = torch.cdist(
        features.double(), centers.means, compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    least, expected = distances.min(-1)

    # What rounding may exchange: |h - m|^2 is a difference of numbers of this size.
    sizes = (features.double() - centers.means.mean(0)).square().sum(-1)
    sizes = sizes + (centers.means - centers.means.mean(0)).square().sum(-1).max()
    found = [nearest_center(features, centers.means)]
    if k <= d:
        prepared = about.whitening.prepared(dtype, features.device)
        coordinates = prepared.coordinates(features, test.targets)
        found.append(
            center_coordinates(about.whitening, dtype, features.device).nearest(coordinates, test.targets)
        )
    for nearest in found:
        chosen = distances.gather(-1, nearest.unsqueeze(-1)).squeeze(-1)
        assert (chosen - least <= rounding * sizes).all()
    clear = distances.topk(2, largest=False).values.diff().squeeze(-1) > rounding * sizes
    assert kind == "coinciding" or clear.double().mean() > 0.99
    # Decisions that are right, and one class off, where there is no doubt.
    for shift in (0, 1):
        _, disagreements = about.compare(features[clear], test.targets[clear], (expected[clear] + shift) % k)
        assert disagreements == shift * clear.sum()


def test_a_large_common_mean_moves_no_boundary_between_centers() -> None:
    """float32 centers at 1e4, 0.1 apart, are up to 5e-4 off: that much must not decide."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(5).repeat(800)
    features = (1e4 + 0.1 * torch.randn(5, 7, generator=generator)).float()[targets]
    features = features + torch.randint(-192, 193, features.shape, generator=generator) / 1024
    about = AboutCenters(class_statistics(features, targets, 5, scatter="none"), "classes")
    expected = torch.cdist(
        features.double(), about.centers.means, compute_mode="donot_use_mm_for_euclid_dist"
    ).argmin(-1)
    assert (expected != targets).any()
    _, disagreements = about.compare(features, targets, expected)
    assert disagreements == 0
    with pytest.raises(NonFiniteError, match="features must be finite"):
        about.compare(features.index_fill(0, torch.tensor([3]), torch.inf), targets, targets)


@pytest.mark.parametrize("d", [3, 7])
def test_a_second_pass_without_some_classes(d: int) -> None:
    data = make_data("random", d=d)
    decisions = torch.arange(len(data.targets)) % 5
    kept = torch.tensor([0, 2, 3, 6, 7])
    compared = [
        AboutCenters(
            class_statistics(data.features, names[data.targets], 8, unseen="exclude"), "classes"
        ).compare(data.features, names[data.targets], names[decisions])
        for names in (torch.arange(5), kept)
    ]
    assert 0 < compared[0][1] < len(decisions)
    assert compared[0] == compared[1]


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_confidence_is_the_largest_probability(scale: float) -> None:
    logits = scale * torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -torch.inf  # a class that is excluded
    confidences = confidences_of(logits, logits.amax(-1))
    torch.testing.assert_close(confidences.double(), logits.double().softmax(-1).amax(-1), rtol=1e-6, atol=0)


def test_numerical_rank_of_centered_features() -> None:
    data = make_data("random")
    statistics = class_statistics(data.features, data.targets, data.num_classes, scatter="per_class")
    ranks = numerical_rank(statistics, centered=True)
    for k, rank in enumerate(ranks):
        rows = data.features[data.targets == k]
        values = torch.linalg.svdvals(rows - rows.mean(0))
        torch.testing.assert_close(rank, values.sum().square() / values.square().sum())


def test_bfloat16_features_are_measured_as_the_numbers_that_they_are() -> None:
    data = make_data("wide", torch.bfloat16)
    half = class_statistics(data.features, data.targets, data.num_classes)
    exact = class_statistics(data.features.double(), data.targets, data.num_classes)
    for got, expected in zip(half, exact, strict=True):  # sums of float32 products
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = class_statistics(data.features, data.targets, data.num_classes)
    assert torch.equal(cast.scatter, half.scatter)
    measured = measure(data)
    assert all(torch.isfinite(value) for value in measured.values())
