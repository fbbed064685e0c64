"""Check and time the GPU paths, print the tables and keep the results.

With a timer of its own, by events of the device: the image of the GPU machine has no pytest-benchmark.

The exit status is 1 if a result was wrong or there is no GPU, and 0 if it was only slower than its bound.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.environment import environment
from benchmarks.record import merge, to_markdown
from benchmarks.terminal import rendered, verdict

# A suite is a module of this folder with a function `run(quick: bool) -> Report`.
SUITES = ("ceilings", "class_sums", "cross_entropy", "node", "resnet_step")
RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=list(SUITES), help="suites to run")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: the GPU benchmarks were not run")
        return 1

    console = Console(width=None if sys.stdout.isatty() else 150)
    shown = ["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
    where = {**_device(), **environment(shlex.join(shown))}
    console.print(" · ".join(f"{name}: {value}" for name, value in where.items()))
    reports = []
    for name in options.only:
        start = time.perf_counter()
        reports.append(importlib.import_module(f"benchmarks.gpu.{name}").run(options.quick))
        torch.cuda.empty_cache()
        console.rule(f"{name}, {time.perf_counter() - start:.0f} s")
        for table in reports[-1].tables:
            console.print(rendered(table))
        if not options.quick:
            # After each suite, so that a run that is cut short leaves what it has measured.
            _write(options.output, reports[-1:], where)
    return verdict(reports, console)


def _device() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    try:
        triton = importlib.import_module("triton").__version__
    except ImportError:
        triton = "not installed"
    return {
        "GPU": f"{properties.name}, {properties.total_memory / 2**30:.0f} GB, "
        f"compute capability {properties.major}.{properties.minor}",
        "CUDA": str(torch.version.cuda),
        "Triton": triton,
    }


def _write(folder: Path, reports: Sequence[object], where: dict[str, str]) -> None:
    """Add to ``gpu-<device>.json``, and write all of it as ``gpu-<device>.md``."""
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name(0).removeprefix("NVIDIA ")).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{device}.json"
    record = merge(path, reports, where)  # type: ignore[arg-type]
    path.write_text(json.dumps(record, indent=1) + "\n")
    # The tables of the CPU, under another heading.
    _, _, body = to_markdown(record).partition("\n## ")
    heading = [
        f"# Measured on a GPU: {torch.cuda.get_device_name(0)}",
        "",
        f"Written by `python -m benchmarks.gpu`; the samples are in `{path.name}`.",
        "",
    ]
    path.with_suffix(".md").write_text("\n".join(heading) + "\n## " + body)


if __name__ == "__main__":
    sys.exit(main())
