"""HLR, IOR and their score, by hand, and their standard error against Welch's t-test."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scipy import stats

from etflayers.distill import ranking
from etflayers.errors import InvalidArgumentError

ACCURACIES: dict[str, Any] = {"full_hard": [0.95, 0.97, 0.96], "set_hard": [0.6, 0.7]}
ACCURACIES |= {"set_own": [0.8, 0.75, 0.85, 0.7], "random_own": [0.5, 0.6, 0.4]}


def test_differences_and_errors_are_those_of_welch() -> None:
    """His statistic is the difference over its standard error."""
    found = ranking(**ACCURACIES)
    assert found.hard_label_recovery == pytest.approx(0.96 - 0.65)
    assert found.improvement_over_random == pytest.approx(0.775 - 0.5)
    pairs = {"hard_label_recovery": ("full_hard", "set_hard")}
    pairs["improvement_over_random"] = ("set_own", "random_own")
    for name, (first, second) in pairs.items():
        statistic = stats.ttest_ind(ACCURACIES[first], ACCURACIES[second], equal_var=False).statistic
        assert getattr(found, name) / getattr(found, f"{name}_error") == pytest.approx(statistic)


def test_score_by_hand_and_at_its_ends() -> None:
    found = ranking(**ACCURACIES, weight=0.3)
    exponent = 0.3 * found.improvement_over_random - 0.7 * found.hard_label_recovery
    assert found.score == pytest.approx((math.exp(exponent) - 1 / math.e) / (math.e - 1 / math.e))
    best = ranking(full_hard=[0.0], set_hard=[1.0], set_own=[1.0], random_own=[0.0])
    worst = ranking(full_hard=[1.0], set_hard=[0.0], set_own=[0.0], random_own=[1.0])
    assert (best.score, worst.score) == (pytest.approx(1), pytest.approx(0))


def test_one_network_has_no_error() -> None:
    found = ranking(**ACCURACIES | {"set_hard": [0.6]})
    assert found.hard_label_recovery_error is None
    assert found.improvement_over_random_error is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"set_own": []}, r"set_own must be accuracies in \[0, 1\], at least one, got \[\]"),
        ({"full_hard": [96.0]}, r"full_hard must be accuracies in \[0, 1\]"),
        ({"random_own": [math.nan]}, "random_own must be accuracies"),
        ({"weight": 1.5}, r"weight must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_accuracies_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ranking(**ACCURACIES | change)
