"""The report of a study: all tables and figures in one file that loads nothing; names stay as they are."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lab.figures import new_figure
from lab.options import Options
from lab.results import Column, Results, Section


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Of a study that does not exist."""

    classes: str = "<b>&letters"


def test_a_report_has_all_tables_figures_and_settings(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    results = Results(tmp_path, console)
    columns = (Column("accuracy", "accuracy", ".1f", percent=True), Column("scale", "scale", "g"))
    rows = [
        {"method": "a<b>", "accuracy": 0.5, "accuracy_std": 0.012, "scale": None},
        {"method": "c", "accuracy": 0.25, "scale": 10.0},
    ]
    results.figures({"curve": lambda: new_figure(2, 2, "curve")})
    results.table(Section("First <table>", {"method": "method"}, columns, rows))
    results.sections.append(Section("Second", {"method": "method"}, columns, rows[1:]))
    results.report("A <study>", Settings())
    assert "First <table>" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "Second" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert results.names == ["curve.png", "report.html"]

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", page)
    assert cells[:7] == ["method", "accuracy", "scale", "a&lt;b&gt;", "50.0 ± 1.2", "–", "c"]
    assert "<h1>A &lt;study&gt;</h1>" in page
    assert "First &lt;table&gt;" in page
    assert "Second" in page
    assert "&lt;b&gt;&amp;letters" in page
    assert re.findall(r'(?:src|href)="([^"]{10})', page) == ["data:image"]
