"""How a gradient flows through a minimizer. No solver code lives here."""

from etflayers.adjoints.adjoint import Adjoint, Detached, Implicit, Problem, Unrolled, as_adjoint
from etflayers.adjoints.nearest_frame import FrameProblem
from etflayers.adjoints.stationary import LinearSolve, ParametricObjective, StiefelProblem

__all__ = [
    "Adjoint",
    "Detached",
    "FrameProblem",
    "Implicit",
    "LinearSolve",
    "ParametricObjective",
    "Problem",
    "StiefelAdjoint",
    "StiefelProblem",
    "Unrolled",
    "as_adjoint",
]

StiefelAdjoint = Adjoint
"""The same for every problem; the name that it had while there were two kinds."""
