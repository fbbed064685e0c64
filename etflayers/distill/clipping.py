r"""Clipping of the hypergradient by a running mean of its own norm.

Hypergradients of long unrolls are small for most outer steps and huge for a few. Their scale is not known
beforehand and changes while a set is learned, so that no fixed bound serves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_values
from etflayers.errors import NonFiniteError

__all__ = ["RunningNormClip"]


class RunningNormClip(nn.Module):
    r"""Scale g to norm at most ``factor * m``, then ``m <- m + momentum (|g| - m)`` with the clipped norm.

    The first norm becomes m. The state is two buffers; nothing is read on the host.

    Args:
        factor: how many times the running norm a gradient may have, >= 1.
        momentum: weight of the newest norm, in (0, 1].

    Attributes:
        running_norm: m, ``()``.
        updates: how many gradients were seen, ``()`` int64.

    Raises:
        InvalidArgumentError: arguments out of their range.

    Reference:
        Feng, Vedantam, Kempe (2023), arXiv 2311.07025.

    >>> clip, images = RunningNormClip(factor=2.0), nn.Parameter(torch.zeros(4))
    >>> for norm in (1.0, 1.0, 100.0):
    ...     images.grad = torch.tensor([norm, 0.0, 0.0, 0.0])
    ...     print(float(clip([images])), float(images.grad[0]))
    1.0 1.0
    1.0 1.0
    100.0 2.0
    """

    running_norm: Tensor
    updates: Tensor

    def __init__(self, *, factor: float = 2.0, momentum: float = 0.1) -> None:
        super().__init__()
        require(1 <= factor < float("inf"), f"factor must be a finite number >= 1, got {factor}")
        require(0 < momentum <= 1, f"momentum must be in (0, 1], got {momentum}")
        self.factor = factor
        self.momentum = momentum
        self.register_buffer("running_norm", torch.zeros((), dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, parameters: Iterable[Tensor]) -> Tensor:
        """Scale the gradients of ``parameters`` in place, all by the same number.

        Args:
            parameters: those without a gradient are left out.

        Returns:
            The norm of all their gradients together before clipping, ``()`` float64.

        Raises:
            InvalidArgumentError: none has a gradient.
            NonFiniteError: the norm is NaN or infinite; gradients and state are as they were.
        """
        gradients = [value.grad for value in parameters if value.grad is not None]
        require(bool(gradients), "none of the parameters has a gradient: call backward() before clipping")
        device = self.running_norm.device
        norms = [
            torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients
        ]
        norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device, torch.float64) for n in norms]))
        require_values(
            norm.isfinite(),
            "the norm of the hypergradient is NaN or infinite: lower the learning rates of the inner loop, "
            "take fewer steps or a window, or skip this outer step",
            NonFiniteError,
        )
        reference = torch.where(self.updates == 0, norm, self.running_norm)
        limit = self.factor * reference
        scale = torch.where(norm > limit, limit / norm, 1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device, gradient.dtype))
        self.running_norm.copy_(reference + self.momentum * (scale * norm - reference))
        self.updates.add_(1)
        return norm

    def extra_repr(self) -> str:
        """The arguments."""
        return f"factor={self.factor}, momentum={self.momentum}"
