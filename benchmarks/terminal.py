"""What a run of benchmarks shows: its tables, and how it stands against the bounds."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.report import Claim, Report, Table

__all__ = ["rendered", "verdict"]


def rendered(table: Table) -> RichTable:
    """A table for the terminal."""
    made = RichTable(*table.columns, title=table.title, caption=table.note or None)
    for row in table.rows:
        made.add_row(*row)
    return made


def verdict(reports: Sequence[Report], console: Console) -> int:
    """Print the claims, missed bounds last, and the failed checks; 1 if there are any of these."""
    claims = sorted((claim for report in reports for claim in report.claims), key=lambda claim: not claim.met)
    if claims:
        rows = [claim.cells() for claim in claims]
        console.print(rendered(Table("Against the bounds of the project", list(Claim.COLUMNS), rows)))
    checks = [check for report in reports for check in report.checks]
    failures = [check for report in reports for check in report.failures]
    console.print(f"{len(checks) - len(failures)} of {len(checks)} checks of correctness passed")
    for check in failures:
        console.print(f"[red]wrong[/red]: {check.what}: error {check.error:.2e} > {check.limit:g}")
    missed = sum(not claim.met for claim in claims)
    console.print(f"{len(claims) - missed} of {len(claims)} bounds met")
    return 1 if failures else 0
