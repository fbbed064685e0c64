"""What one benchmark finds, and where it puts it: beside the times, in the JSON of pytest-benchmark.

A benchmark is a pytest function with the marker ``bench`` and the fixture ``findings``. It says in this order
what must be right (:meth:`Findings.require`), what is timed (:meth:`Findings.measure`, once), which row of
which table that is, and which bound it has to meet:

    @pytest.mark.bench
    @cases("size", full=(100, 200), quick=(10,))
    def test_mine(findings: Findings, size: int) -> None:
        findings.require(Check("mine", error_of(mine(size)), 1e-5))
        samples = findings.measure(str(size), {"mine": ..., "the peer": ...}, seconds=5.0)
        ratio = median_ratio(samples, "the peer", "mine")
        findings.row("Mine against the peer", ["size", "times faster"], [str(size), f"{ratio:.1f}"])
        findings.claim(f"{size}: faster", ratio, "at least", 2.0, "x")

``python -m benchmarks`` runs them and makes the tables; ``pytest benchmarks -m "bench and not quick"
--benchmark-enable`` shows pytest-benchmark's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.report import Check, Claim, Report, Table
from benchmarks.timing import Samples, quartiles, take_turns

__all__ = ["Findings", "cases"]

QUICK_SECONDS = 0.3


def cases(names: str, *, full: Iterable[Any], quick: Iterable[Any], ids: Any = None) -> Any:
    """Parametrize a benchmark: the cases of a real run, and a few small ones to try it in seconds."""
    several = "," in names
    small = [pytest.param(*(case if several else (case,)), marks=pytest.mark.quick) for case in quick]
    return pytest.mark.parametrize(names, [*full, *small], ids=ids)


class Findings:
    """The report of one benchmark, which travels in ``benchmark.extra_info``."""

    def __init__(self, benchmark: BenchmarkFixture, suite: str, *, quick: bool) -> None:
        self.benchmark = benchmark
        self.quick = quick
        self.report = Report(suite)

    def require(self, *checks: Check) -> None:
        """Note errors against their limits; one above ends the benchmark before anything is timed."""
        self.report.checks += checks
        wrong = [f"{c.what}: error {c.error:.2e} > {c.limit:g}" for c in checks if not c.passed]
        # Or pytest-benchmark adds to the failure that nothing was timed.
        self.benchmark.skipped = bool(wrong)
        assert not wrong, "wrong: " + "; ".join(wrong)

    def measure(
        self,
        title: str,
        rivals: Mapping[str, Callable[[], object]],
        *,
        seconds: float,
        min_rounds: int = 5,
        sample_seconds: float = 5e-3,
    ) -> Samples:
        """Time rivals in turns (see :func:`benchmarks.timing.take_turns`) and keep their quartiles."""
        samples = take_turns(
            self.benchmark,
            rivals,
            seconds=QUICK_SECONDS if self.quick else seconds,
            min_rounds=3 if self.quick else min_rounds,
            sample_seconds=sample_seconds,
        )
        self.keep(title, samples)
        return samples

    def once(self, call: Callable[[], Any]) -> Any:
        """The result of a call that measures by itself, in processes of its own or without a clock."""
        return self.benchmark.pedantic(call)  # type: ignore[no-untyped-call]

    def keep(self, title: str, samples: Mapping[str, list[float]]) -> None:
        """Keep the quartiles of samples that were taken elsewhere, and how many there were."""
        self.report.samples.setdefault(title, {}).update(
            {
                name: [*(float(f"{value:.4g}") for value in quartiles(values)), len(values)]
                for name, values in samples.items()
            }
        )

    def row(self, title: str, columns: Sequence[str], cells: Sequence[str], note: str = "") -> None:
        """Add a row to the table of this title."""
        self.report.add(Table(title, list(columns), [list(cells)], note))

    def claim(
        self, what: str, value: float, sense: Literal["at least", "at most"], bound: float, unit: str
    ) -> None:
        """Hold a measured number against the project's bound; a quick run claims nothing."""
        if not self.quick:
            self.report.claims.append(Claim(what, value, sense, bound, unit))

    def close(self) -> None:
        """Hand the report over."""
        self.benchmark.extra_info.update(asdict(self.report))
