"""What the hypergradient of a distilled set costs: kept graph against steps that are re-derived."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.bench_memory import peak_mb
from benchmarks.report import Check, Claim, Report, Table, number
from benchmarks.timing import Samples, interleaved, median_ratio, medians
from etflayers.distill import KeptGraph, StepAdjoint, cross_entropy, unrolled_inner_loop
from etflayers.distill.adjoints import InnerAdjoint
from etflayers.testing import relative_error

KEPT, STEP = "kept graph", "re-derived, reverse over reverse"
RIVALS: dict[str, InnerAdjoint] = {
    KEPT: KeptGraph(),
    STEP: StepAdjoint(),
    "re-derived, forward over reverse": StepAdjoint(mode="forward"),
}
# (images, steps)
SIZES, QUICK_SIZES = ((10, 10), (100, 10)), ((2, 2),)
CLASSES, SIDE = 10, 28
# Kept graph over re-derived at 100 images: how many times less memory, by number of steps.
MEMORY_BOUNDS = {10: 2.5}


def convnet(width: int = 64, blocks: int = 3) -> nn.Sequential:
    """Blocks of convolution, instance norm, ReLU and pooling, then a linear layer, as the field uses."""
    layers: list[nn.Module] = []
    for block in range(blocks):
        channels = 1 if block == 0 else width
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True), nn.ReLU()]
        layers.append(nn.AvgPool2d(2))
    side = SIDE // 2**blocks
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, CLASSES))


class Problem:
    """A network, distilled images with soft labels and rates, and real images for the outer loss."""

    def __init__(self, count: int, steps: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = convnet().to(dtype)
        self.steps = steps
        self.images = torch.randn(1, count, 1, SIDE, SIDE, generator=generator).to(dtype).requires_grad_()
        labels = torch.arange(count) % CLASSES
        self.labels = torch.eye(CLASSES, dtype=dtype)[labels][None].requires_grad_()
        self.rates = torch.full((steps,), 0.01, dtype=dtype, requires_grad=True)
        self.real = torch.randn(10, 1, SIDE, SIDE, generator=generator).to(dtype)
        self.targets = torch.arange(10) % CLASSES

    def hypergradient(self, adjoint: InnerAdjoint) -> tuple[Tensor, ...]:
        trained = unrolled_inner_loop(
            self.model,
            dict(self.model.named_parameters()),
            self.images,
            self.labels,
            lr=self.rates,
            epochs=self.steps,
            adjoint=adjoint,
        )

        def model(images: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(self.model, trained.state, (images,))
            return output

        loss = cross_entropy(model, self.real, self.targets)
        return torch.autograd.grad(loss, (self.images, self.labels, self.rates))


def calls(problem: Problem) -> dict[str, Callable[[], object]]:
    return {name: lambda a=adjoint: problem.hypergradient(a) for name, adjoint in RIVALS.items()}


def checks(count: int, steps: int) -> list[Check]:
    """Each rival in float64 against the kept graph; a few steps decide."""
    problem = Problem(count, steps, torch.float64)
    exact = problem.hypergradient(KeptGraph())
    return [
        Check(
            f"{count} images, {steps} steps, {name}: hypergradient",
            max(relative_error(a, b) for a, b in zip(problem.hypergradient(adjoint), exact, strict=True)),
            1e-10,
        )
        for name, adjoint in RIVALS.items()
        if name != KEPT
    ]


def memory_here(rival: str, count: int, steps: int) -> float:
    """Megabytes that a hypergradient adds to the peak of this process."""
    torch.set_num_threads(1)
    Problem(1, 1).hypergradient(RIVALS[rival])  # what the libraries allocate once
    problem = Problem(count, steps)
    before = peak_mb()
    problem.hypergradient(RIVALS[rival])
    return peak_mb() - before


def memory(rival: str, count: int, steps: int) -> float:
    command = [sys.executable, "-m", "benchmarks.bench_inner_loop", rival, str(count), str(steps)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: float = json.loads(done.stdout)
    return found


def run(quick: bool = False) -> Report:
    report = Report("inner_loop")
    report.checks.extend(checks(2, 3))
    rows = []
    for count, steps in QUICK_SIZES if quick else SIZES:
        samples: Samples = interleaved(
            calls(Problem(count, steps)), seconds=0.0, min_rounds=1 if quick else 3
        )
        extra = {name: memory(name, count, steps) for name in RIVALS}
        report.samples[f"{count} images, {steps} steps"] = {"seconds": samples, "megabytes": extra}
        times = medians(samples)
        rows += [
            [
                f"{count}",
                f"{steps}",
                name,
                number(times[name]),
                f"{median_ratio(samples, name, KEPT):.2f}",
                f"{extra[name]:.0f}",
                f"{extra[KEPT] / extra[name]:.1f}",
            ]
            for name in RIVALS
        ]
        if count == 100 and not quick:
            what = f"100 images, {steps} steps: {STEP}"
            report.claims += [
                Claim(f"{what}: time", median_ratio(samples, STEP, KEPT), "at most", 1.0, "x"),
                Claim(
                    f"{what}: memory", extra[KEPT] / extra[STEP], "at least", MEMORY_BOUNDS[steps], "x less"
                ),
            ]
    report.tables.append(
        Table(
            "Hypergradient for images, soft labels and rates, ConvNet of 3 blocks of 64, 28x28, float32",
            ["images", "steps", "", "seconds", "of the kept graph", "extra MB", "times less"],
            rows,
            "Peak memory in a fresh process each, over that of one image and one step.",
        )
    )
    return report


@pytest.mark.bench
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}-images-{size[1]}-steps")
@pytest.mark.parametrize("rival", RIVALS)
def test_hypergradient(benchmark: BenchmarkFixture, rival: str, size: tuple[int, int]) -> None:
    benchmark.group = f"hypergradient, {size[0]} images, {size[1]} steps"
    benchmark.pedantic(calls(Problem(*size))[rival], rounds=3)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("size", type=int, nargs=2)
    arguments = parser.parse_args()
    print(json.dumps(memory_here(arguments.rival, *arguments.size)))
