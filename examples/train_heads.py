"""Train a ResNet with a linear head and with simplex-ETF heads, and compare them.

    python examples/train_heads.py --demo                           all heads on 5000 MNIST images, minutes
    python examples/train_heads.py --seeds 0 1 2 --out runs/seeds   the same with three seeds
    python examples/train_heads.py --feature-dim K                  as many features as classes: what it saves
    python examples/train_heads.py --resume                         continue what was killed
    python examples/train_heads.py --help                           everything else

The output folder gets the history of every run (HEAD-seedN.csv and .json), a summary of the heads
(summary.csv and .json), figures (.png) and checkpoints. Loss, accuracy and the metrics of neural collapse
are taken in eval mode over the whole training and test set: at the start (epoch 0) and after each epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from comparison.command import command
from comparison.compare import compare
from comparison.settings import ComparisonSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run a comparison from the command line and return the exit status."""
    return command(ComparisonSettings, lambda settings: compare(settings, Console()), argv)


if __name__ == "__main__":
    sys.exit(main())
