"""What can go wrong: the exceptions that etflayers raises on purpose.

Every message names the argument, what was received and what to do about it. The checks that raise them are
in ``checks``.
"""

from __future__ import annotations

__all__ = [
    "ConvergenceError",
    "EtfLayersError",
    "InvalidArgumentError",
    "ManifoldError",
    "MissingDependencyError",
    "MissingTargetsError",
    "NonFiniteError",
    "NotFittedError",
    "RanksDisagreeError",
    "RecomputationError",
]


class EtfLayersError(Exception):
    """Base of every error raised on purpose by etflayers."""


class InvalidArgumentError(EtfLayersError, ValueError):
    """An argument has a wrong shape, dtype or value."""


class NonFiniteError(EtfLayersError, ArithmeticError):
    """A tensor holds NaN or infinity where the mathematics needs finite numbers."""


class ConvergenceError(EtfLayersError, ArithmeticError):
    """An iterative solver stopped before its answer was accurate enough."""


class ManifoldError(EtfLayersError, RuntimeError):
    """A point left the manifold on which it has to stay."""


class MissingTargetsError(EtfLayersError, RuntimeError):
    """A head that learns from class means was trained without targets."""


class NotFittedError(EtfLayersError, RuntimeError):
    """A detector was asked for scores before it has seen training features."""


class RecomputationError(EtfLayersError, RuntimeError):
    """A pass that changes its own state was run again for its gradient."""


class RanksDisagreeError(EtfLayersError, RuntimeError):
    """Another rank of a distributed run refused its part of the work."""


class MissingDependencyError(EtfLayersError, ImportError):
    """An optional dependency is needed and not installed."""
