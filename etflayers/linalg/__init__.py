"""Small dense algebra for batches of matrices, which knows neither frames nor manifolds."""

from etflayers.linalg.conjugate_gradients import ConjugateGradients, LinearSolution, conjugate_gradients
from etflayers.linalg.lanczos import extreme_eigenvalues
from etflayers.linalg.matrices import inner, norm, pair_sums, spectral, spectral_bounds, trace
from etflayers.linalg.sylvester import Eigenbasis, Root, Spectrum, solve_sylvester

__all__ = [
    "ConjugateGradients",
    "Eigenbasis",
    "LinearSolution",
    "Root",
    "Spectrum",
    "conjugate_gradients",
    "extreme_eigenvalues",
    "inner",
    "norm",
    "pair_sums",
    "solve_sylvester",
    "spectral",
    "spectral_bounds",
    "trace",
]
