"""Study how networks with different classifier heads collapse.

    python examples/collapse_study.py                                     five heads, three seeds, MNIST
    python examples/collapse_study.py --head fixed nearest --loss mse --weight-decay 0 --feature-decay 1e-3
    python examples/collapse_study.py --imbalance step --imbalance-ratio 20 --balanced
    python examples/collapse_study.py --devices 2                         two processes under torchrun
    python examples/collapse_study.py --resume                            continue what was killed
    python examples/collapse_study.py --help                              everything else

The output folder gets the history of every run (HEAD-seedN.csv and .json), all numbers as one long table
(measures.csv), a summary over the seeds (summary.csv and .json), figures, checkpoints and report.html, which
shows all of it in a browser. Metrics are those of docs/metrics.md, in eval mode on the whole training and
test set, at the start (epoch 0) and after each epoch.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from comparison.command import command
from comparison.ranks import launch, launched
from study.settings import StudySettings
from study.study import study


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study from the command line and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    status = 0

    def run(settings: StudySettings) -> None:
        nonlocal status
        settings.check()
        if settings.devices > 1 and not launched():
            status = launch(__file__, arguments, settings.devices)
        else:
            study(settings, Console(), shlex.join(["python", "examples/collapse_study.py", *arguments]))

    return command(StudySettings, run, arguments) or status


if __name__ == "__main__":
    sys.exit(main())
