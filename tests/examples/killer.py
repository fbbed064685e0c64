"""Run the example again and again, kill it at random moments, and let the last run finish.

Usage: killer.py EXAMPLES KILLS SEED CHECKPOINTS ARGUMENT...

A process of its own, which imports everything once and forks: a fork starts in no time, has its own memory
and dies of SIGKILL as any process does. Each run lives until it has written a checkpoint, and then for a
random moment more. Prints one line for each kill.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run_and_kill(arguments: Sequence[str], kills: int, seed: int, checkpoints: Path) -> int:
    """Kill as many runs as asked for and return the exit status of the one after them."""
    moments = random.Random(seed)
    for _ in range(kills):
        before, child = newest(checkpoints), start(arguments)
        while newest(checkpoints) == before:
            require_alive(child)
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        require_alive(child)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)
    _, status = os.waitpid(start(arguments), 0)
    return os.waitstatus_to_exitcode(status)


def start(arguments: Sequence[str]) -> int:
    from train_heads import main

    child = os.fork()
    if child == 0:
        os._exit(main(arguments))
    return child


def newest(checkpoints: Path) -> int:
    return max((path.stat().st_mtime_ns for path in checkpoints.glob("*.pt")), default=0)


def require_alive(child: int) -> None:
    if os.waitpid(child, os.WNOHANG)[0]:
        sys.exit("a run ended before it was killed: make it longer")


if __name__ == "__main__":
    examples, kills, seed, checkpoints, *arguments = sys.argv[1:]
    sys.path.insert(0, examples)
    for module in ("geoopt", "sklearn.datasets", "train_heads"):
        importlib.import_module(module)
    sys.exit(run_and_kill(arguments, int(kills), int(seed), Path(checkpoints)))
