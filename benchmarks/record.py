"""What is kept of a run: JSON with quartiles, claims and rows, one a line, and the same as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import Claim, Report, Table

__all__ = ["merge", "read", "to_markdown", "write"]

Record = dict[str, Any]


def read(path: Path) -> Report:
    """The report of the suite whose benchmarks are in the JSON file of pytest-benchmark."""
    first, *others = (
        Report.from_record(entry["extra_info"]) for entry in json.loads(path.read_text())["benchmarks"]
    )
    for other in others:
        first.join(other)
    return first


def merge(path: Path, reports: Iterable[Report], environment: dict[str, str]) -> Record:
    """The record at ``path`` with the suites of ``reports`` replaced, each with its own environment."""
    record: Record = json.loads(path.read_text()) if path.exists() else {}
    for report in reports:
        record[report.suite] = {"environment": environment, "report": _kept(report)}
    return record


def _kept(report: Report) -> dict[str, Any]:
    """A report as it is kept: of the checks only how many there were, the closest, and those that failed."""
    kept = asdict(report)
    closest = max(report.checks, key=lambda check: check.error / check.limit, default=None)
    kept["checks"] = {
        "passed": len(report.checks) - len(report.failures),
        "of": len(report.checks),
        "closest": closest and asdict(closest),
        "failed": [asdict(check) for check in report.failures],
    }
    return kept


def write(record: Record, order: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {suite: record[suite] for suite in order if suite in record}
    (folder / "cpu.json").write_text(to_json(record) + "\n")
    (folder / "cpu.md").write_text(to_markdown(record))


def to_json(value: Any, depth: int = 0) -> str:
    """JSON in which whatever holds no more than numbers and strings stands on one line."""
    if isinstance(value, dict):
        items = [f"{json.dumps(name)}: {to_json(part, depth + 1)}" for name, part in value.items()]
        opening, closing, parts = "{", "}", list(value.values())
    elif isinstance(value, list):
        items = [to_json(part, depth + 1) for part in value]
        opening, closing, parts = "[", "]", value
    else:
        return json.dumps(value)
    # A case with its rivals is a line, too.
    is_case = isinstance(value, dict) and all(isinstance(part, list) and _flat(part) for part in parts)
    if _flat(parts) or is_case:
        return json.dumps(value)
    indent = "\n" + " " * (depth + 1)
    return opening + indent + f",{indent}".join(items) + "\n" + " " * depth + closing


def _flat(parts: list[Any]) -> bool:
    return not any(isinstance(part, (dict, list)) for part in parts)


def to_markdown(record: Record) -> str:
    parts = [
        "# Measured on a CPU",
        "",
        "Written by `python -m benchmarks`. The quartiles behind the tables are in `cpu.json`.",
    ]
    for suite, entry in record.items():
        report, checks = Report.from_record({**entry["report"], "checks": []}), entry["report"]["checks"]
        parts += ["", f"## {suite}", ""]
        parts.append(" · ".join(f"{name}: {value}" for name, value in entry["environment"].items()))
        if report.claims:
            parts += ["", *_grid(Claim.COLUMNS, (claim.cells() for claim in report.claims))]
        parts += ["", f"Correctness: {checks['passed']} of {checks['of']} checks passed."]
        for table in report.tables:
            parts += ["", *_table(table)]
        if suite == "scaling":
            parts += ["", "![Time against K and d](time.png)"]
    return "\n".join(parts) + "\n"


def _table(table: Table) -> list[str]:
    lines = [f"**{table.title}**", "", *_grid(table.columns, table.rows)]
    return [*lines, "", table.note] if table.note else lines


def _grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
