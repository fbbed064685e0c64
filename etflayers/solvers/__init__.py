"""How a minimizer is found. No gradient code lives here."""

from etflayers.kernels.polar import FrameState, RootState
from etflayers.linalg import ConjugateGradients, conjugate_gradients
from etflayers.solvers.by_regime import ByRegime
from etflayers.solvers.convex_hull import ConvexHull
from etflayers.solvers.curvature import extreme_curvatures
from etflayers.solvers.frame_solver import FrameOnlySolver, FrameSolver
from etflayers.solvers.gram import GramEigh
from etflayers.solvers.gram_root import GramRoot
from etflayers.solvers.iterative import Iterative, as_frame_solver, as_stiefel_solver
from etflayers.solvers.newton import RiemannianNewton
from etflayers.solvers.newton_schulz import NewtonSchulz
from etflayers.solvers.riemannian import RiemannianDescent
from etflayers.solvers.state import FoundState, SpectralState, rank_cutoff, spectral_state, state_of
from etflayers.solvers.stiefel import Objective, StiefelSolution, StiefelSolver, assess, local_model
from etflayers.solvers.svd import QRSVD, SVD
from etflayers.solvers.trust_regions import TrustRegions

__all__ = [
    "QRSVD",
    "SVD",
    "ByRegime",
    "ConjugateGradients",
    "ConvexHull",
    "FoundState",
    "FrameOnlySolver",
    "FrameSolver",
    "FrameState",
    "GramEigh",
    "GramRoot",
    "Iterative",
    "NewtonSchulz",
    "Objective",
    "RiemannianDescent",
    "RiemannianNewton",
    "RootState",
    "SpectralState",
    "StiefelSolution",
    "StiefelSolver",
    "TrustRegions",
    "as_frame_solver",
    "as_stiefel_solver",
    "assess",
    "conjugate_gradients",
    "extreme_curvatures",
    "local_model",
    "rank_cutoff",
    "spectral_state",
    "state_of",
]
