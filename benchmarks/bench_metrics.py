"""What an update of the collapse metrics costs beside products of its size.

The unit is one product of the features with the one-hot matrix of their classes, which any sum over classes
takes, and one pass over the features. A product of the features with a classifier is four fifths of a unit,
one of the features with themselves three.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.findings import Findings, cases
from benchmarks.report import Check, milliseconds
from benchmarks.timing import median_ratio, medians
from etflayers.metrics import NeuralCollapse
from etflayers.testing import relative_error

Shape = tuple[int, int, int]  # samples of a batch, features, classes
SHAPES: tuple[Shape, ...] = ((512, 512, 100),)
QUICK_SHAPES: tuple[Shape, ...] = ((16, 6, 4),)
UNIT = "unit"
# In units, by what is updated; the product with the classifier and the sums of each class alone take 1.5.
BOUNDS = {"pooled scatter": 4.5, "no scatter": 2.0}
# Measures of float32 features against those of the same numbers in float64.
ERROR_LIMIT = 1e-5


def batch(shape: Shape) -> tuple[Tensor, Tensor, nn.Linear]:
    """Features, each class in equal numbers, and a classifier."""
    size, in_features, num_classes = shape
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(size, in_features, generator=generator)
    torch.manual_seed(0)
    return features, torch.arange(size) % num_classes, nn.Linear(in_features, num_classes)


def metrics(shape: Shape) -> dict[str, NeuralCollapse]:
    """What takes a batch, by name, after a first one."""
    features, targets, classifier = batch(shape)
    sizes = shape[2], shape[1]
    first = NeuralCollapse(*sizes, scatter="none")
    made = {
        "pooled scatter": NeuralCollapse(*sizes, classifier=classifier),
        "no scatter": NeuralCollapse(*sizes, classifier=classifier, scatter="none"),
        "pooled scatter, no classifier": NeuralCollapse(*sizes),
        "no scatter, no classifier": first,
    }
    for metric in made.values():
        metric.update(features, targets)
    centers = first.statistics()
    second = NeuralCollapse(*sizes, classifier=classifier, centers=centers, scatter="none")
    second.update(features, targets)
    return {**made, "second pass, no scatter": second}


def precision(shape: Shape, name: str, metric: NeuralCollapse) -> Check:
    """The measures of float32 features against those in float64."""
    features, targets, classifier = batch(shape)
    scatter, centers = metric.scatter, metric.centers
    exact = NeuralCollapse(
        metric.num_classes,
        metric.in_features,
        classifier=None if "no classifier" in name else classifier.double(),
        scatter=scatter,
        centers=centers,
    )
    exact.update(features.double(), targets)
    found, expected = metric.compute(), exact.compute()
    values = [torch.stack([of[key] for key in sorted(expected)]) for of in (found, expected)]
    return Check(f"{shape}, {name}: measures", relative_error(*values), ERROR_LIMIT)


@pytest.mark.bench
@cases("shape", full=SHAPES, quick=QUICK_SHAPES, ids=str)
def test_update(findings: Findings, shape: Shape) -> None:
    features, targets, _ = batch(shape)
    made = metrics(shape)
    findings.require(*(precision(shape, name, metric) for name, metric in made.items()))
    onehot = F.one_hot(targets, shape[2]).float()

    def update(metric: NeuralCollapse) -> Callable[[], None]:
        return lambda: metric.update(features, targets)

    calls: dict[str, Callable[[], object]] = {
        UNIT: lambda: (features.T @ onehot, features.square().sum()),
        **{name: update(metric) for name, metric in made.items()},
    }
    samples = findings.measure(str(shape), calls, seconds=20.0)
    times = medians(samples)
    for name in made:
        units = median_ratio(samples, name, UNIT)
        findings.row(
            "An update of NeuralCollapse",
            ["(B, d, K)", "what", "ms", "units"],
            [str(shape), name, milliseconds(times[name]), f"{units:.2f}"],
            f"A unit, one `features.T @ onehot` and one pass, takes {milliseconds(times[UNIT])} ms.",
        )
        if name in BOUNDS:
            findings.claim(f"{shape}: update, {name}", units, "at most", BOUNDS[name], " units")
