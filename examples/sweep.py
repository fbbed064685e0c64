"""Which options of the nearest head matter: train with one change at a time, the other options as given.

    python examples/sweep.py                                               the sweep of docs/study.md
    python examples/sweep.py --head fixed --trials "lr 0.02" "lr 0.1" "lr 0.1, optimizer adamw"
    python examples/sweep.py --resume                                      continue what was killed

Trials are run by Ray Tune (pip install 'etflayers[sweeps]'), as many at a time as `--jobs`. The output folder
gets a row for each trial (trials.csv) and the means over the seeds (sweep.csv and sweep.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from comparison.command import command
from study.sweep import SweepSettings, sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep from the command line and return the exit status."""
    return command(SweepSettings, lambda settings: sweep(settings, Console()), argv)


if __name__ == "__main__":
    sys.exit(main())
