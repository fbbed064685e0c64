"""The landscape as a table: minima from random starts, the convex optimum, and the other critical points."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from comparison.reporting import make_table, write_csv
from unconstrained import landscape as theory
from unconstrained.landscape import Landscape
from unconstrained.settings import Settings


def check_theory(settings: Settings, console: Console) -> list[dict[str, Any]]:
    """Write and print the table for both losses.

    Raises:
        InvalidArgumentError: settings that do not fit.
        MissingDependencyError: cvxpy is not installed.
    """
    settings.check()
    rows = landscape_rows(Landscape(loss="ce"), settings) + landscape_rows(Landscape(loss="mse"), settings)
    console.print(_table(rows))
    file = write_csv(settings.out / "theory.csv", rows)
    console.print(f"Written to {file}", highlight=False)
    return rows


def landscape_rows(landscape: Landscape, settings: Settings) -> list[dict[str, Any]]:
    """One row for each minimum from a random start, and for a critical point of each lower rank.

    ``gap`` is the value above the optimum of the convex program. Rank K - 1 is that of the minimum.
    """
    optimum = theory.convex_optimum(landscape)
    starts: list[tuple[int | None, int]] = [(None, seed) for seed in settings.seeds]
    starts += [(rank, settings.seeds[0]) for rank in range(landscape.num_classes - 1)]
    rows = []
    for rank, seed in starts:
        point = theory.minimize(landscape, seed, rank)
        value = float(landscape.value(point))
        collapse = theory.collapse(landscape, point) if rank is None else {}
        rows.append(
            {
                "loss": landscape.loss,
                "rank": "free" if rank is None else rank,
                "seed": seed,
                "value": value,
                "convex_optimum": optimum,
                "gap": value - optimum,
                "gradient_norm": theory.gradient_norm(landscape, point),
                "least_eigenvalue": theory.least_eigenvalue(landscape, point),
                "predicted_eigenvalue": theory.predicted_eigenvalue(landscape, point),
                "collapse": max(collapse.values()) if collapse else None,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = make_table(
        "Critical points of the regularized model",
        "loss",
        "rank",
        "seed",
        "value",
        "gap",
        "gradient",
        "least\neigenvalue",
        "pre-\ndicted",
        "NC1-3",
    )
    for row in rows:
        table.add_row(
            row["loss"],
            str(row["rank"]),
            str(row["seed"]),
            f"{row['value']:.6f}",
            f"{row['gap']:.1e}",
            f"{row['gradient_norm']:.0e}",
            f"{row['least_eigenvalue']:.1e}",
            f"{row['predicted_eigenvalue']:.1e}",
            "" if row["collapse"] is None else f"{row['collapse']:.0e}",
        )
    return table
