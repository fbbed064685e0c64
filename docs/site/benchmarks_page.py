"""The page of the benchmarks, from the JSON under version control that ``python -m benchmarks`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.record import to_markdown

__all__ = ["benchmarks_page"]

INTRODUCTION = """# Benchmarks

What an operation costs depends on the machine, so each section names the one that it was measured on, the
date and the command. A bound was set before the measurement; where it was missed, the table says so. No time
counts unless the result was right: a section says how many checks of correctness there were.

`make bench` measures all of it on your machine. (d, K) are the numbers of features and of classes, kappa is
the condition number of the class means.
"""


def benchmarks_page(results: Path) -> str:
    record = json.loads((results / "cpu.json").read_text(encoding="utf-8"))
    _, _, tables = to_markdown(record).partition("\n## ")
    # A suite is named like its module.
    lines = (
        f"## {line[3:].replace('_', ' ')}" if line.startswith("## ") else line
        for line in f"## {tables}".splitlines()
    )
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"
