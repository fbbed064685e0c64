"""The example is a script and a package beside it: put them where its own imports look."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(autouse=True)
def small_models(one_thread: None) -> None:
    """The models of these tests gain nothing from a second thread."""


for module in ("matplotlib", "rich", "sklearn", "tyro"):
    pytest.importorskip(module, reason="pip install 'etflayers[examples]'")
