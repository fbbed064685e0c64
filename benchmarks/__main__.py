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
    "learned",
    "step",
    "memory",
    "accuracy",
    "scaling",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, under a minute; nothing is written"
    )
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES), help="suites to run")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)

    console = Console(width=None if sys.stdout.isatty() else 150)
    shown = ["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)]
    where = environment(shlex.join(shown))
    console.print(" · ".join(f"{name}: {value}" for name, value in where.items()))
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "benchmarks.json"
        status = _pytest(options.only, found, quick=options.quick)
        reports = read(found) if found.exists() else []
    for report in reports:
        console.rule(report.suite)
        for table in report.tables:
            console.print(rendered(table))
    if not options.quick and status == 0:
        write(merge(options.output / "cpu.json", reports, where), SUITES, options.output)
        for report in reports:
            if report.suite == "scaling":
                draw_scaling(report, options.output / "time.png")
        console.print(f"\nwritten to {options.output}")
    return 1 if status else verdict(reports, console)


def _pytest(suites: Sequence[str], output: Path, *, quick: bool) -> int:
    """Run the benchmarks of these suites in a process of its own; its exit status."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(str(HERE / f"bench_{suite}.py") for suite in suites),
        *("-m", "bench and quick" if quick else "bench and not quick"),
        *("--benchmark-enable", "--benchmark-quiet", f"--benchmark-json={output}"),
    ]
    return subprocess.run(command, cwd=HERE.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
