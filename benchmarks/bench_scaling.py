"""How the time of forward + backward grows with the number of classes and of features."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bench_nearest_etf import FLOOR, OURS, checks, faster_svd, gaussian_means, measure, rivals
from benchmarks.report import Report, Table, milliseconds
from benchmarks.timing import medians

# (in_features, num_classes)
ALONG_CLASSES = tuple((512, k) for k in (5, 10, 20, 31, 50, 100, 200, 400))
ALONG_FEATURES = tuple((d, 100) for d in (128, 256, 512, 1024, 2048, 4096))
QUICK_SWEEPS = {"K": ((64, 5), (64, 20)), "d": ((32, 10), (128, 10))}
SWEEPS = {"K": ALONG_CLASSES, "d": ALONG_FEATURES}
SVD_NAME = "differentiated SVD, faster layout"


def run(quick: bool = False) -> Report:
    report = Report("scaling")
    for axis, shapes in (QUICK_SWEEPS if quick else SWEEPS).items():
        rows, curves = [], {}
        for d, k in shapes:
            means = gaussian_means((d, k))
            report.checks.extend(checks(rivals(means), means, f"({d}, {k})"))
            samples = measure(means, seconds=0.2 if quick else 2.0)
            times = medians(samples)
            point = {OURS: times[OURS], SVD_NAME: times[faster_svd(samples)], FLOOR: times[FLOOR]}
            curves[k if axis == "K" else d] = point
            rows.append([f"({d}, {k})", *map(milliseconds, point.values())])
        report.samples[axis] = {name: [[x, y[name]] for x, y in curves.items()] for name in point}
        fixed = f"d = {shapes[0][0]}" if axis == "K" else f"K = {shapes[0][1]}"
        report.tables.append(
            Table(f"Forward + backward along {axis}, {fixed} (milliseconds)", ["(d, K)", *point], rows)
        )
    return report


@pytest.mark.bench
@pytest.mark.parametrize("shape", {*ALONG_CLASSES, *ALONG_FEATURES}, ids=lambda s: f"d{s[0]}-K{s[1]}")
def test_scaling(benchmark: BenchmarkFixture, shape: tuple[int, int]) -> None:
    means = gaussian_means(shape)
    call = rivals(means)[OURS]
    assert not [check for check in checks({OURS: call}, means, str(shape)) if not check.passed]
    benchmark.group = "scaling"
    benchmark(call)
