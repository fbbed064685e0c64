"""An outer step of a distillation with a small network: the graph that is kept against steps taken again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.findings import Findings, cases
from benchmarks.report import Check, milliseconds
from benchmarks.timing import median_ratio, medians
from etflayers.distill import SGD, AutoAdjoint, KeptGraph, StepAdjoint, UnrolledInnerLoop
from etflayers.distill.adjoints import InnerAdjoint
from etflayers.testing import relative_error

CLASSES, SIDE, MOMENTUM = 10, 28, 0.9
# Steps of the inner training, and real images of the outer loss.
SIZES, QUICK_SIZES = ((30, 512),), ((2, 4),)
AUTO, STEPS, BY_HAND = 'adjoint="auto"', "re-derived steps", "plain PyTorch"
# The graph of so small a network fits, and spares each step a second run.
FASTER, OVERHEAD = 1.4, 1.3
Gradient = tuple[Tensor, ...]


def lenet(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The network of Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959, for 28x28 pixels."""
    torch.manual_seed(0)
    features: list[nn.Module] = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    dense = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)]
    return nn.Sequential(*features, *dense).to(dtype)


class OuterStep:
    """Ten images and the rates of some steps of momentum, and real images for the outer loss."""

    def __init__(self, steps: int, batch: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model, self.steps = lenet(dtype), steps
        self.images = torch.randn(1, CLASSES, 1, SIDE, SIDE, generator=generator).to(dtype).requires_grad_()
        self.labels = torch.arange(CLASSES)[None]
        self.rates = torch.full((steps,), 0.01, dtype=dtype, requires_grad=True)
        self.real = torch.randn(batch, 1, SIDE, SIDE, generator=generator).to(dtype)
        self.targets = torch.arange(batch) % CLASSES

    def outer(self, state: dict[str, Tensor]) -> Gradient:
        logits = functional_call(self.model, state, (self.real,))
        return torch.autograd.grad(F.cross_entropy(logits, self.targets), [self.images, self.rates])

    def by(self, adjoint: InnerAdjoint) -> Callable[[], Gradient]:
        options = {"optimizer": SGD(momentum=MOMENTUM), "adjoint": adjoint, "epochs": self.steps}
        loop = UnrolledInnerLoop(self.model, **options)  # type: ignore[arg-type]
        return lambda: self.outer(loop(self.images, self.labels, lr=self.rates).state)

    def by_hand(self) -> Gradient:
        """The same in the fewest lines: gradients with a graph, and a dictionary of tensors."""
        state = dict(self.model.named_parameters())
        velocity = {name: torch.zeros_like(value) for name, value in state.items()}
        for rate in self.rates:
            loss = F.cross_entropy(functional_call(self.model, state, (self.images[0],)), self.labels[0])
            gradients = torch.autograd.grad(loss, list(state.values()), create_graph=True)
            for (name, value), gradient in zip(state.items(), gradients, strict=True):
                velocity[name] = MOMENTUM * velocity[name] + gradient
                state[name] = value - rate * velocity[name]
        return self.outer(state)


@pytest.mark.bench
@cases("steps, batch", full=SIZES, quick=QUICK_SIZES)
def test_outer_step(findings: Findings, steps: int, batch: int) -> None:
    exact = OuterStep(min(steps, 5), 16, torch.float64)
    reference = exact.by(KeptGraph())()
    for name, found in {
        AUTO: exact.by(AutoAdjoint()),
        STEPS: exact.by(StepAdjoint()),
        BY_HAND: exact.by_hand,
    }.items():
        error = max(relative_error(a, b) for a, b in zip(found(), reference, strict=True))
        findings.require(Check(f"{name}: hypergradient", error, 1e-10))
    step = OuterStep(steps, batch)
    rivals = {AUTO: step.by(AutoAdjoint()), STEPS: step.by(StepAdjoint()), BY_HAND: step.by_hand}
    samples = findings.measure(f"{steps} steps", rivals, seconds=30.0)
    for name, seconds in medians(samples).items():
        findings.row(
            f"Outer step of ten images: LeNet, {steps} steps of momentum, {batch} real images, float32",
            ["", "ms", "times as long as plain PyTorch"],
            [name, milliseconds(seconds), f"{median_ratio(samples, name, BY_HAND):.2f}"],
            "Hypergradient for images and rates, one thread. Plain PyTorch keeps the graph of all steps.",
        )
    findings.claim(
        f"{steps} steps, {AUTO} over {STEPS}",
        median_ratio(samples, STEPS, AUTO),
        "at least",
        FASTER,
        "x faster",
    )
    findings.claim(
        f"{steps} steps, {AUTO}: time of {BY_HAND}",
        median_ratio(samples, AUTO, BY_HAND),
        "at most",
        OVERHEAD,
        "x",
    )
