r"""What is left of a squared loss: spread within classes, centers off their targets, classifier off its best.

Symbols: V = (W, b) <-> classifier, h <-> features, m_k <-> statistics.means, p <-> share of each class,
m <-> mean, lam <-> regularization.

With x = (h, 1), the loss of all samples is quadratic in V,

    L(V) = 1/2 E|Vx - e_y|^2 + lam/2 |V|^2 = L(V*) + 1/2 tr (V - V*) A (V - V*)',    A = E[xx'] + lam I,

and smallest at V* = E[e_y x'] A^+. The last term is ``perp``, which a better classifier would remove. In the
rest h = m_y + r with E[r | y] = 0, so that the mixed terms vanish and Sigma_W = E[rr'] stays:

    L(V*) = 1/2 tr W* Sigma_W W*' + lam/2 |V*|^2      (``nc1``: gone where features are their class means)
          + 1/2 sum_k p_k |W* m_k + b* - e_k|^2       (``nc23``: gone where V* maps the means to the targets).

**V* without E[xx'],** in which a large common mean m would take all digits: the second of the two rows of
V* A = E[e_y x'] gives b* = (p - W* m) / (1 + lam). Put into the first, with the total covariance
Sigma_T = Sigma_W + sum_k p_k (m_k - m)(m_k - m)',

    W* (Sigma_T + lam I + c mm') = sum_k p_k e_k (m_k - m)' + c p m',      c = lam / (1 + lam).

By the same centering, with D = V - V*, E|Dx|^2 = tr D_W Sigma_T D_W' + |D_W m + D_b|^2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.metrics.classifier import Classifier
from etflayers.metrics.nc2 import float64_rows
from etflayers.metrics.statistics import ClassStatistics

__all__ = ["MSEDecomposition", "mse_decomposition"]


class MSEDecomposition(NamedTuple):
    """Three parts of the regularized squared loss, whose sum it is.

    Attributes:
        nc1: of the features about their class means, LNC1 in the paper.
        nc23: of the class means about their targets, LNC2/3.
        perp: of the classifier about the best one for these features, the distance from the central path.
    """

    nc1: Tensor
    nc23: Tensor
    perp: Tensor


def mse_decomposition(
    statistics: ClassStatistics, classifier: Classifier, *, regularization: float = 0.0
) -> MSEDecomposition:
    r"""``1/2 E|Wh + b - e_y|^2 + lam/2 (|W|^2 + |b|^2)`` in the parts ``nc1 + nc23 + perp``.

    The mean E is over the samples. The published code weighs means by class and spread by sample, which is
    the same for classes of one size and no decomposition for others.

    Args:
        statistics: with the within-class covariance.
        classifier: W ``(K, d)`` and b ``(K,)`` or ``None`` for 0; the best classifier has a bias.
        regularization: lam >= 0; half the weight decay of a training with the loss ``E|Wh + b - e_y|^2``.

    Returns:
        Three float64 scalars >= 0.

    Raises:
        InvalidArgumentError: shapes that do not fit, lam < 0, or statistics accumulated with
            ``scatter="none"``.

    Reference:
        Han, Papyan, Donoho (2021), arXiv 2106.02073.

    >>> from etflayers.metrics import class_statistics
    >>> statistics = class_statistics(torch.eye(2), torch.arange(2), num_classes=2)
    >>> mse_decomposition(statistics, Classifier(2 * torch.eye(2))).perp
    tensor(0.5000, dtype=torch.float64)
    """
    lam = regularization
    require(0 <= lam < float("inf"), f"regularization must be finite and at least 0, got {lam}")
    means = statistics.means
    weight = float64_rows("classifier.weight", classifier.weight).to(means.device)
    num_classes, last = len(weight), int(statistics.classes[-1])
    require(
        weight.shape[1] == means.shape[1] and last < num_classes,
        f"classifier.weight must have a row for each class and d = {means.shape[1]} columns, "
        f"got {tuple(weight.shape)}",
    )
    bias = weight.new_zeros(num_classes) if classifier.bias is None else classifier.bias.detach().to(weight)
    share = statistics.counts / statistics.counts.sum()
    targets = torch.nn.functional.one_hot(statistics.classes, num_classes).to(means)
    prior, mean, centered = (
        share @ targets,
        statistics.global_mean("samples"),
        statistics.centered_means("samples"),
    )

    within = statistics.within
    total = within + centered.mT @ (share.unsqueeze(-1) * centered)
    c = lam / (1 + lam)
    identity = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    system = total + lam * identity + c * torch.outer(mean, mean)
    right = (share.unsqueeze(-1) * targets).mT @ centered + c * torch.outer(prior, mean)
    best = right @ torch.linalg.pinv(system, hermitian=True)
    best_bias = (prior - best @ mean) / (1 + lam)

    penalty = lam * (best.square().sum() + best_bias.square().sum())
    # W* m_k + b* by way of m_k - m, for the digits of a large mean.
    errors = centered @ best.mT + (prior + lam * best @ mean) / (1 + lam) - targets
    change, shift = weight - best, bias - best_bias
    perp = _form(change, total) + (change @ mean + shift).square().sum()
    perp = perp + lam * (change.square().sum() + shift.square().sum())
    return MSEDecomposition(
        (_form(best, within) + penalty) / 2, (share @ errors.square().sum(-1)) / 2, perp / 2
    )


def _form(rows: Tensor, matrix: Tensor) -> Tensor:
    """``tr R A R'``."""
    return ((rows @ matrix) * rows).sum()
