from __future__ import annotations

import pytest
import torch

from benchmarks import bench_inner_loop
from etflayers.distill import KeptGraph, StepAdjoint


def test_the_suite_checks_what_it_times() -> None:
    found = bench_inner_loop.checks(1, 2)
    assert len(found) == len(bench_inner_loop.RIVALS) - 1
    assert all(check.passed for check in found)


def test_a_wrong_rival_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(StepAdjoint):
        def __call__(self, problem, theta, buffers, controls, window):  # type: ignore[no-untyped-def]
            return super().__call__(problem, theta, buffers, controls, range(1, window.stop))

    monkeypatch.setattr(bench_inner_loop, "RIVALS", {bench_inner_loop.KEPT: KeptGraph(), "wrong": Wrong()})
    assert not any(check.passed for check in bench_inner_loop.checks(1, 2))


@pytest.mark.slow
def test_the_suite_runs_and_tells_the_rivals_apart() -> None:
    report = bench_inner_loop.run(quick=True)
    assert not report.failures
    (found,) = report.samples.values()
    assert set(found["seconds"]) == set(found["megabytes"]) == set(bench_inner_loop.RIVALS)
    assert all(value > 0 for value in found["megabytes"].values())


def test_the_problem_is_one_of_distillation() -> None:
    problem = bench_inner_loop.Problem(2, 2)
    gradients = problem.hypergradient(StepAdjoint())
    assert [g.shape for g in gradients] == [problem.images.shape, problem.labels.shape, problem.rates.shape]
    assert all(torch.isfinite(g).all() and g.any() for g in gradients)
