r"""NC1, variability collapse: how small the spread within classes is beside that between them.

With class means m_k and a global mean m, the between-class covariance is ``Sigma_B = 1/K sum_k (m_k - m)
(m_k - m)'``. It has rank K - 1 at most, for either global mean, because the rows m_k - m satisfy one linear
relation. So its pseudo-inverse is never formed: from the thin SVD ``(m_k - m)_k / sqrt K = U diag(s) V'``,

    tr(Sigma_W Sigma_B^+) = sum_j (v_j' Sigma_W v_j) / s_j^2,

a sum of K - 1 non-negative terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.metrics.statistics import ClassStatistics, GlobalMean

__all__ = [
    "class_distance_normalized_variance",
    "covariance_trace_ratio",
    "numerical_rank",
    "variability_collapse_index",
    "within_between_quotient",
]


def covariance_trace_ratio(
    statistics: ClassStatistics, *, global_mean: GlobalMean = "classes", per_class: bool = True
) -> Tensor:
    r"""``tr(Sigma_W Sigma_B^+) / K``: the within-class covariance in units of the between-class one.

    Args:
        statistics: with the within-class covariance.
        global_mean: ``"classes"`` or ``"samples"``, m in Sigma_B.
        per_class: divide by K.

    Returns:
        A float64 scalar >= 0; infinity where all class means coincide.

    Raises:
        InvalidArgumentError: statistics accumulated with ``scatter="none"``.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.

    >>> from etflayers.metrics import class_statistics
    >>> features = torch.tensor([[1.0], [3.0], [-1.0], [-3.0]])
    >>> covariance_trace_ratio(class_statistics(features, torch.tensor([0, 0, 1, 1]), 2))
    tensor(0.1250, dtype=torch.float64)
    """
    within = statistics.within
    values, directions = between_spectrum(statistics, global_mean)
    if not len(values):
        return torch.full_like(statistics.within_trace, torch.inf)
    spread = ((directions @ within) * directions).sum(-1).clamp(min=0)
    total = (spread / values.square()).sum()
    return total / len(statistics.means) if per_class else total


def within_between_quotient(statistics: ClassStatistics, *, global_mean: GlobalMean = "classes") -> Tensor:
    r"""``tr(Sigma_W) / tr(Sigma_B)``, which needs no matrix at all.

    Args:
        statistics: of any kind.
        global_mean: ``"classes"`` or ``"samples"``, m in Sigma_B.

    Returns:
        A float64 scalar >= 0; infinity where all class means coincide.

    Reference:
        Tirer, Huang, Niles-Weed (2023), arXiv 2210.16658.
    """
    between = statistics.centered_means(global_mean).square().sum() / len(statistics.means)
    return _ratio(statistics.within_trace, between)


def class_distance_normalized_variance(statistics: ClassStatistics, *, exponent: float = 1.0) -> Tensor:
    r"""CDNV: ``(Var_i + Var_j) / (2 |m_i - m_j|^{2e})``, averaged over all pairs of classes.

    Args:
        statistics: of any kind.
        exponent: e > 0; with e > 1 pairs that are far apart count less, but the scale of the features counts.

    Returns:
        A float64 scalar >= 0; infinity where two class means coincide.

    Raises:
        InvalidArgumentError: e <= 0.

    Reference:
        Galanti, György, Hutter (2021), arXiv 2112.15121.

    >>> from etflayers.metrics import class_statistics
    >>> features = torch.tensor([[1.0], [3.0], [-1.0], [-3.0]])
    >>> class_distance_normalized_variance(class_statistics(features, torch.tensor([0, 0, 1, 1]), 2))
    tensor(0.0625, dtype=torch.float64)
    """
    require(0 < exponent < float("inf"), f"exponent must be positive and finite, got {exponent}")
    distances = torch.pdist(statistics.means)
    num_classes = len(statistics.means)
    i, j = torch.triu_indices(num_classes, num_classes, offset=1, device=distances.device)
    return _ratio(
        (statistics.variances[i] + statistics.variances[j]) / 2, distances.square().pow(exponent)
    ).mean()


def variability_collapse_index(statistics: ClassStatistics, *, global_mean: GlobalMean = "classes") -> Tensor:
    r"""VCI: ``1 - tr(Sigma_T^+ Sigma_B) / rank(Sigma_B)``, ``Sigma_T = Sigma_W + Sigma_B``.

    Invariant to invertible linear maps of the features; 0 at collapse and 1 where the means tell nothing. The
    rank is ``min(d, K - 1)``, as published.

    Args:
        statistics: with the within-class covariance.
        global_mean: ``"classes"`` or ``"samples"``, m in Sigma_B.

    Returns:
        A float64 scalar in [0, 1].

    Raises:
        InvalidArgumentError: statistics accumulated with ``scatter="none"``.

    Reference:
        Xu, Liu (2023), arXiv 2306.03440.
    """
    num_classes, in_features = statistics.means.shape
    rows = statistics.centered_means(global_mean) / num_classes**0.5
    total = statistics.within + rows.mT @ rows
    # Sigma_T has rank up to d, so this is an eigenproblem of size d; Sigma_B enters by its K rows only.
    values, vectors = torch.linalg.eigh(total)
    kept = values > in_features * torch.finfo(values.dtype).eps * values[-1]
    explained = (rows @ vectors[:, kept]).square().sum(0) / values[kept]
    share: Tensor = explained.sum() / min(in_features, num_classes - 1)
    return (1 - share).clamp(0, 1)


def numerical_rank(statistics: ClassStatistics, *, centered: bool = False) -> Tensor:
    r"""``(|H_k|_* / |H_k|_F)^2`` for the features H_k ``(n_k, d)`` of each class: 1 at collapse.

    Nuclear over Frobenius norm, from the eigenvalues of H_k'H_k; those below d times the rounding of the
    largest count as zero.

    Args:
        statistics: accumulated with ``scatter="per_class"``.
        centered: take the features less their class mean instead; NaN where a class has no spread.

    Returns:
        ``(K,)`` float64; the published number is the mean.

    Raises:
        InvalidArgumentError: statistics without the covariance of each class.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.
    """
    require(
        statistics.scatter.ndim == 3,
        "numerical_rank needs the covariance of each class: accumulate with scatter='per_class'",
    )
    ranks = []
    for covariance, mean in zip(statistics.scatter, statistics.means, strict=True):
        second = covariance if centered else covariance + torch.outer(mean, mean)
        values = torch.linalg.eigvalsh(second).clamp(min=0)
        cutoff = len(mean) * torch.finfo(values.dtype).eps * values[-1]
        values = torch.where(values > cutoff, values, 0)
        ranks.append(values.sqrt().sum().square() / values.sum())
    return torch.stack(ranks)


def between_spectrum(statistics: ClassStatistics, global_mean: GlobalMean) -> tuple[Tensor, Tensor]:
    """The positive singular values s and rows V' of the centered means over sqrt K."""
    means = statistics.centered_means(global_mean)
    num_classes, in_features = means.shape
    _, values, directions = torch.linalg.svd(means / num_classes**0.5, full_matrices=False)
    # The centered rows are dependent: one of K singular values is zero but for rounding. That of the means
    # themselves decides which others are.
    rounding = max(num_classes, in_features) * torch.finfo(values.dtype).eps
    scale = torch.maximum(values[0], statistics.means.abs().max())
    kept = values > rounding * scale
    kept[num_classes - 1 :] = False
    return values[kept], directions[kept]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of non-negative numbers, with 0 / 0 = inf: where means coincide nothing has collapsed."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1), torch.inf)
