"""What every test starts from: a fixed seed, reproducible examples, and a GPU only where there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", derandomize=True, deadline=None, database=None)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Draw the same random numbers in a test whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Dynamo counts what it has compiled of a function, and refuses the ninth: other tests must not count."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors, where threads that wait for each other take most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` on a machine without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
