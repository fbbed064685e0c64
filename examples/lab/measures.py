"""What the measures of an epoch are called: those of the library with a prefix, and the loss."""

from __future__ import annotations

import math

from etflayers.metrics import DESCRIPTIONS, Description
from lab.files import Row

PARTS = {"train": "training set", "test": "test set"}
MEASURES = {name: words for name, words in DESCRIPTIONS.items() if name != "nc1_numerical_rank"}
MEASURES["loss"] = Description("Loss", "mean over the samples of what training minimizes", None)


def existing(row: Row) -> Row:
    """The measures of an epoch that exist in its state: those that are not NaN."""
    return {name: value for name, value in row.items() if name != "epoch" and not math.isnan(value)}
