"""The example is a script and a package beside it: put them where its own imports look."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models of these tests gain nothing from a second thread and stall with two on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


for module in ("matplotlib", "rich", "sklearn", "tyro"):
    pytest.importorskip(module, reason="pip install 'etflayers[examples]'")
