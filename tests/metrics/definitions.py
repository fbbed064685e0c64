"""Data of every awkward kind, and the definitions of the metrics, spelt out in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import mpmath
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from etflayers.geometry import simplex_etf

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Data:
    """Features and targets, and a classifier that is neither collapsed nor dual."""

    features: Tensor
    targets: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    @property
    def arrays(self) -> tuple[Array, npt.NDArray[np.int64]]:
        return self.features.double().numpy(), self.targets.numpy()


def make_data(kind: str, dtype: torch.dtype = torch.float64, *, k: int = 5, d: int = 7, n: int = 40) -> Data:
    generator = torch.Generator().manual_seed(7)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    targets = torch.arange(k).repeat(n)
    if kind == "imbalanced":
        targets = torch.cat([torch.full((n // 2**j + 1,), j) for j in range(k)])
    targets = targets[torch.randperm(len(targets), generator=generator)]
    means = torch.randn(k, d, **options)
    spread = {"collapsed": 1e-4, "wide": 0.3}.get(kind, 1.0)
    noise = torch.randn(len(targets), d, **options) @ torch.randn(d, d, **options)
    features = means[targets] + spread * noise
    if kind == "offset":
        features = features + 1e4
    return Data(
        features.to(dtype),
        targets,
        torch.randn(k, d, **options).to(dtype),
        torch.randn(k, **options).to(dtype),
    )


def ideal_data(k: int = 5, d: int = 7, n: int = 6) -> Data:
    """Every sample on its vertex; the bias undoes the global mean."""
    frame = simplex_etf(k, d, rotation="haar", dtype=torch.float64)
    targets = torch.arange(k).repeat(n)
    offset = torch.arange(d, dtype=torch.float64)
    weight = 3 * frame
    return Data(2 * frame[targets] + offset, targets, weight, -(weight @ offset))


def direct_statistics(data: Data, of: str = "classes") -> dict[str, Any]:
    """Class by class and sample by sample."""
    features, targets = data.arrays
    k, d = data.num_classes, features.shape[1]
    means = np.stack([features[targets == j].mean(0) for j in range(k)])
    within = np.zeros((d, d))
    for row, target in zip(features, targets, strict=True):
        within += np.outer(row - means[target], row - means[target])
    within /= len(features)
    overall = means.mean(0) if of == "classes" else features.mean(0)
    between = sum(np.outer(m - overall, m - overall) for m in means) / k
    variances = np.array([((features[targets == j] - means[j]) ** 2).sum(1).mean() for j in range(k)])
    return {
        "means": means,
        "within": within,
        "overall": overall,
        "between": between,
        "variances": variances,
        "centered": means - overall,
    }


def norm(x: Array) -> float:
    return float(np.sqrt((x**2).sum()))


def coherence(product: Array) -> float:
    k = len(product)
    return norm(product / norm(product) - (np.eye(k) - 1 / k) / np.sqrt(k - 1))


def angles(rows: Array) -> Array:
    units = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    k = len(rows)
    return np.array([abs(units[i] @ units[j] + 1 / (k - 1)) for i in range(k) for j in range(k) if i != j])


def nearest_frame(rows: Array) -> Array:
    """c times the polar factor of the centered rows, by NumPy's SVD."""
    k = len(rows)
    left, _, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    rank = k - 1
    return np.sqrt(k / (k - 1)) * left[:, :rank] @ right[:rank]


def direct_measures(data: Data, of: str = "classes") -> dict[str, float]:
    """Every measure by its definition, with d x d pseudo-inverses."""
    s = direct_statistics(data, of)
    k, d = s["means"].shape
    weight, bias = data.weight.double().numpy(), data.bias.double().numpy()
    features, targets = data.arrays
    pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
    result: dict[str, float] = {}
    # rcond: the rank of Sigma_B is K - 1, and its smallest true eigenvalue far above rounding.
    result["nc1_trace_sum"] = np.trace(s["within"] @ np.linalg.pinv(s["between"], rcond=1e-9, hermitian=True))
    result["nc1_trace"] = result["nc1_trace_about_centers"] = result["nc1_trace_sum"] / k
    # With 40 digits: at collapse Sigma_T is nearly singular, and rounding Sigma_B to 16 changes its rank.
    with mpmath.workdps(40):
        within, means = mpmath.matrix(s["within"]), mpmath.matrix(s["means"])
        counts = np.bincount(targets) if of == "samples" else np.ones(k, dtype=int)
        overall = mpmath.matrix([[int(n) for n in counts]]) * means / int(counts.sum())
        rows = means - mpmath.ones(k, 1) * overall
        between = rows.T * rows / k
        explained = mpmath.inverse(within + between) * between
        result["nc1_vci"] = float(1 - sum(explained[i, i] for i in range(d)) / min(d, k - 1))
    result["nc1_quotient"] = np.trace(s["within"]) / np.trace(s["between"])
    distance = {(i, j): ((s["means"][i] - s["means"][j]) ** 2).sum() for i, j in pairs}
    v = s["variances"]
    result["nc1_cdnv"] = float(np.mean([(v[i] + v[j]) / (2 * distance[i, j]) for i, j in pairs]))
    result["nc1_within_variance"] = float(v.mean())
    ranks = []
    for j in range(k):
        singular = np.linalg.svd(features[targets == j], compute_uv=False)
        ranks.append((singular.sum() / np.sqrt((singular**2).sum())) ** 2)
    result["nc1_numerical_rank"] = float(np.mean(ranks))
    for name, rows in (("means", s["centered"]), ("weights", weight)):
        lengths = np.sqrt((rows**2).sum(1))
        result[f"nc2_equinorm_{name}"] = lengths.std(ddof=1) / lengths.mean()
        result[f"nc2_equiangularity_mean_{name}"] = float(angles(rows).mean())
        result[f"nc2_equiangularity_max_{name}"] = float(angles(rows).max())
        result[f"nc2_gram_{name}"] = coherence(rows @ rows.T)
        result[f"nc2_etf_distance_{name}"] = norm(rows / norm(rows) - nearest_frame(rows) / np.sqrt(k))
    w, m = weight, s["centered"]
    result["nc3_distance"] = norm(w / norm(w) - m / norm(m))
    result["nc3_distance_squared"] = result["nc3_distance"] ** 2
    result["nc3_coherence"] = coherence(w @ m.T)
    cosines = [(w[j] @ m[j]) / norm(w[j]) / norm(m[j]) for j in range(k)]
    result["nc3_cosine"] = float(np.mean(cosines))
    result["nc3_row_distance"] = float(
        np.mean([norm(w[j] / norm(w[j]) - m[j] / norm(m[j])) for j in range(k)])
    )
    result["nc3_etf_distance"] = norm(nearest_frame(w) - nearest_frame(m)) / np.sqrt(k)
    result["bias_collapse"] = norm(w @ s["overall"] + bias)
    logits = features @ w.T + bias
    decisions = logits.argmax(1)
    result["accuracy"] = float((decisions == targets).mean())
    nearest = np.array([((row - s["means"]) ** 2).sum(1).argmin() for row in features])
    result["nc4_disagreement"] = float((decisions != nearest).mean())
    result["margin_mean"] = float(direct_margins(features, targets, w).mean())
    result["calibration_error"] = direct_calibration(logits, targets, bins=15)
    return result


def units_of(rows: Array) -> Array:
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def hull_distance(units: Array, k: int) -> float:
    """Distance of a unit vector from the hull of others: the nearest is in a face of d corners.

    Every set of so many corners is tried: the nearest point of its affine hull counts if it is in the hull.
    """
    others = np.delete(units, k, axis=0)
    best = np.inf
    for size in range(1, min(units.shape[1], len(others)) + 1):
        for corners in combinations(others, size):
            first, edges = corners[0], np.stack(corners)[1:] - corners[0]
            weights = np.linalg.lstsq(edges.T, units[k] - first, rcond=None)[0] if size > 1 else np.zeros(0)
            if (weights >= 0).all() and weights.sum() <= 1:
                best = min(best, norm(units[k] - first - weights @ edges))
    return float(best)


def direct_generalized(data: Data) -> dict[str, float]:
    """Generalized collapse: class means of unit features, as they are, and rows of the classifier."""
    features, targets = data.arrays
    units = np.stack([row / norm(row) for row in features])
    means = np.stack([units[targets == j].mean(0) for j in range(data.num_classes)])
    weight = data.weight.double().numpy()
    k, result = len(means), {}
    for name, rows in (("means", means), ("weights", weight)):
        cosines = [rows[i] @ rows[j] / norm(rows[i]) / norm(rows[j]) for i in range(k) for j in range(i)]
        result[f"gnc2_largest_cosine_{name}"] = float(max(cosines))
        distances = [hull_distance(units_of(rows), i) for i in range(k)]
        result[f"gnc2_one_vs_rest_min_{name}"] = min(distances)
        result[f"gnc2_one_vs_rest_mean_{name}"] = float(np.mean(distances))
    pairs = [(w / norm(w), m / norm(m)) for w, m in zip(weight, means, strict=True)]
    result["gnc3_cosine"] = float(np.mean([w @ m for w, m in pairs]))
    result["gnc3_row_distance"] = float(np.mean([norm(w - m) for w, m in pairs]))
    return result


def direct_margins(features: Array, targets: npt.NDArray[np.int64], weight: Array) -> Array:
    margins = []
    for row, target in zip(features, targets, strict=True):
        cosines = [row @ w / norm(row) / norm(w) for w in weight]
        margins.append(cosines[target] - max(c for j, c in enumerate(cosines) if j != target))
    return np.array(margins)


def direct_calibration(logits: Array, targets: npt.NDArray[np.int64], bins: int) -> float:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == targets
    error = 0.0
    for b in range(bins):
        members = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if members.any():
            error += members.mean() * abs(correct[members].mean() - confidence[members].mean())
    return float(error)


KINDS = ("random", "collapsed", "imbalanced", "offset", "wide")


def direct_loss_parts(data: Data, lam: float) -> dict[str, float]:
    """The squared loss of the samples and its parts, by least squares with the bias as a column."""
    features, targets = data.arrays
    k, n = data.num_classes, len(features)
    # With 40 digits: of features with a mean of 1e4, the second moment has lost all digits of the spread.
    with mpmath.workdps(40):
        x = mpmath.matrix(np.hstack([features, np.ones((n, 1))]))
        y = mpmath.matrix(np.eye(k)[targets])
        v = mpmath.matrix(np.hstack([data.weight.double().numpy(), data.bias.double().numpy()[:, None]])).T
        system = x.T * x / n + lam * mpmath.eye(x.cols)
        best = mpmath.inverse(system) * (x.T * y / n)
        members = [[i for i in range(n) if targets[i] == j] for j in range(k)]
        centers = [
            mpmath.matrix([[mpmath.fsum(x[i, a] for i in rows) / len(rows) for a in range(x.cols)]])
            for rows in members
        ]

        def squares(matrix: Any) -> Any:
            return mpmath.fsum(entry**2 for entry in matrix)

        spread = squares_of_means = mpmath.mpf(0)
        for j, rows in enumerate(members):
            for i in rows:
                spread += squares((x[i, :] - centers[j]) * best)
            squares_of_means += len(rows) * squares(centers[j] * best - y[rows[0], :])
        return {
            "loss": float((squares(x * v - y) / n + lam * squares(v)) / 2),
            "nc1": float((spread / n + lam * squares(best)) / 2),
            "nc23": float(squares_of_means / n / 2),
            "perp": float((squares(x * (v - best)) / n + lam * squares(v - best)) / 2),
        }


def direct_energy(rows: Array, kernel: str, s: float) -> tuple[float, float]:
    units = rows / np.sqrt((rows**2).sum(1, keepdims=True))
    distances = np.array([norm(units[i] - units[j]) for i in range(len(rows)) for j in range(i)])
    values = {"distance": distances, "log": np.log(1 / distances), "riesz": np.sign(s) * distances**-s}[
        kernel
    ]
    return float(values.mean()), float(((values - values.mean()) ** 2).mean())


def direct_cdnv(data: Data, exponent: float) -> float:
    s = direct_statistics(data)
    v, m = s["variances"], s["means"]
    pairs = [(i, j) for i in range(len(m)) for j in range(len(m)) if i != j]
    return float(np.mean([(v[i] + v[j]) / (2 * norm(m[i] - m[j]) ** (2 * exponent)) for i, j in pairs]))


def direct_agreement(data: Data) -> Array:
    features, targets = data.arrays
    means = direct_statistics(data)["means"]
    decisions = (features @ data.weight.double().numpy().T + data.bias.double().numpy()).argmax(1)
    nearest = np.array([((row - means) ** 2).sum(1).argmin() for row in features])
    return np.array([(decisions == nearest)[targets == j].mean() for j in range(data.num_classes)])
