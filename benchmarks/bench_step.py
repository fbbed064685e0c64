"""What a head costs inside a training step of a ResNet-18."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.report import Check, Claim, Report, Table, milliseconds
from benchmarks.resnet import FEATURES, resnet18_features
from benchmarks.timing import Samples, interleaved, medians
from etflayers.nn import FixedETFHead, NearestETFHead
from etflayers.testing import relative_error

BATCH, SIDE = 128, 28
QUICK_BATCH, QUICK_SIDE = 8, 8
NUM_CLASSES, QUICK_NUM_CLASSES = (10, 100), (4,)  # each class occurs in a batch
# Upper bounds on what NearestETFHead adds to the step, in per cent, by number of classes.
BOUNDS = {10: 3.0, 100: 10.0}
HEADS: dict[str, Callable[[int], nn.Module]] = {
    "nn.Linear": lambda k: nn.Linear(FEATURES, k),
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
    extra = [100 * (a / b - 1) for a, b in zip(samples[name], samples["nn.Linear"], strict=True)]
    low, middle, high = statistics.quantiles(extra, n=4)
    return low, middle, high


def run(quick: bool = False) -> Report:
    report = Report("step")
    size, side = (QUICK_BATCH, QUICK_SIDE) if quick else (BATCH, SIDE)
    backbone = resnet18_features(channels=1)
    rows = []
    for k in QUICK_NUM_CLASSES if quick else NUM_CLASSES:
        images, features, targets = batch(size, side, k)
        report.checks.extend(head_check(name, k, features, targets) for name in HEADS)
        steps = {name: training_step(backbone, make(k), images, targets) for name, make in HEADS.items()}
        whole = interleaved(steps, seconds=0.5 if quick else 60.0, min_rounds=3)
        heads = {name: head_step(make(k), features, targets) for name, make in HEADS.items()}
        alone = interleaved(heads, seconds=0.5 if quick else 3.0)
        report.samples[f"K = {k}"] = {"step": whole, "head alone": alone}
        step, head = medians(whole), medians(alone)
        for name in HEADS:
            low, middle, high = extra_cost(whole, name)
            added = 100 * (head[name] - head["nn.Linear"]) / step["nn.Linear"]
            rows.append(
                [
                    f"{k}",
                    name,
                    milliseconds(head[name]),
                    milliseconds(step[name]),
                    f"{100 * head[name] / step[name]:.2f} %",
                    f"{added:+.2f} %",
                    f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})",
                ]
            )
        if not quick:
            added = 100 * (head["NearestETFHead"] - head["nn.Linear"]) / step["nn.Linear"]
            report.claims += [
                Claim(
                    f"K = {k}: NearestETFHead adds to the step, by its own time",
                    added,
                    "at most",
                    BOUNDS[k],
                    " %",
                ),
                Claim(
                    f"K = {k}: NearestETFHead adds to the step, by whole steps",
                    extra_cost(whole, "NearestETFHead")[1],
                    "at most",
                    BOUNDS[k],
                    " %",
                ),
            ]
    report.tables.append(
        Table(
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
            rows,
            "A step takes seconds, so a shared machine blurs differences of whole steps by some per cent; "
            "the head alone (forward, loss, backward to the features) is timed over hundreds of calls.",
        )
    )
    return report


@pytest.mark.bench
@pytest.mark.parametrize("num_classes", NUM_CLASSES, ids="K{}".format)
@pytest.mark.parametrize("head", HEADS)
def test_head(benchmark: BenchmarkFixture, head: str, num_classes: int) -> None:
    _, features, targets = batch(BATCH, SIDE, num_classes)
    assert head_check(head, num_classes, features, targets).passed
    benchmark.group = f"head alone, K = {num_classes}"
    benchmark(head_step(HEADS[head](num_classes), features, targets))
