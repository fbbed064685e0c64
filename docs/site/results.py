"""The pages of the benchmarks, from the JSON under version control that ``python -m benchmarks`` wrote."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from benchmarks.record import to_markdown

__all__ = ["benchmarks_pages"]

INTRODUCTION = """# Benchmarks

What an operation costs depends on the machine, so each section names the one that it was measured on, the
date and the command. A bound was set before the measurement; where it was missed, the table says so. No time
counts unless the result was right: a section says how many checks of correctness there were.

`make bench` measures all of it on your machine. (d, K) are the numbers of features and of classes, kappa is
the condition number of the class means.
"""


def benchmarks_pages(root: Path) -> dict[str, str]:
    """The text of each page by its place in the site: of the CPU, and of each GPU that was measured."""
    folder = root / "benchmarks"
    pages = {"benchmarks/index.md": f"{INTRODUCTION}\n{tables(folder, 'cpu.json')}\n"}
    for path in sorted((folder / "results").glob("gpu-*.json")):
        title = path.stem.removeprefix("gpu-").replace("-", " ").upper()
        pages[f"benchmarks/{path.stem}.md"] = f"# On a GPU: {title}\n\n{tables(folder, path.name)}\n"
    return pages


def tables(folder: Path, name: str) -> str:
    record = json.loads((folder / "results" / name).read_text(encoding="utf-8"))
    text = "## " + to_markdown(record).partition("\n## ")[2]
    # Numbers stay whole in a narrow column.
    text = re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", text)
    text = re.sub(r"(?<=\d), (?=\d)", ",\N{NO-BREAK SPACE}", text)
    for suite in record:
        title = f"## {suite.replace('_', ' ')}"
        text = text.replace(f"## {suite}\n", f"{title}\n\n{purpose(folder, suite)}\n", 1)
    return text


def purpose(folder: Path, suite: str) -> str:
    """What a suite measures, in the words of its module."""
    module = re.sub(r"\W", "_", suite)
    candidates = (folder / f"bench_{module}.py", folder / "gpu" / f"{module}.py")
    source = next(path for path in candidates if path.exists())
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())
