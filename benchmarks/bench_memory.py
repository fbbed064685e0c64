"""Peak memory of one forward and backward pass at K = 1000, each peer in a process of its own."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from benchmarks.bench_nearest_etf import FRAME_LIMIT, FRAMES, OURS, forward_backward, gaussian_means
from benchmarks.findings import Findings, cases
from benchmarks.processes import in_a_process, peak_mb
from benchmarks.report import Check
from etflayers.testing import relative_error, svd_frame

SHAPE, QUICK_SHAPE = (2048, 1000), (64, 20)
BOUND_MB = 1024.0
RIVALS = (OURS, "differentiated SVD")


def measure_here(rival: str, shape: tuple[int, int]) -> dict[str, float]:
    """Megabytes before the class means exist and at the peak of their pass; the error of the frame."""
    torch.set_num_threads(1)
    forward_backward(FRAMES[rival], gaussian_means((8, 4)))()  # what the libraries allocate once
    before = peak_mb()
    means = gaussian_means(shape)
    frame, _ = forward_backward(FRAMES[rival], means)()
    peak = peak_mb()
    return {"before": before, "peak": peak, "error": relative_error(frame, svd_frame(means.double()))}


def measure(rival: str, shape: tuple[int, int]) -> dict[str, float]:
    found: dict[str, float] = in_a_process("benchmarks.bench_memory", rival, *shape)
    return found


@pytest.mark.bench
@cases("shape", full=[SHAPE], quick=[QUICK_SHAPE])
@pytest.mark.parametrize("rival", RIVALS)
def test_memory(findings: Findings, rival: str, shape: tuple[int, int]) -> None:
    d, k = shape
    found = findings.once(lambda: measure(rival, shape))
    findings.require(Check(f"({d}, {k}) {rival}: frame", found["error"], FRAME_LIMIT))
    extra = found["peak"] - found["before"]
    findings.keep(f"({d}, {k}), MB", {rival: [extra]})
    findings.row(
        f"Peak memory of forward + backward, (d, K) = ({d}, {k}), float32 (MB)",
        ["", "forward + backward", "in K x d matrices", "process before", "process at the peak"],
        [
            rival,
            f"{extra:.0f}",
            f"{extra * 1024**2 / (4 * d * k):.1f}",
            f"{found['before']:.0f}",
            f"{found['peak']:.0f}",
        ],
        "A fresh process each; the class means, the frame and the gradient are counted.",
    )
    if rival == OURS:
        findings.claim(f"({d}, {k}): peak of forward + backward", extra, "at most", BOUND_MB, " MB")
        findings.claim(f"({d}, {k}): peak of the whole process", found["peak"], "at most", BOUND_MB, " MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("shape", type=int, nargs=2)
    arguments = parser.parse_args()
    print(json.dumps(measure_here(arguments.rival, tuple(arguments.shape))))
