"""Run the benchmarks by pytest-benchmark, print their tables and keep the results.

The exit status is 1 if a result was wrong or a benchmark broke, and 0 if it was only slower than its bound.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.environment import environment
from benchmarks.figure import draw_scaling
from benchmarks.record import merge, read, write
from benchmarks.report import Report
from benchmarks.terminal import rendered, verdict

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# In the order in which they are shown; each is a module bench_*.py.
SUITES = (
    "nearest_etf",
    "solvers",
    "peers",
    "stiefel",
    "inner_loop",
    "outer_step",
    "learned",
    "step",
    "metrics",
    "memory",
    "class_parallel",
    "codes",
    "accuracy",
    "scaling",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, two minutes; nothing is written")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES), help="suites to run")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)

    console = Console(width=None if sys.stdout.isatty() else 150)
    shown = ["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)]
    where = {**environment(shlex.join(shown)), "threads": "1"}  # by benchmarks/conftest.py
    console.print(" · ".join(f"{name}: {value}" for name, value in where.items()))
    reports, broken = [], False
    for suite in options.only:
        console.rule(suite)
        report = _measured(suite, quick=options.quick)
        if report is None:
            broken = True
            continue
        reports.append(report)
        for table in report.tables:
            console.print(rendered(table))
        if not options.quick:
            # After each suite, so that a run that is cut short leaves what it has measured.
            write(merge(options.output / "cpu.json", [report], where), SUITES, options.output)
            if suite == "scaling":
                draw_scaling(report, options.output / "time.png")
    if not options.quick:
        console.print(f"\nwritten to {options.output}")
    return verdict(reports, console) or int(broken)


def _measured(suite: str, *, quick: bool) -> Report | None:
    """What a suite found; ``None`` where something is wrong, which pytest has shown: nothing to keep."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "benchmarks.json"
        return read(found) if _pytest(suite, found, quick=quick) == 0 else None


def _pytest(suite: str, output: Path, *, quick: bool) -> int:
    """Run the benchmarks of a suite in a process of its own; its exit status."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        str(HERE / f"bench_{suite}.py"),
        *("-m", "bench and quick" if quick else "bench and not quick"),
        *("--benchmark-enable", "--benchmark-quiet", f"--benchmark-json={output}"),
    ]
    return subprocess.run(command, cwd=HERE.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
