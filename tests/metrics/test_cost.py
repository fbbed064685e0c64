"""What an update costs beside one class sum, and what NC1 of a thousand classes needs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from etflayers.metrics import update_moments, zero_moments
from etflayers.metrics.moments import Scatter


def median_times(functions: dict[str, Callable[[], object]], rounds: int = 100) -> dict[str, float]:
    """Interleaved, so that a busy machine slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


# With the scatter a plain d x d product alone is 2.1 to 2.7 of these units.
@pytest.mark.bench
@pytest.mark.parametrize(("scatter", "bound"), [("none", 1.6), ("pooled", 4.0)])
def test_cost_of_an_update(scatter: Scatter, bound: float) -> None:
    batch, in_features, num_classes = 512, 512, 100
    features, targets = torch.randn(batch, in_features), torch.randint(num_classes, (batch,))
    onehot = F.one_hot(targets, num_classes).float()
    moments = zero_moments(num_classes, in_features, scatter=scatter)
    medians = median_times(
        {
            "product": lambda: features.T @ onehot,
            "pass": lambda: features.square().sum(),
            "update": lambda: update_moments(moments, features, targets),
        }
    )
    assert medians["update"] <= bound * (medians["product"] + medians["pass"])


@pytest.mark.slow
def test_a_thousand_classes_within_a_gigabyte_and_seconds() -> None:
    program = """
import resource, time, torch
from etflayers.metrics import NeuralCollapse, covariance_trace_ratio
metric = NeuralCollapse(1000, 2048)
for start in range(0, 2048, 512):
    metric.update(torch.randn(512, 2048), torch.arange(start, start + 512) % 1000)
start = time.perf_counter()
value = covariance_trace_ratio(metric.statistics()).item()
print(value, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    value, seconds, gigabytes = map(float, finished.stdout.split())
    assert value > 0
    assert seconds < 30
    assert gigabytes < 1
