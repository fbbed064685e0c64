"""A page that shows trainings in three dimensions, epoch by epoch: it opens without a server and a network.

A study writes what the page shows into ``explorer.json``; one page shows one such file or several. Points are
whole numbers, in thousandths, of which three follow each other for each point.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from etflayers.checks import require, require_module
from lab.classifiers import Trained
from lab.figures import HEAD_COLORS, PALETTE
from lab.files import Row, write_atomically
from lab.views import DIMENSIONS, MOST_FEATURES, Picture, corners, is_exact, pictures

FILE, PAGE = "explorer.json", "explorer.html"
FORMAT = "etflayers explorer 1"
THOUSAND = 1000
TEMPLATES = Path(__file__).parent / "templates"
# One measure for each of NC1 to NC3, and what the page says about it beside the training.
CURVES = {
    "nc1": "train_nc1_trace",
    "nc2": "train_nc2_etf_distance_means",
    "nc3": "train_nc3_distance",
    "train_accuracy": "train_accuracy",
    "test_accuracy": "test_accuracy",
}
MOST_EDGES = 4  # classes up to which every edge of the simplex is drawn

# Blue, red, green and pink first: four classes have the colors of the library's own tetrahedron.
CLASS_COLORS = (*PALETTE[2:3], PALETTE[1], *PALETTE[3:], PALETTE[0])


def exploration(runs: Sequence[Trained], title: str, class_names: Sequence[str]) -> dict[str, Any]:
    """What the page shows of the recorded trainings of one study, as JSON values.

    Args:
        runs: trained with ``recorded=True`` on the same data.
        title: what was trained on which data.
        class_names: of the K classes.

    Raises:
        InvalidArgumentError: a training that was not recorded, or names for another number of classes.
    """
    require(len(runs) > 0, "runs must hold at least one training")
    missing = [run.name for run in runs if not run.recording]
    require(not missing, f"runs must have been trained with recorded=True, which {missing} were not")
    num_classes = len(runs[0].recording[0]["means"])
    require(
        len(class_names) == num_classes,
        f"class_names must name the {num_classes} classes of the trainings, got {len(class_names)}",
    )
    return {
        "format": FORMAT,
        "title": title,
        "classes": list(class_names),
        "exact": is_exact(num_classes),
        "corners": _whole(corners(num_classes)),
        "edges": _edges(num_classes),
        "targets": runs[0].recording[0]["targets"].tolist(),
        "runs": [_run(run) for run in runs],
    }


def write_exploration(path: Path, content: Mapping[str, Any]) -> Path:
    """Write what :func:`exploration` returned, for :func:`read_exploration`."""
    return write_atomically(
        path, (json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n").encode()
    )


def read_exploration(path: Path) -> dict[str, Any]:
    """Read what a study wrote: the file, or the folder that has it.

    Raises:
        InvalidArgumentError: there is no such file, or something else stands in it.
    """
    file = path / FILE if path.is_dir() else path
    require(
        file.is_file(),
        f"{file} does not exist: record a training by python examples/collapse_study.py --explorer",
    )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    kind = content.get("format") if isinstance(content, dict) else None
    require(
        kind == FORMAT,
        f"{file} must be what collapse_study.py --explorer wrote (format {FORMAT!r}), got {kind!r}",
    )
    wrong = _misfit(content)
    require(
        wrong is None, f"{file} is damaged: {wrong}. Write it again by collapse_study.py --explorer --resume"
    )
    return content


def write_page(path: Path, explorations: Sequence[Mapping[str, Any]]) -> Path:
    """Write one HTML file that shows these, with plotly.js inside.

    Raises:
        InvalidArgumentError: nothing to show.
        MissingDependencyError: plotly is not installed.
    """
    require(len(explorations) > 0, "explorations must hold at least one")
    plotly = require_module("plotly.offline", extra="examples")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    content = {"trainings": explorations, "classColors": CLASS_COLORS, "headColors": HEAD_COLORS}
    text = environment.get_template("explorer.html").render(
        style=(TEMPLATES / "explorer.css").read_text(encoding="utf-8"),
        most_features=MOST_FEATURES,
        script=(TEMPLATES / "explorer.js").read_text(encoding="utf-8"),
        plotly=plotly.get_plotlyjs(),
        # A script element ends at "</script", wherever that stands; JSON can do without the "<".
        content=json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )
    return write_atomically(path, text.encode())


def _run(run: Trained) -> dict[str, Any]:
    rows = {int(row["epoch"]): row for row in run.history}
    shown = pictures(run.recording)
    return {
        "head": run.head,
        "seed": run.seed,
        "epochs": [picture.epoch for picture in shown],
        "measures": {
            name: [_number(rows[picture.epoch], measure) for picture in shown]
            for name, measure in CURVES.items()
        },
        "frames": [_frame(picture) for picture in shown],
    }


def _frame(picture: Picture) -> dict[str, Any]:
    points = {name: _whole(getattr(picture, name)) for name in ("means", "frame", "features")}
    numbers = {name: _rounded(getattr(picture, name)) for name in ("distances", "cosines", "spreads")}
    return {**points, **numbers, "shares": [round(share, 4) for share in picture.shares]}


def _whole(points: Tensor) -> list[int]:
    return (THOUSAND * points).round().int().flatten().tolist()


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]


def _number(row: Row, measure: str) -> float | None:
    """Of what does not exist in this state of the model: None."""
    value = row.get(measure, math.nan)
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _edges(num_classes: int) -> list[tuple[int, int]]:
    """Pairs of vertices to join: all of them or, of many, along and between the two rings."""
    if num_classes <= MOST_EDGES:
        return list(combinations(range(num_classes), 2))
    return [(k, (k + step) % num_classes) for step in (1, 2) for k in range(num_classes)]


def _misfit(content: Mapping[str, Any]) -> str | None:
    """What does not fit together in a file of the right format; None if all does."""
    try:
        num_classes, features = len(content["classes"]), len(content["targets"])
        sizes = {"means": num_classes, "frame": num_classes, "features": features}
        for run in content["runs"]:
            name, epochs = f"{run['head']}-seed{run['seed']}", len(run["epochs"])
            lengths = {"frames": len(run["frames"])} | {key: len(run["measures"][key]) for key in CURVES}
            for key, length in lengths.items():
                if length != epochs:
                    return f"{name} has {epochs} epochs and {length} of {key}"
            for frame in run["frames"]:
                for key, points in sizes.items():
                    if len(frame[key]) != DIMENSIONS * points:
                        return (
                            f"{name} must have {points} points as {key}, got {len(frame[key]) / DIMENSIONS:g}"
                        )
        return None if content["runs"] else "it has no training"
    except (KeyError, TypeError) as error:
        return f"it lacks {error}"
