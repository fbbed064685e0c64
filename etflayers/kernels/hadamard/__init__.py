"""The Walsh-Hadamard transform, as products with small Hadamard matrices."""

from etflayers.kernels.hadamard.api import hadamard_transform

__all__ = ["hadamard_transform"]
