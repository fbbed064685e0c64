"""Measures of groups of classes against data that hold no other class, and against perfect collapse."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from etflayers import simplex_etf
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.metrics import (
    DESCRIPTIONS,
    Classifier,
    by_group,
    class_statistics,
    collapse_measures,
    generalized_measures,
    groups_from_counts,
    minority_collapse,
    select_classes,
)
from tests.metrics.definitions import Data, direct_generalized, direct_measures, make_data

K, D = 8, 9
GROUPS = {"many": torch.tensor([5, 0, 2]), "few": torch.tensor([7, 1, 3, 4])}


def only(data: Data, classes: Tensor) -> Data:
    """The samples of some classes, numbered anew, and the rows of the classifier for them."""
    classes = classes.sort().values
    kept = torch.isin(data.targets, classes)
    weight, bias = data.weight[classes], data.bias[classes]
    # What all rows have in common is no part of a decision.
    return Data(
        data.features[kept],
        torch.searchsorted(classes, data.targets[kept]),
        weight - weight.mean(0),
        bias - bias.mean(),
    )


@pytest.mark.parametrize("kind", ["random", "imbalanced", "offset"])
@pytest.mark.parametrize("of", ["classes", "samples"])
def test_a_group_is_measured_as_if_there_were_no_other_class(kind: str, of: Any) -> None:
    data = make_data(kind, k=K, d=D)
    statistics = class_statistics(data.features, data.targets, K, scatter="per_class")
    classifier = Classifier(data.weight, data.bias)
    found = by_group(statistics, GROUPS, classifier=classifier, global_mean=of)
    assert found.keys() == GROUPS.keys()
    for name, classes in GROUPS.items():
        part = only(data, classes)
        expected = direct_measures(part, of)
        measures = found[name]
        merged = {key: measures.pop(key) for key in list(measures) if key.startswith("minority")}
        assert set(measures) <= set(expected)
        for key, value in measures.items():
            assert value.item() == pytest.approx(expected[key], rel=1e-8, abs=1e-8), key
        alone = class_statistics(part.features, part.targets, len(classes), scatter="per_class")
        whole = collapse_measures(alone, Classifier(part.weight, part.bias), global_mean=of)
        assert set(measures) == set(whole)
        assert set(merged) == {"minority_collapse_means", "minority_collapse_weights"}
        rows = data.weight[classes]
        torch.testing.assert_close(merged["minority_collapse_weights"], minority_collapse(rows))
        means = statistics.centered_means(of)[classes]
        torch.testing.assert_close(merged["minority_collapse_means"], minority_collapse(means))


def test_where_everything_has_collapsed_every_group_has() -> None:
    frame, targets = simplex_etf(K, D, rotation="haar", dtype=torch.float64), torch.arange(K).repeat(3)
    offset = torch.arange(D, dtype=torch.float64)
    classifier = Classifier(30 * frame, -30 * frame @ offset)
    statistics = class_statistics(5 * frame[targets] + offset, targets, K, scatter="per_class")
    for measures in by_group(statistics, GROUPS, classifier=classifier).values():
        for name, value in measures.items():
            ideal = DESCRIPTIONS[name].ideal
            if name.startswith("minority_collapse"):
                ideal = -1 / (K - 1)
            assert value.item() == pytest.approx(ideal, abs=1e-6), name
        assert any(name.startswith("nc3") for name in measures)
        assert "bias_collapse" in measures


def test_one_group_of_all_classes_is_everything() -> None:
    data = make_data("random", k=K, d=D)
    statistics = class_statistics(data.features, data.targets, K, scatter="per_class")
    found = by_group(statistics, {"all": torch.arange(K)})["all"]
    del found["minority_collapse_means"]
    assert found == collapse_measures(statistics)


def test_what_cannot_be_divided_or_has_no_angle_is_left_out() -> None:
    data = make_data("random", k=K, d=D)
    pooled = class_statistics(data.features, data.targets, K)
    groups = {**GROUPS, "one": torch.tensor([6]), "none": torch.tensor([], dtype=torch.int64)}
    found = by_group(pooled, groups)
    assert found.keys() == GROUPS.keys()
    assert "nc1_trace" not in found["few"]
    assert "nc1_quotient" in found["few"]
    # A class without samples has no measure; of a group with one class left nothing remains.
    seen = torch.isin(data.targets, torch.tensor([0, 1, 3, 4, 6]))
    statistics = class_statistics(data.features[seen], data.targets[seen], K, unseen="exclude")
    assert by_group(statistics, GROUPS).keys() == {"few"}
    part = select_classes(statistics, GROUPS["few"])
    assert part.classes.tolist() == [1, 3, 4]


def test_generalized_collapse_of_some_classes() -> None:
    data = make_data("random", k=K, d=3)
    units = torch.nn.functional.normalize(data.features)
    statistics = class_statistics(units, data.targets, K)
    classes = GROUPS["few"].sort().values
    found = generalized_measures(
        select_classes(statistics, GROUPS["few"]), Classifier(data.weight, data.bias)
    )
    kept = torch.isin(data.targets, classes)
    targets = torch.searchsorted(classes, data.targets[kept])
    part = Data(data.features[kept], targets, data.weight[classes], data.bias[classes])
    for name, value in direct_generalized(part).items():
        assert found[name].item() == pytest.approx(value, abs=1e-9), name


# --- minority collapse ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_minority_collapse_is_the_mean_cosine_over_the_pairs(dtype: torch.dtype) -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x = rows.double().numpy()
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in combinations([x[i] for i in range(len(x))], 2)]
    found = minority_collapse(rows)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(np.mean(cosines), abs=1e-12)


def test_minority_collapse_of_merged_and_of_collapsed_classes() -> None:
    row = torch.tensor([1.0, 2.0, -3.0])
    assert minority_collapse(torch.stack([row, 2 * row, 5 * row])).item() == pytest.approx(1, abs=1e-7)
    frame = simplex_etf(6, 6, dtype=torch.float64)
    assert minority_collapse(frame[:3]).item() == pytest.approx(-1 / 5, abs=1e-14)
    assert minority_collapse(frame).item() == pytest.approx(-1 / 5, abs=1e-14)


# --- groups ---


def test_the_usual_thresholds() -> None:
    counts = torch.tensor([101, 100, 20, 19, 0, 5000])
    groups = {name: classes.tolist() for name, classes in groups_from_counts(counts).items()}
    assert groups == {"many": [0, 5], "medium": [1, 2], "few": [3, 4]}
    other = groups_from_counts(counts.float(), thresholds=(1, 19))
    assert [len(classes) for classes in other.values()] == [4, 1, 1]


def test_quantiles_make_groups_of_about_one_size_and_keep_equal_classes_together() -> None:
    counts = torch.arange(1, 31).flip(0)
    groups = groups_from_counts(counts, quantiles=(1 / 3, 2 / 3))
    assert [classes.tolist() for classes in groups.values()] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 30)),
    ]
    equal = groups_from_counts(torch.full((9,), 7), quantiles=(1 / 3, 2 / 3))
    assert [len(classes) for classes in equal.values()] == [0, 9, 0]


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([3, 4], {}, "counts must be a tensor .* got list"),
        (torch.ones(2, 2), {}, r"counts must be a tensor .* got \(2, 2\)"),
        (torch.tensor([True]), {}, "counts must be a tensor"),
        (torch.tensor([-1, 3]), {}, "counts must be numbers of samples"),
        (torch.tensor([torch.nan, 3]), {}, "counts must be numbers of samples"),
        (torch.ones(3), {"thresholds": (100, 20)}, r"thresholds must be two numbers in asc.* \(100, 20\)"),
        (torch.ones(3), {"quantiles": (0.7, 0.3)}, "quantiles must be two numbers in ascending order"),
        (torch.ones(3), {"quantiles": (0.5, 2.0)}, r"quantiles must be in \[0, 1\]"),
    ],
)
def test_bad_counts_are_named(counts: Any, options: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        groups_from_counts(counts, **options)


def test_bad_groups_are_named() -> None:
    data = make_data("random", k=K, d=D)
    statistics = class_statistics(data.features, data.targets, K)
    bad: list[tuple[Any, str]] = [
        ({}, "groups must be class indices by name"),
        ([torch.arange(3)], "groups must be class indices by name"),
        ({"few": torch.tensor([0.0, 1.0])}, r"groups\['few'\] must be integers"),
        ({"few": [0, 1]}, r"groups\['few'\] must be a tensor"),
        ({"few": torch.tensor([[0, 1]])}, r"groups\['few'\] must have shape"),
        ({"few": torch.tensor([-1, 1])}, r"groups\['few'\] must be class indices from 0 on"),
    ]
    for groups, message in bad:
        with pytest.raises(InvalidArgumentError, match=message):
            by_group(statistics, groups)
    with pytest.raises(InvalidArgumentError, match="must be class indices from 0 on below 8"):
        by_group(statistics, {"few": torch.tensor([1, 8])}, classifier=Classifier(data.weight))
    with pytest.raises(InvalidArgumentError, match="at least two of the classes are needed"):
        select_classes(statistics, torch.tensor([3]))
    with pytest.raises(InvalidArgumentError, match="classes must be integers"):
        select_classes(statistics, torch.tensor([3.0]))
    with pytest.raises(InvalidArgumentError, match="rows must not hold a zero row"):
        minority_collapse(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(InvalidArgumentError, match=r"rows must have shape \(K, d\) with K >= 2"):
        minority_collapse(torch.ones(1, 2))
    with pytest.raises(NonFiniteError, match="rows must be finite"):
        minority_collapse(torch.full((2, 2), torch.nan))
