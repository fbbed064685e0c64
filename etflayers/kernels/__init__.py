"""One folder an operation: what a GPU launch computes, the eager reference beside it, and the choice."""

from etflayers.kernels import class_sums, cross_entropy, hadamard, polar
from etflayers.kernels.dispatch import Call, Choice, Impl, describe, register, use_triton

__all__ = [
    "Call",
    "Choice",
    "Impl",
    "class_sums",
    "cross_entropy",
    "describe",
    "hadamard",
    "polar",
    "register",
    "use_triton",
]
