"""The example is a script and a package beside it: put them where its own imports look."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

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


@pytest.fixture
def holds_shifted_images() -> Callable[..., None]:
    """Check that a batch is one of real images, shifted by whole pixels, and that what comes in is black."""

    def check(data: Any, generator: torch.Generator, draw: Callable[[], tuple[Any, Any]], most: int) -> None:
        replay = torch.Generator()
        replay.set_state(generator.get_state())
        inputs, targets = draw()
        originals, expected = data.train.batch(len(inputs), replay)
        shifts = torch.randint(-most, most + 1, (len(inputs), 2), generator=replay)
        assert torch.equal(targets, expected)
        black = float(-data.mean / data.deviation)
        assert float(data.test.images.min()) == pytest.approx(black)  # some pixel of the digits is black
        for image, original, (down, right) in zip(inputs, originals, shifts.tolist(), strict=True):
            padded = F.pad(original, (most,) * 4, value=black)
            height, width = original.shape[-2:]
            top, left = most - down, most - right
            torch.testing.assert_close(image, padded[:, top : top + height, left : left + width])

    return check


for module in ("matplotlib", "rich", "sklearn", "tyro"):
    pytest.importorskip(module, reason="pip install 'etflayers[examples]'")
