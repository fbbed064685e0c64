from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.findings import Findings


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a shared machine two threads can be slower than one; NumPy's BLAS does not obey PyTorch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def findings(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[Findings]:
    suite = request.module.__name__.rpartition(".bench_")[2]
    found = Findings(benchmark, suite, quick=request.node.get_closest_marker("quick") is not None)
    yield found
    found.close()
