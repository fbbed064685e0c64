import pytest
import torch

from etflayers.geometry import random_stiefel
from etflayers.linalg import ConjugateGradients, conjugate_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def spectrum(dim):
    """A symmetric matrix with the eigenvalues 1, 2, ..., d."""
    basis = random_stiefel(dim, dim, dtype=torch.float64)
    return (basis * torch.arange(1.0, dim + 1, dtype=torch.float64)) @ basis.mT


def test_conjugate_gradients_against_a_dense_solve():
    matrix = spectrum(6)
    rhs = torch.randn(3, 6, 1, dtype=torch.float64)
    found = conjugate_gradients(
        lambda v: matrix @ v, rhs, stop=torch.full((3,), 1e-12, dtype=torch.float64), max_iterations=50
    )
    torch.testing.assert_close(found.solution, torch.linalg.solve(matrix, rhs), atol=1e-11, rtol=0)
    assert bool((found.curvature > 0).all())


def test_conjugate_gradients_in_a_ball_stop_at_its_boundary():
    matrix, rhs = spectrum(6), torch.randn(2, 6, 1, dtype=torch.float64)
    radius = torch.tensor([0.01, 0.02], dtype=torch.float64)
    stop = torch.zeros(2, dtype=torch.float64)
    for sign in (1, -1):  # by length and by negative curvature
        found = conjugate_gradients(
            lambda v, sign=sign: sign * matrix @ v, rhs, stop=stop, max_iterations=50, radius=radius
        )
        torch.testing.assert_close(found.solution.norm(dim=(-2, -1)), radius)


def test_its_options_stop_it():
    matrix, rhs = spectrum(6), torch.randn(3, 6, 1, dtype=torch.float64)
    size = torch.linalg.vector_norm(rhs, dim=(-2, -1))
    rough = ConjugateGradients(tolerance=0.1).solve(lambda v: matrix @ v, rhs)
    assert bool((rough.residual <= 0.1 * size).all())
    assert float(rough.residual.max()) > 1e-6
    assert ConjugateGradients(max_iterations=2).solve(lambda v: matrix @ v, rhs).iterations == 2
    default = ConjugateGradients().solve(lambda v: matrix @ v, rhs)
    torch.testing.assert_close(default.solution, torch.linalg.solve(matrix, rhs), atol=1e-10, rtol=0)
