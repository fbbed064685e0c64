"""Run the suites, print their tables and keep the results.

The exit status is 1 if a result was wrong, and 0 if it was only slower than its bound.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks import (
    bench_accuracy,
    bench_inner_loop,
    bench_memory,
    bench_nearest_etf,
    bench_peers,
    bench_scaling,
    bench_solvers,
    bench_step,
    bench_stiefel,
)
from benchmarks.environment import environment
from benchmarks.figure import draw_scaling
from benchmarks.record import merge, write
from benchmarks.report import Claim, Report, Table

SUITES: dict[str, Callable[[bool], Report]] = {
    "nearest_etf": bench_nearest_etf.run,
    "solvers": bench_solvers.run,
    "peers": bench_peers.run,
    "stiefel": bench_stiefel.run,
    "inner_loop": bench_inner_loop.run,
    "step": bench_step.run,
    "memory": bench_memory.run,
    "accuracy": bench_accuracy.run,
    "scaling": bench_scaling.run,
}
RESULTS = Path(__file__).parent / "results"


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

    # On a shared machine two threads can be slower than one; NumPy's BLAS (of a peer) does not obey PyTorch.
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 150)
    shown = ["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)]
    where = environment(shlex.join(shown))
    console.print(" · ".join(f"{name}: {value}" for name, value in where.items()))
    reports = []
    with threadpool_limits(1):
        for name in options.only:
            start = time.perf_counter()
            with console.status(f"{name} ..."):
                reports.append(SUITES[name](options.quick))
            console.rule(f"{name}, {time.perf_counter() - start:.0f} s")
            for table in reports[-1].tables:
                console.print(_rendered(table))
    if not options.quick:
        write(merge(options.output / "cpu.json", reports, where), list(SUITES), options.output)
        for report in reports:
            if report.suite == "scaling":
                draw_scaling(report, options.output / "time.png")
        console.print(f"\nwritten to {options.output}")
    return _verdict(reports, console)


def _rendered(table: Table) -> RichTable:
    rendered = RichTable(*table.columns, title=table.title, caption=table.note or None)
    for row in table.rows:
        rendered.add_row(*row)
    return rendered


def _verdict(reports: Sequence[Report], console: Console) -> int:
    """Print the claims, missed bounds last, and the failed checks; 1 if there are any of these."""
    claims = sorted((claim for report in reports for claim in report.claims), key=lambda claim: not claim.met)
    if claims:
        rows = [claim.cells() for claim in claims]
        console.print(_rendered(Table("Against the bounds of the project", list(Claim.COLUMNS), rows)))
    checks = [check for report in reports for check in report.checks]
    failures = [check for report in reports for check in report.failures]
    console.print(f"{len(checks) - len(failures)} of {len(checks)} checks of correctness passed")
    for check in failures:
        console.print(f"[red]wrong[/red]: {check.what}: error {check.error:.2e} > {check.limit:g}")
    missed = sum(not claim.met for claim in claims)
    console.print(f"{len(claims) - missed} of {len(claims)} bounds met")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
