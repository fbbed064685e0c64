"""Timing on a GPU with its own events: warm, rivals taking turns, medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["DEVICE", "eager_seconds", "graph_of", "graph_seconds", "medians", "peak_bytes"]

Call = Callable[[], object]

# The suites themselves, without the timing, also run on a CPU: for tests.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager_seconds(
    rivals: Mapping[str, Call], *, rounds: int = 30, repeats: int = 10, warm: int = 3
) -> dict[str, list[float]]:
    """Seconds for each call of each rival as it is launched from Python, one sample a round.

    Where launching takes longer than the device, this is the time of launching.
    """
    for call in rivals.values():
        for _ in range(warm):
            call()
    torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    for _ in range(rounds):
        for name in list(order):
            samples[name].append(_elapsed(rivals[name], repeats))
        order.append(order.pop(0))  # nobody always follows the same rival
    return samples


def graph_of(calls: Sequence[Call], *, warm: int = 3) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the ``calls``, one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def graph_seconds(
    rivals: Mapping[str, Sequence[Call]], *, rounds: int = 30, repeats: int = 3
) -> dict[str, list[float]]:
    """Seconds for each call of each rival in a CUDA graph: the time of the device.

    Args:
        rivals: calls that do the same on different data, so that no cache holds what is read. They share a
            graph, whose time is divided by their number.
        rounds: samples.
        repeats: replays in a sample.
    """
    graphs = {name: graph_of(calls) for name, calls in rivals.items()}
    samples = eager_seconds(
        {name: graph.replay for name, graph in graphs.items()}, rounds=rounds, repeats=repeats
    )
    return {name: [value / len(rivals[name]) for value in values] for name, values in samples.items()}


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def peak_bytes(call: Call) -> int:
    """Most memory that a warm ``call`` holds at a time, beyond what was held before it."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _elapsed(call: Call, repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end) / repeats
