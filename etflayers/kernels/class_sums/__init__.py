"""Sums of the features of each class, and the running means that they feed."""

from etflayers.kernels.class_sums.api import (
    averages_use_triton,
    class_averages,
    class_sums,
    class_sums_reference,
    sums_use_triton,
)
from etflayers.kernels.class_sums.momentum import Momentum, momentum_steps, require_momentum
from etflayers.kernels.class_sums.reference import class_averages_reference

__all__ = [
    "Momentum",
    "averages_use_triton",
    "class_averages",
    "class_averages_reference",
    "class_sums",
    "class_sums_reference",
    "momentum_steps",
    "require_momentum",
    "sums_use_triton",
]
