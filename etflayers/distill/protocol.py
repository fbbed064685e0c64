r"""How far a learned set is from all real samples, and from random ones, whatever labels it is used with.

The accuracy of networks trained on a set is owed to its samples, but also to soft labels and augmentation,
which would make random real samples better, too. Two differences tell them apart: between mean accuracies on
all real samples and on the set, both with hard labels and nothing else, and between the set and random real
samples, both with everything that the set is used with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import NamedTuple

from etflayers.checks import require

__all__ = ["Ranking", "ranking"]


class Ranking(NamedTuple):
    """What :func:`ranking` finds; an error is None where there is but one network on a side.

    Attributes:
        hard_label_recovery: HLR, the smaller, the better.
        hard_label_recovery_error: its standard error.
        improvement_over_random: IOR, the larger, the better.
        improvement_over_random_error: its standard error.
        score: DDRS in [0, 1], of both.
    """

    hard_label_recovery: float
    hard_label_recovery_error: float | None
    improvement_over_random: float
    improvement_over_random_error: float | None
    score: float


def ranking(
    *,
    full_hard: Sequence[float],
    set_hard: Sequence[float],
    set_own: Sequence[float],
    random_own: Sequence[float],
    weight: float = 0.5,
) -> Ranking:
    r"""HLR = acc(full, hard) - acc(set, hard), IOR = acc(set, own) - acc(random, own), and a score of both.

    The score is ``(exp(a) - exp(-1)) / (exp(1) - exp(-1))`` with ``a = w IOR - (1 - w) HLR``.

    Args:
        full_hard: accuracies in [0, 1] of networks trained on all real samples with hard labels.
        set_hard: of networks trained on the set, with hard labels and no augmentation.
        set_own: on the set as it is meant to be used, with its own labels and augmentation.
        random_own: on as many random real samples, used in that same way.
        weight: w in [0, 1], of IOR.

    Returns:
        Means of the differences with their standard errors, and the score.

    Raises:
        InvalidArgumentError: no accuracies, some outside [0, 1], or such a weight.

    Reference:
        Li et al. (2025), arXiv 2505.13300.

    >>> found = ranking(full_hard=[0.9], set_hard=[0.6], set_own=[0.7, 0.8], random_own=[0.5])
    >>> round(found.hard_label_recovery, 2), round(found.improvement_over_random, 2)
    (0.3, 0.25)
    """
    given = {"full_hard": full_hard, "set_hard": set_hard, "set_own": set_own, "random_own": random_own}
    for name, values in given.items():
        require(
            len(values) > 0 and all(0 <= value <= 1 for value in values),
            f"{name} must be accuracies in [0, 1], at least one, got {list(values)}",
        )
    require(0 <= weight <= 1, f"weight must be in [0, 1], got {weight}")
    recovery, recovery_error = _difference(full_hard, set_hard)
    improvement, improvement_error = _difference(set_own, random_own)
    exponent = weight * improvement - (1 - weight) * recovery
    score = (math.exp(exponent) - math.exp(-1)) / (math.e - math.exp(-1))
    return Ranking(recovery, recovery_error, improvement, improvement_error, score)


def _difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float | None]:
    """Of two means of independent samples, and its standard error."""
    both = (first, second)
    known = min(map(len, both)) > 1
    error = math.sqrt(sum(variance(values) / len(values) for values in both)) if known else None
    return fmean(first) - fmean(second), error
