"""How the time of forward + backward grows with the number of classes and of features."""

from __future__ import annotations

import pytest

from benchmarks.bench_nearest_etf import FLOOR, OURS, checks, faster_svd, gaussian_means, rivals, timed
from benchmarks.findings import Findings, cases
from benchmarks.report import milliseconds
from benchmarks.timing import medians

# (in_features, num_classes)
ALONG_CLASSES = tuple((512, k) for k in (5, 10, 20, 31, 50, 100, 200, 400))
ALONG_FEATURES = tuple((d, 100) for d in (128, 256, 512, 1024, 2048, 4096))
SWEEPS = [("K", shape) for shape in ALONG_CLASSES] + [("d", shape) for shape in ALONG_FEATURES]
QUICK_SWEEPS = [("K", (64, 5)), ("K", (64, 20)), ("d", (32, 10)), ("d", (128, 10))]
SVD_NAME = "differentiated SVD, faster layout"
CURVES = (OURS, SVD_NAME, FLOOR)


@pytest.mark.bench
@cases("axis, shape", full=SWEEPS, quick=QUICK_SWEEPS)
def test_scaling(findings: Findings, axis: str, shape: tuple[int, int]) -> None:
    d, k = shape
    means = gaussian_means(shape)
    findings.require(*checks(rivals(means), means, f"{shape}"))
    samples = findings.measure(f"along {axis}, {shape}", timed(means), seconds=2.0)
    times = medians(samples)
    point = {OURS: times[OURS], SVD_NAME: times[faster_svd(samples)], FLOOR: times[FLOOR]}
    fixed = f"d = {d}" if axis == "K" else f"K = {k}"
    findings.row(
        f"Forward + backward along {axis}, {fixed} (milliseconds)",
        ["(d, K)", *CURVES],
        [f"({d}, {k})", *map(milliseconds, point.values())],
    )
