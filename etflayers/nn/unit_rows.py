r"""The head whose frame is learned row by row, with nothing asked of the rows together.

Symbols: V <-> prototypes, W <-> frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from etflayers.checks import require_floating
from etflayers.functional.logits import directions
from etflayers.nn.base import CodeHead
from etflayers.nn.distributed import gathered, overwrite

__all__ = ["UnitRowHead"]


class UnitRowHead(CodeHead):
    r"""Classifier with a learned weight of unit rows: ``logits = s z W'``, ``w_k = v_k / |v_k|``.

    Only the directions of the K rows learn, each on a sphere of its own. This is the baseline that papers
    compare an ETF head with: it has the same logits, and may become a simplex ETF or not. With
    ``normalize=True`` the logits are s times cosines, as in the normalized softmax of face recognition.

    The parameter V is free, so that any optimizer trains it. The lengths of its rows have no influence on the
    logits and get no gradient, but a long row turns more slowly: gradient steps lengthen the rows, and weight
    decay shortens them again. A row shorter than 1e-12 has no direction and counts as zero.

    Args:
        in_features: d >= 1.
        num_classes: K >= 1.
        scale: s > 0, multiplies the logits (inverse temperature); an ``nn.Parameter`` learns.
        normalize: whether to divide each feature vector by its length.
        generator: random numbers of the start, which is that of ``nn.Linear``: uniform entries.
        device: of the parameter.
        dtype: of the parameter.

    Attributes:
        prototypes: V, ``(K, d)``.

    Raises:
        InvalidArgumentError: a size below 1, a scale that is not positive, a dtype that is not floating.

    Reference:
        Wang, Xiang, Cheng, Yuille (2017), arXiv 1704.06369; Yaras, Wang, Zhu, Balzano, Qu (2022), arXiv
        2209.09211.

    >>> head = UnitRowHead(in_features=2, num_classes=2, scale=5.0)
    >>> _ = head.load_state_dict({"prototypes": torch.tensor([[3.0, 4.0], [0.0, 7.0]])})
    >>> head(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).detach()
    tensor([[ 3.,  0.],
            [ 8., 10.]])
    """

    prototypes: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        start = torch.empty(num_classes, in_features, device=device, dtype=dtype)
        self.prototypes = nn.Parameter(_as_linear(start, generator))

    @property
    def frame(self) -> Tensor:
        """W, ``(K, d)``, unit rows, differentiable in V; in float32 or better."""
        return directions(gathered(self.prototypes))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw V anew from PyTorch's global generator.

        Under ``torch.distributed`` all ranks call it, and get the rows that the first one draws.
        """
        super().reset_parameters()
        start = torch.empty(self.prototypes.shape, device=self.prototypes.device, dtype=self.prototypes.dtype)
        overwrite(self.prototypes, _as_linear(start))


def _as_linear(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with the numbers with which ``nn.Linear`` would begin."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
