"""What can only be measured in a fresh process: how much memory a call needs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["in_a_process", "peak_mb"]

ROOT = Path(__file__).resolve().parents[1]


def peak_mb() -> float:
    """Largest resident size that this process ever had."""
    status = Path("/proc/self/status")
    if status.exists():
        # `ru_maxrss` of a child starts from the peak of the process that spawned it, this one does not.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024**2 if sys.platform == "darwin" else peak / 1024


def in_a_process(module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> Any:
    """What a module of this folder, run as a script with these arguments, prints as JSON.

    Raises:
        RuntimeError: it failed; with what it wrote to the standard error.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    where = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=where, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)
