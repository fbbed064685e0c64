"""Fair timing on a machine that other work shares: rivals take turns, medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from pytest_benchmark.fixture import BenchmarkFixture

__all__ = ["Samples", "median_ratio", "medians", "quartiles", "take_turns"]

Samples = dict[str, list[float]]


def take_turns(
    benchmark: BenchmarkFixture,
    rivals: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 5,
    sample_seconds: float = 5e-3,
) -> Samples:
    """Seconds for each call of each rival, one sample a round, rivals taking turns.

    pytest-benchmark times the first of them and, while it waits between two rounds, the others have theirs.
    Drift of the clock frequency and load by other programs then fall on all alike. A sample repeats a short
    call for ``sample_seconds``, so that it does not measure the caches that another left behind.

    Args:
        benchmark: the fixture; switched off (``--benchmark-disable``), it makes each call once.
        rivals: what to call, by name; the first is the subject of the benchmark.
        seconds: how long all of it may take.
        min_rounds: but not fewer rounds than these.
        sample_seconds: shortest sample.
    """
    subject, *others = rivals
    if benchmark.disabled:
        benchmark.pedantic(rivals[subject])  # type: ignore[no-untyped-call]
        return {name: [_sample(call, 1)] for name, call in rivals.items()}
    costs = {name: _cost(call, sample_seconds) for name, call in rivals.items()}
    repeats = {name: max(1, round(sample_seconds / cost)) for name, cost in costs.items()}
    round_seconds = sum(costs[name] * repeats[name] for name in rivals)
    samples: Samples = {name: [] for name in rivals}

    def turn_of_the_others() -> None:
        for name in others:
            samples[name].append(_sample(rivals[name], repeats[name]))
        if others:
            others.append(others.pop(0))  # nobody always follows the same rival

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        rivals[subject],
        teardown=turn_of_the_others,
        rounds=max(min_rounds, round(seconds / round_seconds)),
        iterations=repeats[subject],
    )
    samples[subject] = list(benchmark.stats.stats.data)
    # After the last round pytest-benchmark makes one call more for its result, and its turn.
    return {name: found[: len(samples[subject])] for name, found in samples.items()}


def _cost(call: Callable[[], object], sample_seconds: float) -> float:
    first = _sample(call, 1)  # includes lazy initialization
    return first if first >= 100 * sample_seconds else _sample(call, 1)


def _sample(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def medians(samples: Samples) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def median_ratio(samples: Samples, over: str, under: str) -> float:
    """Median over the rounds of the ratio within a round: load that lasts longer than a round cancels."""
    return statistics.median(a / b for a, b in zip(samples[over], samples[under], strict=True))
