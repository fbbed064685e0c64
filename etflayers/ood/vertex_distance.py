r"""How far a feature is from the simplex ETF that the class means have become.

Symbols: h <-> features, m <-> center, w_k <-> vertices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import require, require_size
from etflayers.functional.class_means import class_means
from etflayers.functional.logits import directions
from etflayers.functional.nearest import nearest_etf
from etflayers.ood.detector import Detector

__all__ = ["VertexDistance"]


class VertexDistance(Detector):
    r"""``-min_k |(h - m)/|h - m| - w_k|``, W the simplex ETF nearest to the class means of the training set.

    At neural collapse the direction of a feature from the global mean m is a vertex of a simplex ETF, and the
    score its largest value, 0. What the network does not know points elsewhere. Larger is more
    in-distribution. Logits are not used, and computation is in float64.

    Args:
        num_classes: K >= 2; default: the largest target in :meth:`fit` plus one.

    Attributes:
        center: m, ``(d,)``, the mean of the class means, once fitted.
        vertices: W, ``(K, d)``, unit rows.

    Raises:
        InvalidArgumentError: K < 2; from :meth:`fit` also no targets, a class without a sample, or fewer
            features than K - 1, for which there is no simplex ETF.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248 (the nearest ETF).

    >>> known = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    >>> detector = VertexDistance().fit(known, torch.tensor([0, 1]))
    >>> detector.score(torch.tensor([[5.0, 0.0], [0.0, 2.0]])).round(decimals=3)
    tensor([-0.0000, -1.4140], dtype=torch.float64)
    """

    center: Tensor
    vertices: Tensor

    def __init__(self, num_classes: int | None = None) -> None:
        if num_classes is not None:
            require_size("num_classes", num_classes, at_least=2)
        self.num_classes = num_classes

    def _fit(self, features: Tensor, targets: Tensor | None) -> None:
        require(targets is not None, "targets are needed by VertexDistance, whose vertices are of classes")
        assert targets is not None
        num_classes = int(targets.max()) + 1 if self.num_classes is None else self.num_classes
        require(num_classes >= 2, f"targets must be of two classes or more, got {max(num_classes, 0)}")
        means, counts = class_means(features.double(), targets, num_classes)
        missing = (counts == 0).nonzero().flatten().tolist()
        require(
            not missing,
            f"targets must hold a sample of every class: of {num_classes} classes {missing[:5]} have none",
        )
        center = means.mean(0)
        vertices = nearest_etf(means - center)
        self.center, self.vertices = center, vertices

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        center, vertices = self.center.to(features.device), self.vertices.to(features.device)
        units = directions(features.double() - center)
        nearest = vertices[(units @ vertices.mT).argmax(-1)]
        # Of the difference, not 2 - 2 cos: that has lost half of the digits of a short distance.
        distances: Tensor = torch.linalg.vector_norm(units - nearest, dim=-1)
        return -distances
