"""Fair timing on a machine that other work shares: rivals take turns, medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["Samples", "interleaved", "median_ratio", "medians"]

Samples = dict[str, list[float]]


def interleaved(
    rivals: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 5,
    sample_seconds: float = 5e-3,
) -> Samples:
    """Seconds for each call of each rival, one sample a round, rivals taking turns.

    Drift of the clock frequency and load by other programs then fall on all rivals alike. A sample repeats a
    short call for ``sample_seconds``, so that it does not measure the caches that another left behind.

    Args:
        rivals: what to call, by name.
        seconds: stop after the round in which this much time has passed.
        min_rounds: but not before so many rounds.
        sample_seconds: shortest sample.
    """
    repeats = {name: _repeats(call, sample_seconds) for name, call in rivals.items()}
    samples: Samples = {name: [] for name in rivals}
    order = list(rivals)
    end = time.perf_counter() + seconds
    while len(samples[order[0]]) < min_rounds or time.perf_counter() < end:
        for name in list(order):
            samples[name].append(_sample(rivals[name], repeats[name]))
        order.append(order.pop(0))  # nobody always follows the same rival
    return samples


def _repeats(call: Callable[[], object], sample_seconds: float) -> int:
    first = _sample(call, 1)  # includes lazy initialization
    return 1 if first >= 100 * sample_seconds else max(1, round(sample_seconds / _sample(call, 1)))


def _sample(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def medians(samples: Samples) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def median_ratio(samples: Samples, over: str, under: str) -> float:
    """Median over the rounds of the ratio within a round: load that lasts longer than a round cancels."""
    return statistics.median(a / b for a, b in zip(samples[over], samples[under], strict=True))
