"""The claims as numbers, one for each seed, so that a reader can judge them.

A *place* is a space of a network: features in front of the head, or those of the encoder below a projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import fmean

import numpy as np

from lab.files import Row
from lab.results import grouped
from unknowns.networks import ENCODER, PROJECTOR
from unknowns.scores import SCORES

PLACE = ("data", "head", "variant", "seed", "space")
# The published scores that every place has, with a head or without: they can be compared over all places.
EVERYWHERE = ("neco", "knn", "mahalanobis")
VERTEX = "vertex"
NC1 = ("nc1_trace", "nc1_quotient")
ERRORS = {"detection": "auroc", "transfer": "transfer"}
ERRORS |= {f"detection by {score}": f"auroc_{score}" for score in SCORES}


def detection_by_place(scores: Sequence[Row]) -> dict[tuple, Row]:
    """``auroc_SCORE`` and ``fpr95_SCORE`` of each place: means over the kinds of unknown input."""
    found: dict[tuple, Row] = {}
    for (*place, score), same in grouped(scores, *PLACE, "score").items():
        row = found.setdefault(tuple(place), {})
        row |= {f"{name}_{score}": fmean(one[name] for one in same) for name in ("auroc", "fpr95")}
    return found


def joined(spaces: Sequence[Row], scores: Sequence[Row]) -> list[Row]:
    """The rows of the places with what they detect; ``auroc`` is the mean over the scores of all places."""
    detection, rows = detection_by_place(scores), []
    for row in spaces:
        own = detection[tuple(row[name] for name in PLACE)]
        both = [own[f"auroc_{score}"] for score in EVERYWHERE if f"auroc_{score}" in own]
        rows.append({**row, **own, "auroc": fmean(both)})
    return rows


def claim_rows(places: Sequence[Row]) -> list[Row]:
    """All claims, one row for each number."""
    return [*collapse_rows(places), *two_space_rows(places), *vertex_rows(places)]


def collapse_rows(places: Sequence[Row]) -> list[Row]:
    """Pearson's correlation of the logarithm of NC1 with the errors of detection and of transfer.

    Over the places of a seed that have the measure, and over the encoders alone, because a projector does
    more than to collapse features. With both forms of NC1. Published: .77 with the error of detection (what
    has collapsed detects better) and -.60 with that of generalization to other data (and transfers worse).
    """
    rows = []
    for (data, seed), same in grouped(places, "data", "seed").items():
        encoders = [row for row in same if row["space"] == ENCODER]
        groups = {"": same, ", encoders alone": encoders}
        for form, (name, measure), (end, group) in product(NC1, ERRORS.items(), groups.items()):
            pairs = [(row[form], 1 - row[measure]) for row in group if measure in row]
            if len(pairs) < 3:
                continue
            level, error = np.array(pairs).T
            value = float(np.corrcoef(np.log10(level), error)[0, 1])
            labels = {"data": data, "seed": seed, "places": len(pairs)}
            rows.append({"claim": f"{form} and error of {name}{end}", **labels, "value": value})
    return rows


def two_space_rows(places: Sequence[Row]) -> list[Row]:
    """Detection at the projector and transfer at the encoder of one network, less those of one space.

    The network has the regularizer and the projector, the other one neither.
    """
    rows = []
    for (data, head, seed), same in grouped(places, "data", "head", "seed").items():
        own = {(row["variant"], row["space"]): row for row in same}
        wanted = [("both", PROJECTOR), ("both", ENCODER), ("plain", ENCODER)]
        if all(place in own for place in wanted):
            detects, transfers, single = (own[place] for place in wanted)
            labels = {"data": data, "head": head, "seed": seed}
            gains = {
                "gain of detection": detects["auroc"] - single["auroc"],
                "gain of transfer": transfers["transfer"] - single["transfer"],
            }
            rows += [{"claim": f"two spaces, {name}", **labels, "value": gains[name]} for name in gains]
    return rows


def vertex_rows(places: Sequence[Row]) -> list[Row]:
    """AUROC of VertexDistance less that of the best other score of the same place.

    Which is best is seen on the unknown inputs: to the advantage of the others.
    """
    rows = []
    for row in places:
        others = {
            name: value
            for name, value in row.items()
            if name.startswith("auroc_") and name != f"auroc_{VERTEX}"
        }
        best = max(others, key=others.__getitem__)
        labels = {name: row[name] for name in PLACE} | {"best": best.removeprefix("auroc_")}
        value = row[f"auroc_{VERTEX}"] - others[best]
        rows.append({"claim": "VertexDistance less the best other score", **labels, "value": value})
    return rows
