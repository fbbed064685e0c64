"""AUROC and FPR95 by counting pairs and thresholds, and by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.ood import ood_metrics

pytest.importorskip("torchmetrics")


def counted(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    a, b = inside.numpy()[:, None], outside.numpy()[None]
    auroc = float(((a > b) + 0.5 * (a == b)).mean())
    thresholds = [t for t in np.concatenate([a[:, 0], b[0]]) if (a[:, 0] >= t).mean() >= 0.95]
    return auroc, min(float((b[0] >= t).mean()) for t in thresholds)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e4])  # what a sigmoid would tie, from both sides
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "m"), [(200, 70), (20, 300), (1, 1)])
def test_it_counts_pairs_and_thresholds(factor: float, ties: bool, n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 1 + torch.randn(n, generator=generator, dtype=torch.float64)
    outside = torch.randn(m, generator=generator, dtype=torch.float64)
    if ties:
        inside, outside = inside.round(), outside.round()
    found = ood_metrics(factor * inside, factor * outside)
    assert found == pytest.approx(counted(factor * inside, factor * outside), abs=1e-6)
    metrics = pytest.importorskip("sklearn.metrics")
    labels, scores = np.repeat([1, 0], [n, m]), np.concatenate([inside, outside])
    assert found.auroc == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-6)


def test_limits() -> None:
    high, low = torch.arange(20.0) + 100, torch.arange(30.0)
    assert ood_metrics(high, low) == (1.0, 0.0)
    assert ood_metrics(low, high) == (0.0, 1.0)
    assert ood_metrics(low, low).auroc == pytest.approx(0.5)
    assert ood_metrics(torch.ones(3), torch.ones(4)) == (0.5, 1.0)
    assert ood_metrics(high.bfloat16(), low.requires_grad_()).auroc == 1
    assert ood_metrics(torch.tensor([torch.inf]), torch.tensor([-torch.inf])) == (1.0, 0.0)


def test_what_has_no_order_is_named() -> None:
    ones = torch.ones(3)
    with pytest.raises(NonFiniteError, match="scores_out must not hold NaN"):
        ood_metrics(ones, ones * torch.nan)
    with pytest.raises(
        InvalidArgumentError, match=r"scores_in must have shape \(n,\) with n >= 1, got \(0,\)"
    ):
        ood_metrics(ones[:0], ones)
    with pytest.raises(InvalidArgumentError, match=r"scores_out must have shape .* got \(3, 1\)"):
        ood_metrics(ones, ones[:, None])
    with pytest.raises(InvalidArgumentError, match="scores_in must have a real floating-point dtype"):
        ood_metrics(ones.long(), ones)
