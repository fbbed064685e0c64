"""What the measures of an epoch are called, how they are defined and where they end at neural collapse.

Formulas in the notation of ``docs/metrics.md``: K classes, d features, N samples h of class y; M has the
centered class means as rows, W the rows of the classifier, b its bias, C = I - 11'/K.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lab.files import Row

PARTS = {"train": "training set", "test": "test set"}


class Measure(NamedTuple):
    """Name for people, formula, value at neural collapse (``None``: it depends on the task), source."""

    label: str
    formula: str
    ideal: float | None = 0
    source: str = ""


def _of_rows(what: str, x: str) -> dict[str, Measure]:
    """NC2, which is measured of class means and of classifier rows alike."""
    angle = f"|cos({x}ᵢ, {x}ⱼ) + 1/(K − 1)|"
    distance = f"|{x}/|{x}|_F − W*/√K|_F, W* the nearest simplex ETF"
    formulas = {
        "equinorm": ("equinorm", f"std(|{x}ₖ|) / mean(|{x}ₖ|)", "[1]"),
        "equiangularity_mean": ("equiangularity", f"mean over i ≠ j of {angle}", "[1]"),
        "equiangularity_max": ("largest angle error", f"max over i ≠ j of {angle}", "[1]"),
        "gram": ("Gram distance", f"|{x}{x}'/|{x}{x}'|_F − C/√(K − 1)|_F", "[6]"),
        "etf_distance": ("distance to ETF", distance, "[5]"),
    }
    return {
        f"nc2_{name}_{what}": Measure(f"NC2 {label}, {what}", formula, 0, source)
        for name, (label, formula, source) in formulas.items()
    }


_ABOUT = "mean of (h − m_y)' Σ_B⁺ (h − m_y) / K, m_y and Σ_B of the training set"
_DRIFT = "|W*ₜ − W*ₜ₋₁|_F / √K, W* the simplex ETF nearest to the means, from epoch to epoch"
_ETFS = "distance between the simplex ETFs nearest to W and to M"
_NC4 = "share of samples with argmax(logits) ≠ argminₖ |h − mₖ|, mₖ of the training set"
_BINS = "mean of |accuracy − confidence| over 15 bins of confidence, by size"
_MARGIN = "mean of cos(h, w_y) − max over j ≠ y of cos(h, wⱼ)"
_VCI = "1 − tr((Σ_W + Σ_B)⁺ Σ_B) / min(d, K − 1)"
_ROWS = "mean over k of |wₖ/|wₖ| − (mₖ − m)/|mₖ − m||"

MEASURES: dict[str, Measure] = {
    "nc1_trace": Measure("NC1 trace ratio", "tr(Σ_W Σ_B⁺) / K", 0, "[1]"),
    "nc1_trace_sum": Measure("NC1 trace ratio, no 1/K", "tr(Σ_W Σ_B⁺)", 0, "[1]"),
    "nc1_trace_about_centers": Measure("NC1 about train centers", _ABOUT, 0, "[1]"),
    "nc1_quotient": Measure("NC1 quotient", "tr Σ_W / tr Σ_B", 0, "[2]"),
    "nc1_cdnv": Measure("NC1 CDNV", "mean over i ≠ j of (Varᵢ + Varⱼ) / (2 |mᵢ − mⱼ|²)", 0, "[3]"),
    "nc1_vci": Measure("NC1 variability collapse index", _VCI, 0, "[4]"),
    "nc1_within_variance": Measure("NC1 within-class variance", "mean over k of E|h − mₖ|²", 0),
    **_of_rows("means", "M"),
    **_of_rows("weights", "W"),
    "nc2_etf_drift_means": Measure("NC2 drift of the nearest ETF", _DRIFT, 0, "[5]"),
    "nc3_distance": Measure("NC3 self-duality", "|W/|W|_F − M/|M|_F|_F", 0, "[1]"),
    "nc3_distance_squared": Measure("NC3 self-duality, squared", "|W/|W|_F − M/|M|_F|_F²", 0, "[1]"),
    "nc3_coherence": Measure("NC3 coherence", "|WM'/|WM'|_F − C/√(K − 1)|_F", 0, "[6]"),
    "nc3_cosine": Measure("NC3 mean cosine", "mean over k of cos(wₖ, mₖ − m)", 1, "[7]"),
    "nc3_row_distance": Measure("NC3 distance of rows", _ROWS, 0, "[7]"),
    "nc3_etf_distance": Measure("NC3 distance of the ETFs", _ETFS, 0, "[5]"),
    "nc4_disagreement": Measure("NC4 disagreement", _NC4, 0, "[1]"),
    "bias_collapse": Measure("Bias collapse", "|Wm + b|", 0, "[6]"),
    "margin_mean": Measure("Cosine margin", _MARGIN, None, "[5]"),
    "calibration_error": Measure("Calibration error", _BINS, None),
    "accuracy": Measure("Accuracy", "share of samples with argmax(logits) = y", 1),
    "loss": Measure("Loss", "mean over the samples of what training minimizes", None),
}

SOURCES = (
    "Papyan, Han, Donoho (2020), arXiv 2008.08186",
    "Tirer, Huang, Niles-Weed (2023), arXiv 2210.16658",
    "Galanti, György, Hutter (2021), arXiv 2112.15121",
    "Xu, Liu (2023), arXiv 2306.03440",
    "Markou, Ajanthan, Gould (2024), arXiv 2411.01248",
    "Zhu, Ding, Zhou, Li, You, Sulam, Qu (2021), arXiv 2105.02375",
    "Wu, Papyan (2024), arXiv 2405.17767",
)


def existing(row: Row) -> Row:
    """The measures of an epoch that exist in its state: those that are not NaN."""
    return {name: value for name, value in row.items() if name != "epoch" and not math.isnan(value)}
