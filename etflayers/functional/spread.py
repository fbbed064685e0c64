r"""Class means in units of their own size, so that a weight against them is a pure number.

Symbols: X <-> means, omega <-> weights, r <-> spread.

A proximal term ``delta |W - A|^2`` beside class means of any length means nothing until the means have a
unit. With ``Y = diag(omega)(X - 1 x_omega')`` the centered, weighted means (see ``functional.nearest``), the
unit is the root of the mean squared length of the rows of Y of the classes with positive weight,

    r = |Y| / sqrt(#{k: omega_k > 0}),

but not less than ``eps sqrt(d) max|X|``, below which there is only rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["unit_spread"]


def unit_spread(means: Tensor, weights: Tensor, *, rounding: float | None = None) -> Tensor:
    """The centered class means divided by r.

    Args:
        means: X, ``(K, d)``.
        weights: omega, ``(K,)``, not negative.
        rounding: eps of the data behind the means, where ``means`` is in a wider dtype; default: its own.

    Returns:
        ``(K, d)``, differentiable in ``means``.

    >>> unit_spread(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.ones(2))
    tensor([[ 1.,  0.],
            [-1.,  0.]])
    """
    info = torch.finfo(means.dtype)
    column = weights.unsqueeze(-1)
    # In units of the largest entry no square overflows or vanishes. The unit is a constant: r takes it back.
    unit = means.detach().abs().amax().clamp(min=info.tiny)
    rows = means / unit
    rows = rows - weights @ rows / weights.sum().clamp(min=info.tiny)
    present = (weights > 0).sum().clamp(min=1).to(rows.dtype)
    spread = torch.linalg.vector_norm(column * rows) / present.sqrt()
    floor = (info.eps if rounding is None else rounding) * means.shape[-1] ** 0.5
    scaled: Tensor = rows / spread.clamp(min=floor)
    return scaled
