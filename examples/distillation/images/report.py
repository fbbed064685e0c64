"""What a study of learned images found: rows for programs, tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table

from comparison.reporting import make_table
from distillation.images.distiller import Learned
from distillation.images.evaluation import Outcome
from distillation.images.outer import OuterObjective


@dataclass(frozen=True)
class SeedResult:
    """The set learned with a seed, and what networks made of it and of the baselines."""

    seed: int
    learned: Learned
    outcomes: list[Outcome]

    def content(self) -> dict[str, Any]:
        """Everything but the set, as JSON values."""
        return {
            "seed": self.seed,
            "seconds": self.learned.seconds,
            "rates": self.learned.distilled.rates.tolist(),
            "outcomes": [
                {**outcome.row(), "each": outcome.measures, "curves": outcome.curves}
                for outcome in self.outcomes
            ],
            "history": self.learned.history,
        }


def read_outcomes(path: Path, record: Mapping[str, Any]) -> list[Outcome] | None:
    """What a finished seed has found, if its file is there and of the same settings."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    if any(content[name] != value for name, value in record.items()):
        return None
    return [
        Outcome(row["training"], row["network"], row["each"], row["curves"], row["rate"])
        for row in content["outcomes"]
    ]


def summary_rows(results: Sequence[SeedResult]) -> list[dict[str, Any]]:
    """One row for each training and architecture: mean and deviation over all networks of all seeds.

    ``NAME_seeds`` are the means of each seed by itself, ``NAME_before`` the mean of networks not yet trained.
    """
    rows = []
    for key in dict.fromkeys((o.training, o.network) for result in results for o in result.outcomes):
        same = [o for result in results for o in result.outcomes if (o.training, o.network) == key]
        rates = sorted({o.rate for o in same if o.rate is not None})
        row: dict[str, Any] = {
            "training": key[0],
            "network": key[1],
            "networks": sum(len(o.measures) for o in same),
            "rate": ", ".join(f"{rate:g}" for rate in rates) if rates else None,
        }
        for name in same[0].measures[0]:
            values = [measures[name] for o in same for measures in o.measures]
            row[name] = fmean(values)
            row[f"{name}_std"] = stdev(values) if len(values) > 1 else None
            row[f"{name}_seeds"] = [fmean(measures[name] for measures in o.measures) for o in same]
        before = [curve[0][1] for o in same for curve in o.curves]  # after no step
        for name in before[0] if before else ():
            row[f"{name}_before"] = fmean(measures[name] for measures in before)
        rows.append(row)
    return rows


def summary_table(rows: Sequence[Mapping[str, Any]], objective: OuterObjective, name: str) -> Table:
    """The rows of :func:`summary_rows` for reading: mean and deviation, in per cent, of how many networks."""
    measures = [objective.headline]
    measures += [m for m in ("others", "accuracy") if m in rows[0] and m != objective.headline]
    table = make_table(
        f"Networks trained on a few images, tested on {name}",
        "training",
        "network",
        "rate",
        *(f"{measure} %" for measure in measures),
        "of",
    )
    table.columns[0].justify = table.columns[1].justify = "left"
    for row in rows:
        table.add_row(
            row["training"],
            row["network"],
            row["rate"] or "learned",
            *(percent(row[measure], row[f"{measure}_std"]) for measure in measures),
            str(row["networks"]),
        )
    return table


def outcome_text(outcome: Outcome) -> str:
    """One line: what was trained on what, and how well."""
    row = outcome.row()
    parts = [f"{name} {percent(row[name], row[f'{name}_std'])} %" for name in outcome.measures[0]]
    rate = "" if outcome.rate is None else f", rate {outcome.rate:g}"
    return f"{outcome.training}, {outcome.network}{rate}: {', '.join(parts)}"


def percent(mean: float, deviation: float | None) -> str:
    """Mean and, if there is one, deviation."""
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")
