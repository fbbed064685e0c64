"""One thread: these tensors are small."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads that wait for each other are most of the time on a busy machine."""
    torch.set_num_threads(1)
