"""Loss and gradients of many classes: a code that is never stored, against stored and learned weights.

What is compared is a training step of the classifier: the loss from features, and the gradients in the
features and in what learns. A learned weight has one as large as itself, and so has what an optimizer keeps
of it, which is not counted here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.findings import Findings, cases
from benchmarks.processes import in_a_process, peak_mb
from benchmarks.report import Check, milliseconds
from benchmarks.timing import median_ratio, medians
from etflayers.codes import KerdockCode
from etflayers.functional import code_cross_entropy, sampled_cross_entropy
from etflayers.testing import relative_error

# Batch, width of the features, classes; the last is the million that no weight is made for here.
Shape = tuple[int, int, int]
SHAPE: Shape = (256, 256, 66_048)
MILLION: Shape = (256, 1024, 1_050_624)
QUICK_SHAPE: Shape = (8, 16, 288)
CODE, MATRIX = "KerdockCode", "the same code as a matrix, in chunks"
LINEAR, CHUNKS, SAMPLED = (
    "nn.Linear, F.cross_entropy",
    "learned weight, in chunks",
    "learned weight, 10% sampled",
)
RIVALS = (CODE, MATRIX, LINEAR, CHUNKS, SAMPLED)
TIME_BOUND, MEMORY_BOUND, MILLION_BOUND_MB = 3.0, 20.0, 4096.0
# Features of length 1, as in face recognition; the gradient is compared in float64.
SCALE, ERROR_LIMIT = 24.0, 2e-6
BLOCKED, TRANSFORMED = "blocked product", "transforms"


def features_and_targets(shape: Shape) -> tuple[Tensor, Tensor]:
    batch, width, classes = shape
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(batch, width, generator=generator), dim=-1)
    return features.requires_grad_(), torch.randint(classes, (batch,), generator=generator)


def step(rival: str, shape: Shape) -> Callable[[], Tensor]:
    """A call that returns the gradient in the features, and has computed that of the weight if one learns."""
    features, targets = features_and_targets(shape)
    _, width, classes = shape
    code = KerdockCode(classes, width)
    if rival == CODE:
        return lambda: _gradient(code_cross_entropy(features, code, targets, scale=SCALE), features)
    if rival == MATRIX:
        words = code.dense()
        return lambda: _gradient(code_cross_entropy(features, words, targets, scale=SCALE), features)
    # At the code's words, so that every rival has the same loss, and the same softmax to work on.
    weight = code.dense().requires_grad_()
    losses: dict[str, Callable[[], Tensor]] = {
        LINEAR: lambda: F.cross_entropy(SCALE * F.linear(features, weight), targets),
        CHUNKS: lambda: code_cross_entropy(features, weight, targets, scale=SCALE),
        SAMPLED: lambda: sampled_cross_entropy(features, weight, targets, rate=0.1, scale=SCALE),
    }
    return lambda: _gradient(losses[rival](), features, weight)


def _gradient(loss: Tensor, *inputs: Tensor) -> Tensor:
    return torch.autograd.grad(loss, inputs)[0]


def exact(shape: Shape) -> Tensor:
    features, targets = features_and_targets(shape)
    features = features.detach().double().requires_grad_()
    words = KerdockCode(shape[2], shape[1]).dense(dtype=torch.float64)
    return _gradient(F.cross_entropy(SCALE * features @ words.mT, targets), features)


def measure_here(rival: str, shape: Shape) -> dict[str, float]:
    """Megabytes that the step of a rival, with its weight, adds to the process at its peak."""
    torch.set_num_threads(1)
    step(rival, QUICK_SHAPE)()  # what the libraries allocate once
    before = peak_mb()
    step(rival, shape)()
    peak = peak_mb()
    return {"megabytes": max(peak - before, 1 / 1024), "process": peak}


def measure(rival: str, shape: Shape) -> dict[str, float]:
    found: dict[str, float] = in_a_process("benchmarks.bench_codes", rival, *shape)
    return found


@pytest.mark.bench
@cases("shape", full=[SHAPE], quick=[QUICK_SHAPE])
def test_loss_of_many_classes(findings: Findings, shape: Shape) -> None:
    title = f"B = {shape[0]}, d = {shape[1]}, K = {shape[2]:,}"
    calls = {rival: step(rival, shape) for rival in RIVALS}
    reference = exact(shape)
    findings.require(
        *(
            Check(f"{title} {rival}", relative_error(calls[rival](), reference), ERROR_LIMIT)
            for rival in RIVALS[:-1]
        )
    )
    samples = findings.measure(title, calls, seconds=30.0)
    times = medians(samples)
    memory = {rival: measure(rival, shape)["megabytes"] for rival in RIVALS}
    findings.keep(f"{title}, MB", {rival: [megabytes] for rival, megabytes in memory.items()})
    for rival in RIVALS:
        findings.row(
            f"Loss and gradients of many classes: {title}",
            ["", "ms", "times the code", "peak MB", "times the code"],
            [
                rival,
                milliseconds(times[rival]),
                f"{median_ratio(samples, rival, CODE):.1f}",
                f"{memory[rival]:.0f}",
                f"{memory[rival] / memory[CODE]:.1f}",
            ],
            "Forward and backward, float32. The peak holds the weight and its gradient, where there is one, "
            "and is that of a process of its own.",
        )
    findings.claim(
        f"{title}: faster than nn.Linear", median_ratio(samples, LINEAR, CODE), "at least", TIME_BOUND, "x"
    )
    findings.claim(
        f"{title}: less memory than nn.Linear", memory[LINEAR] / memory[CODE], "at least", MEMORY_BOUND, "x"
    )


@pytest.mark.bench
@cases("shape", full=[MILLION], quick=[QUICK_SHAPE])
def test_a_million_classes(findings: Findings, shape: Shape) -> None:
    title = f"B = {shape[0]}, d = {shape[1]}, K = {shape[2]:,}"
    samples = findings.measure(title, {CODE: step(CODE, shape)}, seconds=30.0, min_rounds=3)
    process = measure(CODE, shape)["process"]
    findings.keep(f"{title}, MB", {CODE: [process]})
    findings.row(
        "A step of a million classes on one thread",
        ["", "seconds", "whole process, MB", "the weight of nn.Linear, MB"],
        [title, f"{medians(samples)[CODE]:.2f}", f"{process:.0f}", f"{4 * shape[1] * shape[2] / 2**20:.0f}"],
        "Loss and gradient in the features; a linear layer needs its weight, the gradient and two moments.",
    )
    findings.claim(f"{title}: memory of the process", process, "at most", MILLION_BOUND_MB, " MB")


@pytest.mark.bench
@cases("width", full=(16, 64, 256, 1024), quick=(16,))
def test_transform_or_product(findings: Findings, width: int) -> None:
    """All logits of a full Kerdock code, up to 66,048 classes of it, by its own way and by a product."""
    classes = min(width * (width + 2), 66_048)
    code = KerdockCode(classes, width)
    features, words = torch.randn(256, width), code.dense()
    step_size = max(1, 2**17 // (256 * width))

    def transformed() -> None:
        for start in range(0, code.full_pieces, step_size):
            code.half_logits(features, start, min(start + step_size, code.full_pieces))

    def blocked() -> None:
        for block in words.split(2 * width * step_size):
            features @ block.mT

    title = f"({width}, {classes:,})"
    wide = features.double() @ words[: 2 * width].double().mT
    halves = code.half_logits(features, 0, 1)[0]
    findings.require(Check(title, relative_error(torch.cat((halves, -halves), -1), wide), 1e-6))
    samples = findings.measure(title, {TRANSFORMED: transformed, BLOCKED: blocked}, seconds=5.0)
    findings.row(
        "All logits of 256 samples, a few classes at a time (milliseconds)",
        ["(d, K)", TRANSFORMED, BLOCKED, "times faster"],
        [
            title,
            *(milliseconds(medians(samples)[name]) for name in (TRANSFORMED, BLOCKED)),
            f"{median_ratio(samples, BLOCKED, TRANSFORMED):.1f}",
        ],
        "Up to d = 64 the code itself takes products with half of its words. The product needs the matrix.",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("shape", type=int, nargs=3)
    arguments = parser.parse_args()
    batch, width, classes = arguments.shape
    print(json.dumps(measure_here(arguments.rival, (batch, width, classes))))
