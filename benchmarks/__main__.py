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
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks import (
    bench_accuracy,
    bench_inner_loop,
    bench_learned,
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
from benchmarks.report import Report
from benchmarks.terminal import rendered, verdict

SUITES: dict[str, Callable[[bool], Report]] = {
    "nearest_etf": bench_nearest_etf.run,
    "solvers": bench_solvers.run,
    "peers": bench_peers.run,
    "stiefel": bench_stiefel.run,
    "inner_loop": bench_inner_loop.run,
    "learned": bench_learned.run,
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
                console.print(rendered(table))
    if not options.quick:
        write(merge(options.output / "cpu.json", reports, where), list(SUITES), options.output)
        for report in reports:
            if report.suite == "scaling":
                draw_scaling(report, options.output / "time.png")
        console.print(f"\nwritten to {options.output}")
    return verdict(reports, console)


if __name__ == "__main__":
    sys.exit(main())
