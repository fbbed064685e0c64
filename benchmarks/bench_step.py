"""What a head costs inside a training step of a ResNet-18."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.findings import Findings, cases
from benchmarks.report import Check, milliseconds
from benchmarks.resnet import FEATURES, resnet18_features
from benchmarks.timing import Samples, medians, quartiles
from etflayers.nn import FixedETFHead, NearestETFHead
from etflayers.testing import relative_error

BATCH, SIDE = 128, 28
QUICK_BATCH, QUICK_SIDE = 8, 8
NUM_CLASSES, QUICK_NUM_CLASSES = (10, 100), (4,)  # each class occurs in a batch
# Upper bounds on what NearestETFHead adds to the step, in per cent, by number of classes.
BOUNDS = {10: 3.0, 100: 10.0}
LINEAR = "nn.Linear"
HEADS: dict[str, Callable[[int], nn.Module]] = {
    LINEAR: lambda k: nn.Linear(FEATURES, k),
    "FixedETFHead": lambda k: FixedETFHead(FEATURES, k, rotation="canonical"),
    "NearestETFHead": lambda k: NearestETFHead(FEATURES, k, generator=torch.Generator().manual_seed(0)),
}


def logits_of(head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
    logits: Tensor = head(features) if isinstance(head, nn.Linear) else head(features, targets)
    return logits


def training_step(
    backbone: nn.Module, head: nn.Module, images: Tensor, targets: Tensor
) -> Callable[[], Tensor]:
    """One step of SGD with momentum: the call returns the loss."""
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits_of(head, backbone(images), targets), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def head_step(head: nn.Module, features: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    """Loss of the head alone and its gradient for the features, which the call returns."""
    point = features.detach().clone().requires_grad_()
    inputs = [point, *head.parameters()]

    def step() -> Tensor:
        loss = F.cross_entropy(logits_of(head, point, targets), targets)
        return torch.autograd.grad(loss, inputs)[0]

    return step


def batch(size: int, side: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, features and targets; every class occurs when the batch is large enough."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 1, side, side, generator=generator).to(memory_format=torch.channels_last)
    # Features of length about 2: longer ones saturate the softmax, whose gradient is then all rounding.
    features = 0.1 * torch.randn(size, FEATURES, generator=generator).relu()
    return images, features, torch.arange(size) % num_classes


def head_check(name: str, num_classes: int, features: Tensor, targets: Tensor) -> Check:
    """The gradient that the head sends into the backbone, against the same head in float64."""
    head = HEADS[name](num_classes)
    reference = HEADS[name](num_classes).double()
    reference.load_state_dict(head.state_dict())
    gradient = head_step(head, features, targets)()
    exact = head_step(reference, features.double(), targets)()
    return Check(f"{name}, K = {num_classes}: gradient", relative_error(gradient, exact), 1e-5)


def extra_cost(samples: Samples, name: str) -> tuple[float, float, float]:
    """Quartiles over the rounds of how much longer than with ``nn.Linear`` a call takes, in per cent."""
    pairs = zip(samples[name], samples[LINEAR], strict=True)
    return quartiles([100 * (a / b - 1) for a, b in pairs])


@pytest.mark.bench
@cases("num_classes", full=NUM_CLASSES, quick=QUICK_NUM_CLASSES)
def test_step(findings: Findings, num_classes: int) -> None:
    size, side = (QUICK_BATCH, QUICK_SIDE) if findings.quick else (BATCH, SIDE)
    images, features, targets = batch(size, side, num_classes)
    findings.require(*(head_check(name, num_classes, features, targets) for name in HEADS))
    backbone = resnet18_features(channels=1)
    calls: dict[str, Callable[[], object]] = {}
    for name, make in HEADS.items():
        calls[name] = training_step(backbone, make(num_classes), images, targets)
        calls[f"{name}, head alone"] = head_step(make(num_classes), features, targets)
    samples = findings.measure(f"K = {num_classes}", calls, seconds=60.0, sample_seconds=0.1)
    times = medians(samples)

    def added(name: str) -> float:
        more = times[f"{name}, head alone"] - times[f"{LINEAR}, head alone"]
        return 100 * more / times[LINEAR]

    for name in HEADS:
        low, middle, high = extra_cost(samples, name)
        findings.row(
            f"Training step of ResNet-18, batch {size}, {side}x{side} (milliseconds)",
            [
                "K",
                "head",
                "head alone",
                "whole step",
                "share",
                "adds, by head alone",
                "adds, by whole steps (quartiles)",
            ],
            [
                f"{num_classes}",
                name,
                milliseconds(times[f"{name}, head alone"]),
                milliseconds(times[name]),
                f"{100 * times[f'{name}, head alone'] / times[name]:.2f} %",
                f"{added(name):+.2f} %",
                f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})",
            ],
            "A step takes seconds, so a shared machine blurs differences of whole steps by some per cent; "
            "the head alone is forward, loss and backward to the features.",
        )
    for how, value in (
        ("its own time", added("NearestETFHead")),
        ("whole steps", extra_cost(samples, "NearestETFHead")[1]),
    ):
        what = f"K = {num_classes}: NearestETFHead adds to the step, by {how}"
        findings.claim(what, value, "at most", BOUNDS.get(num_classes, 0.0), " %")
