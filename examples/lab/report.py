"""One HTML file that shows a study of heads: it opens without a server and without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.classifiers import Trained
from lab.files import Row, write_atomically
from lab.measures import MEASURES, PARTS
from lab.pages import rendered
from lab.pictures import DECADES
from lab.results import Column

CAPTIONS = {
    "collapse": "Neural collapse by epoch.",
    "measures": "Every measure on the training set by epoch.",
    "measures_test": "Every measure on the test set by epoch.",
    "etf_distances": "Distances to and between nearest simplex ETFs by epoch.",
    "margins": "Cosine margins of all samples in ascending order (the curve P_CM). A sample below 0 is "
    "closer to the classifier row of another class.",
    "cosines": "Cosines between centered class means and between centered classifier rows at the end, first "
    "seed of each head. At collapse every one off the diagonal is −1/(K − 1).",
    "accuracy": "Accuracy by epoch.",
    "loss": "Loss by epoch.",
    "class_means_3d": "Class means and classifier rows in the space that the class means span, first seed of "
    "each head, turned such that the nearest simplex ETF is the same tetrahedron everywhere.",
}


def write_report(
    folder: Path,
    runs: Sequence[Trained],
    rows: Sequence[Row],
    columns: Sequence[Column],
    figures: Sequence[Path],
    settings: Mapping[str, Any],
    title: str,
    command: str,
) -> Path:
    """Write ``report.html``.

    Args:
        folder: where to.
        runs: the trainings.
        rows: statistics over the seeds, one row for each head and measure.
        columns: the measures to show first.
        figures: PNG files, shown in this order.
        settings: what decided the numbers.
        title: of the study.
        command: what made it.
    """
    table: dict[str, dict[str, Row]] = {}
    for row in rows:
        table.setdefault(row["head"], {})[row["measure"]] = row
    text = rendered(
        "report.html",
        figures,
        captions=CAPTIONS,
        title=title,
        command=command,
        settings=settings,
        seeds=sorted({run.seed for run in runs}),
        epochs=int(runs[0].last["epoch"]),
        columns=columns,
        means={head: flat(measures) for head, measures in table.items()},
        table=table,
        names=list(dict.fromkeys(row["measure"] for row in rows)),
        measures=MEASURES,
        parts=PARTS,
        decades=DECADES,
    )
    return write_atomically(folder / "report.html", text.encode())


def flat(measures: Mapping[str, Row]) -> Row:
    """Means and deviations of statistics by measure, as columns take them."""
    means = {name: row["mean"] for name, row in measures.items()}
    return means | {f"{name}_std": row["std"] for name, row in measures.items()}
