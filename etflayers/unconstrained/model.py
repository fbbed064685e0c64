"""Features that are free variables, with a classifier on top.

Symbols: H <-> features, n <-> per_class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.checks import require_size
from etflayers.errors import InvalidArgumentError

__all__ = ["UnconstrainedFeatures"]


class UnconstrainedFeatures(nn.Module):
    r"""Logits of n free feature vectors of each class: ``Z = head(H)``, H a parameter of nK rows.

    The model that stands for a network which can map its samples wherever it likes. Its optimizer moves the
    features themselves, and gradient descent on it is full-batch: there is no input. The features start
    uniformly on the unit sphere.

    Args:
        head: maps features ``(nK, d)`` to logits ``(nK, K)``; one that ``accepts_targets``, such as
            :class:`~etflayers.nn.NearestETFHead`, is given them. It says d and K as the heads of this library
            do, or ``nn.Linear``: ``in_features``, and ``num_classes`` or ``out_features``.
        per_class: n >= 1.
        generator: random numbers of the start.
        device: of the features; default: the CPU.
        dtype: of the features.

    Attributes:
        features: H, ``(nK, d)``, the samples of each class one after the other.
        targets: ``(nK,)``, the class of each.

    Raises:
        InvalidArgumentError: a head that does not say its sizes, or a number of samples below 1.

    Reference:
        Mixon, Parshall, Pi (2020), arXiv 2011.11619; Zhu, Ding, Zhou, Li, You, Sulam, Qu (2021), arXiv
        2105.02375.

    >>> model = UnconstrainedFeatures(nn.Linear(5, 3), per_class=2)
    >>> model().shape, model.targets
    (torch.Size([6, 3]), tensor([0, 0, 1, 1, 2, 2]))
    """

    targets: Tensor

    def __init__(
        self,
        head: nn.Module,
        per_class: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_size("per_class", per_class)
        dim = getattr(head, "in_features", None)
        num_classes = getattr(head, "num_classes", getattr(head, "out_features", None))
        if not (isinstance(dim, int) and isinstance(num_classes, int)):
            raise InvalidArgumentError(
                "head must say in_features, and num_classes or out_features: "
                f"{type(head).__name__} has {dim} and {num_classes}"
            )
        targets = torch.arange(num_classes, device=device).repeat_interleave(per_class)
        start = torch.randn(len(targets), dim, generator=generator, device=device, dtype=dtype)
        self.features = nn.Parameter(F.normalize(start, dim=-1))
        self.register_buffer("targets", targets)
        self.head = head

    def forward(self) -> Tensor:
        """Logits of all samples, ``(nK, K)``."""
        if getattr(self.head, "accepts_targets", False):
            logits: Tensor = self.head(self.features, self.targets)
            return logits
        logits = self.head(self.features)
        return logits
