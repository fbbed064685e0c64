"""What theory says of the trainings of a study: two numbers are read off, the rest is computed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import get_args

from lab.files import Row
from lab.results import grouped
from noise.theory import Loss, decay_of, equilibrium


def theory_rows(last: Sequence[Row]) -> list[Row]:
    """The model of :mod:`noise.theory` at the noise of the trainings with a loss that it knows.

    Lambda is read off the trainings with cross-entropy and no noise, from the probability that they give to
    the labels; the slope off those with the least noise, as memorization over dilation. Nothing else is
    taken from trainings: all other points are predictions.

    Args:
        last: of each training the last row, all of two classes.

    Returns:
        Of each method and eta memorization and dilation, as ``memorization_relative`` and
        ``dilation_relative`` are measured, and lambda and slope. None where there is nothing to read from.
    """
    plain = grouped((row for row in last if row["method"] == "ce" and "dilation_relative" in row), "eta")
    noisy = sorted(eta for (eta,) in plain if eta > 0)
    if not noisy or (0.0,) not in plain:
        return []
    decay = decay_of(fmean(row["probability_right_labels"] for row in plain[0.0,]))
    least = plain[noisy[0],]
    slope = fmean(
        row["memorization_relative"] / (1 - row["noise_rate"]) / row["dilation_relative"] for row in least
    )
    rows: list[Row] = []
    for (method, eta), same in grouped(last, "method", "eta").items():
        if method in get_args(Loss):
            rate = fmean(row["noise_rate"] for row in same)
            alpha = same[0]["alpha"] or 0.0
            found = equilibrium(method, eta=rate / (1 - rate), slope=slope, decay=decay, alpha=alpha)
            own = {"memorization": found.memorization * (1 - rate), "dilation": found.dilation}
            rows.append({"method": method, "eta": eta, **own, "decay": decay, "slope": slope})
    return rows
