"""What the measures are called, how they are defined and where they end at neural collapse, for people.

Formulas in the notation of ``docs/understand/metrics.md``: K classes, d features, N samples h of class y; M
has the centered class means as rows, W the rows of the classifier, b its bias, C = I - 11'/K. Of generalized
collapse (GNC) µ are the class means of the directions h/|h|, not centered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["DESCRIPTIONS", "NOISE_DESCRIPTIONS", "Description"]


class Description(NamedTuple):
    """A measure in words, for tables, axes and reports.

    Attributes:
        label: name for people.
        formula: in Unicode.
        ideal: value at neural collapse; ``None``: it depends on the task.
        source: the paper; empty where there is none.

    >>> DESCRIPTIONS["nc1_quotient"]
    Description(label='NC1 quotient', formula='tr Σ_W / tr Σ_B', ideal=0, source='arXiv 2210.16658')
    """

    label: str
    formula: str
    ideal: float | None = 0
    source: str = ""


_PAPYAN, _ZHU, _MARKOU = "arXiv 2008.08186", "arXiv 2105.02375", "arXiv 2411.01248"
_WU, _JIANG, _FANG = "arXiv 2405.17767", "arXiv 2310.05351", "arXiv 2101.12699"
_OH, _ZHANG = "arXiv 2206.10596", "arXiv 2104.03047"


def _of_rows(what: str, x: str) -> dict[str, Description]:
    """NC2, which is measured of class means and of classifier rows alike."""
    angle = f"|cos({x}ᵢ, {x}ⱼ) + 1/(K − 1)|"
    distance = f"|{x}/|{x}|_F − W*/√K|_F, W* the nearest simplex ETF"
    formulas = {
        "equinorm": ("equinorm", f"std(|{x}ₖ|) / mean(|{x}ₖ|)", _PAPYAN),
        "equiangularity_mean": ("equiangularity", f"mean over i ≠ j of {angle}", _PAPYAN),
        "equiangularity_max": ("largest angle error", f"max over i ≠ j of {angle}", _PAPYAN),
        "gram": ("Gram distance", f"|{x}{x}'/|{x}{x}'|_F − C/√(K − 1)|_F", _ZHU),
        "etf_distance": ("distance to ETF", distance, _MARKOU),
    }
    return {
        f"nc2_{name}_{what}": Description(f"NC2 {label}, {what}", formula, 0, source)
        for name, (label, formula, source) in formulas.items()
    }


def _generalized(what: str, x: str) -> dict[str, Description]:
    """GNC2, likewise; its ideal depends on K and d, and is known for few of them."""
    hull = f"over k of dist({x}ₖ/|{x}ₖ|, convex hull of the others)"
    formulas = {
        "largest_cosine": ("largest cosine", f"max over i ≠ j of cos({x}ᵢ, {x}ⱼ)"),
        "one_vs_rest_min": ("smallest one-vs-rest distance", f"min {hull}"),
        "one_vs_rest_mean": ("one-vs-rest distance", f"mean {hull}"),
    }
    return {
        f"gnc2_{name}_{what}": Description(f"GNC2 {label}, {what}", formula, None, _JIANG)
        for name, (label, formula) in formulas.items()
    }


_ABOUT = "mean of (h − m_y)' Σ_B⁺ (h − m_y) / K, m_y and Σ_B of the training set"
_CDNV = "mean over i ≠ j of (Varᵢ + Varⱼ) / (2 |mᵢ − mⱼ|²)"
_VCI = "1 − tr((Σ_W + Σ_B)⁺ Σ_B) / min(d, K − 1)"
_RANK = "mean over k of (|Hₖ|_* / |Hₖ|_F)², Hₖ the features of class k"
_DRIFT = "|W*ₜ − W*ₜ₋₁|_F / √K, W* the simplex ETF nearest to the means, from epoch to epoch"
_ROWS = "mean over k of |wₖ/|wₖ| − (mₖ − m)/|mₖ − m||"
_ETFS = "distance between the simplex ETFs nearest to W and to M"
_NC4 = "share of samples with argmax(logits) ≠ argminₖ |h − mₖ|, mₖ of the training set"
_MARGIN = "mean of cos(h, w_y) − max over j ≠ y of cos(h, wⱼ)"
_BINS = "mean of |accuracy − confidence| over 15 bins of confidence, by size"

DESCRIPTIONS: Mapping[str, Description] = {
    "nc1_trace": Description("NC1 trace ratio", "tr(Σ_W Σ_B⁺) / K", 0, _PAPYAN),
    "nc1_trace_sum": Description("NC1 trace ratio, no 1/K", "tr(Σ_W Σ_B⁺)", 0, _PAPYAN),
    "nc1_trace_about_centers": Description("NC1 about train centers", _ABOUT, 0, _PAPYAN),
    "nc1_quotient": Description("NC1 quotient", "tr Σ_W / tr Σ_B", 0, "arXiv 2210.16658"),
    "nc1_cdnv": Description("NC1 CDNV", _CDNV, 0, "arXiv 2112.15121"),
    "nc1_vci": Description("NC1 variability collapse index", _VCI, 0, "arXiv 2306.03440"),
    "nc1_within_variance": Description("NC1 within-class variance", "mean over k of E|h − mₖ|²", 0),
    "nc1_numerical_rank": Description("NC1 numerical rank", _RANK, 1, _MARKOU),
    **_of_rows("means", "M"),
    **_of_rows("weights", "W"),
    "nc2_etf_drift_means": Description("NC2 drift of the nearest ETF", _DRIFT, 0, _MARKOU),
    "nc3_distance": Description("NC3 self-duality", "|W/|W|_F − M/|M|_F|_F", 0, _PAPYAN),
    "nc3_distance_squared": Description("NC3 self-duality, squared", "|W/|W|_F − M/|M|_F|_F²", 0, _PAPYAN),
    "nc3_coherence": Description("NC3 coherence", "|WM'/|WM'|_F − C/√(K − 1)|_F", 0, _ZHU),
    "nc3_cosine": Description("NC3 mean cosine", "mean over k of cos(wₖ, mₖ − m)", 1, _WU),
    "nc3_row_distance": Description("NC3 distance of rows", _ROWS, 0, _WU),
    "nc3_etf_distance": Description("NC3 distance of the ETFs", _ETFS, 0, _MARKOU),
    "nc4_disagreement": Description("NC4 disagreement", _NC4, 0, _PAPYAN),
    **_generalized("means", "µ"),
    **_generalized("weights", "W"),
    "gnc3_cosine": Description("GNC3 mean cosine", "mean over k of cos(wₖ, µₖ)", 1, _JIANG),
    "gnc3_row_distance": Description(
        "GNC3 distance of rows", "mean over k of |wₖ/|wₖ| − µₖ/|µₖ||", 0, _JIANG
    ),
    "minority_collapse_means": Description(
        "Minority collapse, means", "mean over i < j in the group of cos(mᵢ − m, mⱼ − m)", None, _FANG
    ),
    "minority_collapse_weights": Description(
        "Minority collapse, weights", "mean over i < j in the group of cos(wᵢ, wⱼ)", None, _FANG
    ),
    "bias_collapse": Description("Bias collapse", "|Wm + b|", 0, _ZHU),
    "margin_mean": Description("Cosine margin", _MARGIN, None, _MARKOU),
    "calibration_error": Description("Calibration error", _BINS, None),
    "accuracy": Description("Accuracy", "share of samples with argmax(logits) = y", 1),
    "accuracy_base": Description("Accuracy, base classes", "of session 0, after the last session", 1, _OH),
    "accuracy_novel": Description("Accuracy, novel classes", "of later sessions, after the last", 1, _OH),
    "accuracy_harmonic": Description("Harmonic accuracy", "2bn / (b + n) of base b and novel n", 1),
    "accuracy_average": Description("Average accuracy", "mean of the accuracies a₀ … a_T of sessions", 1),
    "accuracy_drop": Description("Performance drop", "a₀ − a_T, first and last session", 0, _ZHANG),
}

_NGUYEN = "arXiv 2206.05530"
_BIAS = "mean over y ≠ o of ⟨m_yo − m_oo, (m_yy − m_oo)/|m_yy − m_oo|⟩, m_yo the mean of label y and class o"

# Of a training set with labels y and true classes o, by `LabelNoise`.
NOISE_DESCRIPTIONS: Mapping[str, Description] = {
    "noise_rate": Description("Noise rate", "share of samples with y ≠ o", None, _NGUYEN),
    "nc1_trace_noisy": Description("NC1 by noisy labels", "tr(Σ_W Σ_B⁺) / K of features, by y", 0, _PAPYAN),
    "nc1_trace_clean": Description(
        "NC1 by true classes", "tr(Σ_W Σ_B⁺) / K of features, by o", None, _PAPYAN
    ),
    "nc1_trace_logits": Description("NC1 of logits", "tr(Σ_W Σ_B⁺) / K of logits, by y", 0, _NGUYEN),
    "corruption_bias": Description("Bias of corrupted centroids", _BIAS, None, _NGUYEN),
    "memorization": Description(
        "Memorization", "Σ over y ≠ o of |h − m_o|, m_o of the test set", None, _NGUYEN
    ),
    "memorization_mean": Description("Memorization, mean", "mean over y ≠ o of |h − m_o|", None, _NGUYEN),
    "accuracy_noisy": Description("Accuracy, noisy labels", "share of argmax(logits) = y", 1),
    "accuracy_clean": Description("Accuracy, true classes", "share of argmax(logits) = o", None),
}
