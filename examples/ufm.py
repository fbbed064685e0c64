"""Compare classifier heads on the unconstrained-features model, and check its theory.

    python examples/ufm.py --lr-grid 0.01 0.1 1    all heads, K = 10 and 100: steps until the means are an ETF
    python examples/ufm.py --sweep                 the options of the nearest head, one at a time
    python examples/ufm.py --theory                the landscape against convex optimization
    python examples/ufm.py --resume                continue what was killed
    python examples/ufm.py --help                  everything else

The output folder gets every measured step of every run (runs.csv), medians over the seeds (summary.json),
figures (.png) and checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from comparison.command import command
from unconstrained.experiment import compare, sweep
from unconstrained.landscape_report import check_theory
from unconstrained.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the experiments from the command line and return the exit status."""

    def experiment(settings: Settings) -> None:
        chosen = check_theory if settings.theory else sweep if settings.sweep else compare
        chosen(settings, Console())

    return command(Settings, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
