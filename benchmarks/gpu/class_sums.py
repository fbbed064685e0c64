"""Class sums against a one-hot product, ``index_add_`` and the time to read the features once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.timing import DEVICE, eager_seconds, graph_seconds, medians
from benchmarks.report import Check, Claim, Report, Table, number
from etflayers.functional import class_sums
from etflayers.kernels import describe
from etflayers.nn import FeatureMovingAverage
from etflayers.testing import relative_error

BATCH, WIDTH = 1024, 2048
NUM_CLASSES = (10, 100, 1000)
# Together larger than the caches of the device.
BUFFERS = 24
# The time of the sums over that of reading the features.
BOUND = 2.0


def one_hot_product(features: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    members = targets.unsqueeze(-1) == torch.arange(num_classes, device=features.device)
    return members.to(features.dtype).mT @ features


def index_add(features: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    return features.new_zeros(num_classes, features.shape[1]).index_add_(0, targets, features)


def running_means(features: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    average = FeatureMovingAverage(features.shape[1], num_classes, device=features.device)
    return average.propose(features, targets).means


RIVALS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "class_sums": lambda f, y, k: class_sums(f, y, k)[0],
    "class_sums, reference": lambda f, y, k: class_sums(f, y, k, impl="reference")[0],
    "new FeatureMovingAverage, and its update": running_means,
    "one-hot product": one_hot_product,
    "index_add_": index_add,
}
OURS = "class_sums"
# The less of the two is taken for reading once; a copy also writes as much.
READS: dict[str, Callable[[Tensor], Tensor]] = {"sum of all entries": torch.sum, "half a copy": torch.clone}


def run(quick: bool = False) -> Report:
    report = Report("class sums")
    batch, width = (64, 32) if quick else (BATCH, WIDTH)
    buffers = [torch.randn(batch, width, device=DEVICE) for _ in range(2 if quick else BUFFERS)]
    reading = medians(graph_seconds({name: _calls(read, buffers) for name, read in READS.items()}))
    reading["half a copy"] /= 2
    once = min(reading.values())
    path = describe("class_sums", device=DEVICE, dtype=torch.float32, num_classes=NUM_CLASSES[0])
    rows = [[f"reading once: {name}", "", number(1e6 * seconds), ""] for name, seconds in reading.items()]
    for k in NUM_CLASSES:
        targets = torch.randint(k, (batch,), device=DEVICE)
        exact, _ = class_sums(buffers[0].double(), targets, k)
        for name in (OURS, "class_sums, reference", "one-hot product", "index_add_"):
            error = relative_error(RIVALS[name](buffers[0], targets, k), exact)
            report.checks.append(Check(f"{name}, K = {k}", error, 1e-5))
        calls = {name: _calls(rival, buffers, targets, k) for name, rival in RIVALS.items()}
        device = graph_seconds(calls)
        eager = eager_seconds({name: several[0] for name, several in calls.items()})
        report.samples[f"K = {k}"] = {"graph": device, "eager": eager}
        in_graph, launched = medians(device), medians(eager)
        rows += [
            [
                f"K = {k}: {name}",
                number(1e6 * launched[name]),
                number(1e6 * in_graph[name]),
                number(in_graph[name] / once),
            ]
            for name in RIVALS
        ]
        report.claims.append(
            Claim(f"class sums, K = {k}, over reading once", in_graph[OURS] / once, "at most", BOUND, "x")
        )
    report.tables.append(
        Table(
            f"Class sums, features ({batch}, {width}) float32",
            ["what", "eager, us", "in a CUDA graph, us", "over reading once"],
            rows,
            f"{len(buffers)} buffers in turn, so that the features come from memory and not from a cache. "
            f"Path: {path}. Counts and checks of values are included in class_sums only.",
        )
    )
    return report


def _calls(
    function: Callable[..., Tensor], buffers: list[Tensor], *rest: object
) -> list[Callable[[], Tensor]]:
    return [partial(function, buffer, *rest) for buffer in buffers]
