from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """These tensors are small: threads that wait for each other are most of the time on a busy machine."""
    torch.set_num_threads(1)
