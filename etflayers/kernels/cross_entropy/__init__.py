"""Cross-entropy of a scaled softmax without keeping its probabilities."""

from etflayers.kernels.cross_entropy.api import (
    cross_entropy_uses_triton,
    linear_softmax_losses,
    softmax_losses,
)

__all__ = ["cross_entropy_uses_triton", "linear_softmax_losses", "softmax_losses"]
