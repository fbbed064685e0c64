"""Two and four gloo ranks with unequal shares equal one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from etflayers.data import symmetric_noise
from etflayers.metrics import CosineMargins, LabelNoise, NeuralCollapse, class_statistics
from tests.metrics.definitions import make_data
from tests.ranks import run_ranks


def run(rank: int | None, world: int, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """The metrics of the whole data (rank None), or of one share after synchronization."""
    data = make_data("offset")
    order = data.targets.argsort()  # no rank sees every class
    features, targets = data.features[order], data.targets[order]
    layer = nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(data.weight)
        layer.bias.copy_(data.bias)
    centers = class_statistics(features, targets, 5)
    metric = NeuralCollapse(5, 7, classifier=layer, centers=centers, process_group=group)
    margins = CosineMargins(process_group=group)
    labels = symmetric_noise(targets, 5, 0.4, generator=torch.Generator().manual_seed(0)).targets
    noise = LabelNoise(5, 7, centers=centers, process_group=group)
    if rank is not None:
        # Of four ranks one has nothing at all.
        cuts = [0, 90, 90, 93, len(targets)] if world == 4 else [0, 37, len(targets)]
        share = slice(cuts[rank], cuts[rank + 1])
        features, targets, labels = features[share], targets[share], labels[share]
    for f, t, y in zip(features.split(16), targets.split(16), labels.split(16), strict=True):
        if len(f):
            metric.update(f, t)
            noise.update(f, y, t, layer(f - 1e4).detach())
            margins.update(f, t, data.weight)
    first = metric.compute()
    again = {name: value.clone() for name, value in first.items()}
    statistics = metric.statistics()
    of_noise = {
        **noise.compute(),
        "means": noise.origin_means().means,
        "by class": noise.memorization_by_class(),
    }
    # After the synchronization each rank goes on with its own part.
    metric.update(data.features[:5], data.targets[:5])
    return {
        "metrics": again,
        "means": statistics.means,
        "margins": margins.compute(),
        "noise": of_noise,
        "next": metric.compute(),
    }


def of_one_rank(rank: int, _: Path) -> dict[int, Any]:
    pair = dist.new_group([0, 1])
    results = {4: run(rank, 4)}
    if rank < 2:
        results[2] = run(rank, 2, pair)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, Any]]:
    return run_ranks(of_one_rank, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(ranks: list[dict[int, Any]], world: int) -> None:
    expected = run(None, 1)
    group = [results[world] for results in ranks[:world]]
    for results in group:
        assert results["metrics"].keys() == expected["metrics"].keys()
        for name, value in expected["metrics"].items():
            torch.testing.assert_close(results["metrics"][name], value, rtol=1e-9, atol=1e-11, msg=name)
        torch.testing.assert_close(results["means"], expected["means"], rtol=1e-14, atol=0)
        torch.testing.assert_close(results["margins"], expected["margins"], rtol=0, atol=1e-7)
        assert results["noise"].keys() == expected["noise"].keys() > {"memorization", "accuracy_clean"}
        for name, value in expected["noise"].items():
            torch.testing.assert_close(results["noise"][name], value, rtol=1e-9, atol=1e-9, msg=name)
        # Every rank added the same five samples: they are the same on all ranks, and no longer those above.
        for name, value in results["next"].items():
            torch.testing.assert_close(value, group[0]["next"][name], rtol=0, atol=0)
        assert results["next"]["nc1_trace"] != results["metrics"]["nc1_trace"]
