"""The example is a script and a package beside it: put them where its own imports look."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))


@pytest.fixture(autouse=True)
def small_models(one_thread: None) -> None:
    """The models of these tests gain nothing from a second thread."""


@pytest.fixture
def killed() -> Callable[[str, Sequence[str], Path, int], None]:
    """Run a script that writes checkpoints, kill it so many times, and let it finish."""
    pytest.importorskip("geoopt")
    if not hasattr(os, "fork"):
        pytest.skip("needs fork and SIGKILL")

    def run(script: str, arguments: Sequence[str], checkpoints: Path, kills: int) -> None:
        killer = [sys.executable, Path(__file__).with_name("killer.py"), EXAMPLES, script, str(kills)]
        command = [*killer, checkpoints, *arguments]
        here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("killed\n") == kills

    return run


for module in ("matplotlib", "rich", "sklearn", "tyro"):
    pytest.importorskip(module, reason="pip install 'etflayers[examples]'")
