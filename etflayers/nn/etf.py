r"""What every simplex-ETF head is, and how one that stores its frame keeps it an ETF.

Symbols: W <-> stored, c <-> etf_radius.

A frame in a buffer is written by others, too: averages of models (EMA, SWA) write means of frames, a
checkpoint any numbers, ``to_empty`` what the memory held. An average of simplex ETFs is none, but it keeps
what is linear or convex about them: its rows sum to zero, and none is longer than 1. If it spans K - 1
dimensions, one ETF is nearest to it, and that is what an average of frames can mean. Nothing else passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etflayers._torch import is_concrete, stamp
from etflayers.errors import ManifoldError
from etflayers.functional.nearest import nearest_etf
from etflayers.geometry import centered_basis_apply, is_simplex_etf, require_etf_dims
from etflayers.geometry.tolerance import default_atol
from etflayers.nn.base import CodeHead

__all__ = ["ETFHead"]

_ATOL = default_atol(torch.float32)
# Room for averages that were formed in half precision, or stored in it.
_ROUNDING = 0.05
# Smallest singular value of an average below which the nearest ETF would follow rounding.
_RANK = 0.01


class ETFHead(CodeHead):
    r"""Linear classifier whose weight is a simplex ETF: ``logits = s (z - m) W'``, ``WW' = c^2 (I - 11'/K)``.

    Base of :class:`~etflayers.nn.FixedETFHead`, :class:`~etflayers.nn.NearestETFHead` and
    :class:`~etflayers.nn.LearnedETFHead`: all K classes are equally far from each other.

    Args:
        in_features: d >= K - 1.
        num_classes: K >= 2.
        scale: s > 0.
        normalize: whether to divide each feature vector by its length.

    Raises:
        InvalidArgumentError: K < 2, d < K - 1, or a scale that is not positive and finite.

    Reference:
        Papyan, Han, Donoho (2020), arXiv 2008.08186.

    >>> from etflayers.nn import FixedETFHead
    >>> isinstance(FixedETFHead(in_features=4, num_classes=3), ETFHead)
    True
    """

    def __init__(
        self, in_features: int, num_classes: int, *, scale: float | Tensor = 1.0, normalize: bool = False
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        require_etf_dims(num_classes, in_features)
        self._trusted: tuple[int, int] | None = None

    def trust(self, stored: Tensor) -> None:
        """Note that ``stored`` has been written by the head itself, and is an ETF."""
        if is_concrete(stored):
            self._trusted = stamp(stored)

    def trusted(self, stored: Tensor) -> Tensor:
        """``stored``, ``(K, d)``, which is made an ETF again if others have written an average into it.

        It is looked at once after each change, which on an accelerator waits for the device: after a load or
        a move, and in eval mode after any write. (In training DistributedDataParallel writes the buffers of
        the first rank into the others before every pass.) While PyTorch traces it has no values, and is
        taken as it is.

        Raises:
            ManifoldError: it is neither a simplex ETF nor an average of some.
        """
        if not is_concrete(stored):
            return stored
        now, known = stamp(stored), self._trusted
        if known is not None and (now[0] == known[0] if self.training else now == known):
            return stored
        # A frame that was made in float32 and converted is as good as it was.
        if not is_simplex_etf(stored, atol=max(_ATOL, default_atol(stored.dtype))):
            _require_average(stored, type(self).__name__)
            with torch.no_grad():
                stored.copy_(nearest_etf(stored))
        self._trusted = stamp(stored)
        return stored

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._trusted = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_trusted": None}


@torch.no_grad()
def _require_average(stored: Tensor, name: str) -> None:
    rows = stored.double()
    finite = bool(torch.isfinite(rows).all())
    singular_values = torch.linalg.svdvals(centered_basis_apply(rows)) if finite else rows
    if (
        finite
        and float(rows.sum(-2).norm()) <= _ROUNDING
        and float(rows.norm(dim=-1).max()) <= 1 + _ROUNDING
        and float(singular_values.min()) >= _RANK
    ):
        return
    raise ManifoldError(
        f"the frame of {name} has been overwritten with something that is neither a simplex ETF nor an "
        "average of simplex ETFs (after to_empty() it holds whatever was in memory; an average whose rows "
        "nearly cancel has no nearest ETF): call head.reset_parameters(), or load a state dict that holds "
        "the frame"
    )
