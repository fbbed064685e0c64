"""How a minimizer is found. No gradient code lives here."""

from etflayers.solvers.by_regime import ByRegime
from etflayers.solvers.conjugate_gradients import conjugate_gradients
from etflayers.solvers.convex_hull import ConvexHull
from etflayers.solvers.curvature import extreme_curvatures
from etflayers.solvers.gram import GramEigh
from etflayers.solvers.gram_root import GramRoot
from etflayers.solvers.iterative import Iterative, as_frame_solver
from etflayers.solvers.newton import RiemannianNewton
from etflayers.solvers.newton_schulz import NewtonSchulz
from etflayers.solvers.polar import (
    FrameFactors,
    FrameOnlySolver,
    FrameSolver,
    RootFactors,
    factors_of,
    rank_cutoff,
)
from etflayers.solvers.riemannian import RiemannianDescent
from etflayers.solvers.stiefel import Objective, StiefelSolution, StiefelSolver
from etflayers.solvers.svd import QRSVD, SVD
from etflayers.solvers.trust_regions import TrustRegions

__all__ = [
    "QRSVD",
    "SVD",
    "ByRegime",
    "ConvexHull",
    "FrameFactors",
    "FrameOnlySolver",
    "FrameSolver",
    "GramEigh",
    "GramRoot",
    "Iterative",
    "NewtonSchulz",
    "Objective",
    "RiemannianDescent",
    "RiemannianNewton",
    "RootFactors",
    "StiefelSolution",
    "StiefelSolver",
    "TrustRegions",
    "as_frame_solver",
    "conjugate_gradients",
    "extreme_curvatures",
    "factors_of",
    "rank_cutoff",
]
