"""Measures of generalized collapse against their definitions in NumPy, and where their values are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError
from etflayers.functional import directions
from etflayers.metrics import (
    Classifier,
    NeuralCollapse,
    class_statistics,
    covariance_trace_ratio,
    generalized_measures,
    largest_cosine,
    one_vs_rest,
)
from tests.metrics.definitions import (
    KINDS,
    Data,
    direct_generalized,
    direct_measures,
    direct_statistics,
    make_data,
)

SIZES = [(5, 7), (9, 3), (12, 2)]  # with room for a simplex, and without


def unit_data(data: Data) -> Data:
    features = data.features / data.features.square().sum(1, keepdim=True).sqrt()
    return dataclasses.replace(data, features=features)


def linear(data: Data) -> nn.Linear:
    layer = nn.Linear(data.weight.shape[1], data.num_classes, dtype=torch.float64)
    layer.weight.data, layer.bias.data = data.weight.clone(), data.bias.clone()
    return layer


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["random", "collapsed", "wide", "imbalanced"])
def test_functions_equal_their_definitions(kind: str, size: tuple[int, int]) -> None:
    data = make_data(kind, k=min(size[0], 9) if kind == "imbalanced" else size[0], d=size[1], n=10)
    statistics = class_statistics(directions(data.features), data.targets, data.num_classes)
    measured = generalized_measures(statistics, Classifier(data.weight, data.bias))
    direct = direct_generalized(data)
    assert measured.keys() == direct.keys()
    for name, value in measured.items():
        assert value.dtype == torch.float64
        assert value.item() == pytest.approx(direct[name], rel=1e-10, abs=1e-10), name
    # GNC1 is NC1 of directions.
    s = direct_statistics(unit_data(data))
    trace = np.trace(s["within"] @ np.linalg.pinv(s["between"], rcond=1e-9, hermitian=True))
    ratio = covariance_trace_ratio(statistics)
    assert ratio.item() == pytest.approx(trace / data.num_classes, rel=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_metric_measures_directions_and_counts_decisions_on_features(kind: str) -> None:
    data = make_data(kind, k=6, d=4)
    plain, unit, first = (
        NeuralCollapse(6, 4, classifier=linear(data), normalize=normalize)
        for normalize in (False, True, True)
    )
    first.update(data.features, data.targets)
    second = NeuralCollapse(6, 4, classifier=linear(data), centers=first.statistics(), normalize=True)
    for features, targets in zip(data.features.split(32), data.targets.split(32), strict=True):
        for metric in (plain, unit, second):
            metric.update(features, targets)
    without, measured, twice = plain.compute(), unit.compute(), second.compute()
    generalized = direct_generalized(data)
    assert measured.keys() == without.keys() | generalized.keys()
    direct = direct_measures(unit_data(data)) | generalized
    of_features = {"accuracy", "calibration_error", "margin_mean"}
    # So far from zero the sphere is flat: across it the variance is 1e-8 of that along it, and squared for
    # Sigma_B below what its pseudo-inverse in the definition keeps.
    flat = {"nc1_trace", "nc1_trace_sum", "nc1_vci"} if kind == "offset" else set()
    for name in measured.keys() - flat:
        value = measured[name]
        expected = without[name].item() if name in of_features else direct[name]
        # A distance of 1e-5 is the root of a difference of squares near 1.
        absolute = 1e-6 if "one_vs_rest" in name and kind == "offset" else 1e-10
        assert value.item() == pytest.approx(expected, rel=1e-6, abs=absolute), name
    # NC4: decisions on the features against the nearest mean of directions.
    features, _ = unit_data(data).arrays
    means = direct_statistics(unit_data(data))["means"]
    nearest = np.array([((row - means) ** 2).sum(1).argmin() for row in features])
    decisions = linear(data)(data.features).argmax(1).numpy()
    assert twice["nc4_disagreement"].item() == pytest.approx((decisions != nearest).mean())
    assert twice["nc1_trace_about_centers"].item() == pytest.approx(measured["nc1_trace"].item(), rel=1e-8)


def test_lengths_of_the_features_do_not_count() -> None:
    data = make_data("random", k=9, d=3)
    values = []
    lengths = torch.rand(len(data.targets), 1, dtype=torch.float64) + 0.1
    for features in (data.features, lengths * data.features):
        metric = NeuralCollapse(9, 3, classifier=linear(data), normalize=True)
        metric.update(features, data.targets)
        values.append(metric.compute())
    for name in ("nc1_trace", "gnc2_largest_cosine_means", "gnc3_cosine"):
        torch.testing.assert_close(values[0][name], values[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_classes", [3, 5, 12])
def test_the_values_of_a_regular_polygon(num_classes: int) -> None:
    """The best code of the plane, and self-dual: the neighbors' cosine is cos(2 pi / K)."""
    angles = 2 * math.pi * torch.arange(num_classes, dtype=torch.float64) / num_classes
    rows = torch.stack((angles.cos(), angles.sin()), 1)
    statistics = class_statistics(rows.repeat(3, 1), torch.arange(num_classes).repeat(3), num_classes)
    measured = generalized_measures(statistics, Classifier(7 * rows))
    expected = math.cos(2 * math.pi / num_classes)
    for of in ("means", "weights"):
        assert measured[f"gnc2_largest_cosine_{of}"].item() == pytest.approx(expected, abs=1e-14)
        # From a corner to the line through its neighbors.
        for which in ("min", "mean"):
            distance = measured[f"gnc2_one_vs_rest_{which}_{of}"].item()
            assert distance == pytest.approx(1 - expected, abs=1e-12)
    assert measured["gnc3_cosine"].item() == pytest.approx(1, abs=1e-14)
    assert measured["gnc3_row_distance"].item() == pytest.approx(0, abs=1e-14)


def test_one_class_between_others_has_the_smallest_distance() -> None:
    rows = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, -0.1], [-1.0, 0.0]], dtype=torch.float64)
    found = one_vs_rest(rows)
    assert found.min.item() == pytest.approx(1 - 1 / math.sqrt(1.01), abs=1e-12)
    assert found.mean > 5 * found.min


def test_more_rows_than_a_block_holds() -> None:
    rows = torch.randn(2100, 6, generator=torch.Generator().manual_seed(0))
    units = rows.double() / rows.double().norm(dim=1, keepdim=True)
    cosines = (units @ units.mT).fill_diagonal_(-2)
    assert largest_cosine(rows).item() == pytest.approx(cosines.max().item(), abs=1e-14)


def test_classes_that_are_excluded_leave_out_their_rows() -> None:
    data = make_data("random", k=6, d=4)
    seen = data.targets != 2
    statistics = class_statistics(directions(data.features[seen]), data.targets[seen], 6, unseen="exclude")
    kept = torch.tensor([0, 1, 3, 4, 5])
    measured = generalized_measures(statistics, Classifier(data.weight))
    torch.testing.assert_close(measured["gnc2_largest_cosine_weights"], largest_cosine(data.weight[kept]))


@pytest.mark.parametrize("rows", [torch.ones(1, 3), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.ones(3)])
def test_rows_without_angles_are_refused(rows: Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match="rows must"):
        largest_cosine(rows)


def test_the_option_is_a_flag() -> None:
    with pytest.raises(InvalidArgumentError, match="normalize must be True or False"):
        NeuralCollapse(3, 4, normalize="yes")  # type: ignore[arg-type]
