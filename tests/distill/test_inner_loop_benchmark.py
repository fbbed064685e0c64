from __future__ import annotations

import sys

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import bench_inner_loop
from benchmarks.convnet import Problem
from benchmarks.findings import Findings
from benchmarks.report import Claim
from etflayers.distill import KeptGraph, StepAdjoint

TINY = {"width": 4, "blocks": 1}


def test_the_suite_checks_what_it_times() -> None:
    found, absent = bench_inner_loop.checks(1, 2, **TINY)
    assert all(check.passed for check in found)
    # The kept graph is what the others are held against; compiled code is checked where it is timed.
    assert len(found) + len(absent) == len(bench_inner_loop.RIVALS) - 2


@pytest.mark.parametrize("name", [bench_inner_loop.HIGHER, bench_inner_loop.TORCHOPT])
def test_a_peer_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    _, absent = bench_inner_loop.checks(1, 2, **TINY)
    assert absent[name] == "not installed"


def test_a_peer_that_fails_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Problem) -> bench_inner_loop.Gradient:
        raise RuntimeError("of another time\nand more")

    monkeypatch.setitem(bench_inner_loop.RIVALS, bench_inner_loop.HIGHER, broken)
    _, absent = bench_inner_loop.checks(1, 2, **TINY)
    assert absent[bench_inner_loop.HIGHER] == "fails with this torch: RuntimeError: of another time"


def test_a_wrong_rival_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(StepAdjoint):
        def __call__(self, problem, theta, buffers, controls, window):  # type: ignore[no-untyped-def]
            return super().__call__(problem, theta, buffers, controls, range(1, window.stop))

    rivals = {bench_inner_loop.KEPT: bench_inner_loop.by(KeptGraph()), "wrong": bench_inner_loop.by(Wrong())}
    monkeypatch.setattr(bench_inner_loop, "RIVALS", rivals)
    found, _ = bench_inner_loop.checks(1, 2, **TINY)
    assert [check.passed for check in found] == [False]


@pytest.mark.slow
def test_the_suite_runs_and_tells_the_rivals_apart(benchmark: BenchmarkFixture) -> None:
    findings = Findings(benchmark, "inner_loop", quick=True)
    bench_inner_loop.test_cost(findings, bench_inner_loop.QUICK_SIZES[0])
    seconds, _ = findings.report.samples.values()
    _, absent = bench_inner_loop.checks(1, 2, **TINY)
    assert set(seconds) == set(bench_inner_loop.RIVALS) - set(absent)
    assert all(median > 0 for _, median, _, _ in seconds.values())
    (table,) = findings.report.tables
    assert all(len(row) == len(table.columns) for row in table.rows)
    compilation = {row[2]: row[5] for row in table.rows}
    assert float(compilation[bench_inner_loop.COMPILED]) > 0


def test_claims_are_those_of_the_project(benchmark: BenchmarkFixture) -> None:
    benchmark(lambda: None)
    names = (*bench_inner_loop.OTHERS, bench_inner_loop.STEP, bench_inner_loop.COMPILED)
    seconds = dict(zip(names, ([20.0], [14.0], [17.0], [20.0], [11.0]), strict=True))
    extra = dict(zip(names, (6000.0, 6100.0, 6100.0, 600.0, 500.0), strict=True))

    def claimed(seconds: dict[str, list[float]]) -> list[Claim]:
        findings = Findings(benchmark, "inner_loop", quick=False)
        bench_inner_loop.claims(findings, "at 50 steps", 50, seconds, extra)
        return findings.report.claims

    found = claimed(seconds)
    assert all(claim.met for claim in found)
    assert [claim.value for claim in found] == pytest.approx([10.0, 12.0, 1.0, 11 / 14])
    slower = {**seconds, bench_inner_loop.HIGHER: [13.0]}
    assert not claimed(slower)[-1].met


def test_the_problem_is_one_of_distillation() -> None:
    problem = Problem(2, 2, **TINY)
    gradients = bench_inner_loop.RIVALS[bench_inner_loop.STEP](problem)
    assert [g.shape for g in gradients] == [problem.images.shape, problem.labels.shape, problem.rates.shape]
    assert all(torch.isfinite(g).all() and g.any() for g in gradients)
