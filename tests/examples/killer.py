"""Run an example again and again, kill it at random moments, and let the last run finish.

Usage: killer.py EXAMPLES SCRIPT KILLS CHECKPOINTS ARGUMENT...

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
from collections.abc import Callable, Sequence
from pathlib import Path


def run_and_kill(main: Callable[[Sequence[str]], int], kills: int, folder: Path, argv: Sequence[str]) -> int:
    """Kill as many runs as asked for and return the exit status of the one after them."""
    moments = random.Random(0)
    for _ in range(kills):
        before, child = newest(folder), start(main, argv)
        while newest(folder) == before:
            require_alive(child)
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        require_alive(child)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print("killed", flush=True)
    _, status = os.waitpid(start(main, argv), 0)
    return os.waitstatus_to_exitcode(status)


def start(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    child = os.fork()
    if child == 0:
        os._exit(main(argv))
    return child


def newest(folder: Path) -> int:
    return max((path.stat().st_mtime_ns for path in folder.glob("*.pt")), default=0)


def require_alive(child: int) -> None:
    if os.waitpid(child, os.WNOHANG)[0]:
        sys.exit("a run ended before it was killed: make it longer")


if __name__ == "__main__":
    examples, script, kills, checkpoints, *arguments = sys.argv[1:]
    sys.path.insert(0, examples)
    for module in ("geoopt", "sklearn.datasets"):  # once, and not in every fork
        importlib.import_module(module)
    main = importlib.import_module(script).main
    sys.exit(run_and_kill(main, int(kills), Path(checkpoints), arguments))
