"""What is added to a loss so that features do not collapse."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from etflayers.checks import require_number, require_size
from etflayers.functional.neighbor_entropy import neighbor_entropy_loss

__all__ = ["EntropyRegularizer"]


class EntropyRegularizer(nn.Module):
    r"""``-mean_i log max(|z_i - z_nn(i)|, eps)`` of the directions z = f / |f| of a batch.

    :func:`etflayers.functional.neighbor_entropy_loss` as a module. Add it, times a weight such as 0.05, to
    the loss of a classifier: neighbors are pushed apart, and the features keep what a transfer to other tasks
    needs. An :class:`ETFProjector` behind them can collapse all the same.

    Args:
        epsilon: eps > 0, the shortest distance that counts.
        block_size: how many rows of the matrix of distances exist at a time.
        process_group: the ranks that share the batch; default: all.

    Raises:
        InvalidArgumentError: epsilon <= 0, a block without rows.

    Reference:
        Harun, Gallardo, Kanan (2025), arXiv 2502.10691.

    >>> import torch
    >>> EntropyRegularizer()(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))  # the distance is sqrt 2
    tensor(-0.3466)
    """

    def __init__(
        self,
        *,
        epsilon: float = 1e-8,
        block_size: int = 1024,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        require_number("epsilon", epsilon, positive=True)
        require_size("block_size", block_size)
        self.epsilon = epsilon
        self.block_size = block_size
        self.process_group = process_group

    def forward(self, features: Tensor) -> Tensor:
        """The loss of ``features`` ``(B, d)``, over the batches of all ranks."""
        return neighbor_entropy_loss(
            features,
            epsilon=self.epsilon,
            block_size=self.block_size,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"epsilon={self.epsilon}, block_size={self.block_size}"
