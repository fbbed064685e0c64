import pytest
import torch
from scipy import linalg
from torch.autograd import gradcheck, gradgradcheck

from etflayers.linalg import Eigenbasis, Root, solve_sylvester
from etflayers.linalg.sylvester import sylvester_by_products


def problem(n=4):
    root = torch.randn(n, n, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(n, dtype=torch.float64)
    values, basis = torch.linalg.eigh(matrix)
    return matrix, torch.randn(n, n, dtype=torch.float64), basis, 1 / (values[:, None] + values)


def test_solution_agrees_with_scipy():
    matrix, rhs, basis, reciprocals = problem()
    expected = linalg.solve_sylvester(matrix.numpy(), matrix.numpy(), rhs.numpy())
    torch.testing.assert_close(
        solve_sylvester(matrix, rhs, Eigenbasis(basis, reciprocals)), torch.from_numpy(expected)
    )


def test_derivatives_of_the_equation_not_of_the_eigenbasis():
    # The spectrum of the perturbed P is taken anew: finite differences see the true solution map.
    matrix, rhs, _, _ = problem()

    def solve(upper, right):
        symmetric = (upper + upper.T) / 2
        values, basis = torch.linalg.eigh(symmetric.detach())
        return solve_sylvester(symmetric, right, Eigenbasis(basis, 1 / (values[:, None] + values)))

    arguments = (matrix.requires_grad_(), rhs.requires_grad_())
    assert gradcheck(solve, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(solve, arguments)


def test_by_products_and_by_an_eigenbasis_are_differentiated_alike():
    matrix, rhs, basis, reciprocals = problem()
    root = Root(matrix, torch.zeros_like(matrix), 1e-3)
    cotangent, direction = torch.randn(2, 4, 4, dtype=torch.float64)

    def both(spectrum):
        def solve(upper, right):
            return solve_sylvester((upper + upper.T) / 2, right, spectrum)

        value, pullback = torch.func.vjp(solve, matrix, rhs)
        return value, *pullback(cotangent), torch.func.jvp(solve, (matrix, rhs), (direction, direction))[1]

    for mine, theirs in zip(both(root), both(Eigenbasis(basis, reciprocals)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("size", [6, 150])  # by the block matrix, and by its parts
@pytest.mark.parametrize("skew", [True, False])
def test_sylvester_equation(size, skew):
    values = torch.linspace(1e-3, 1, size, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    root = basis @ torch.diag(values) @ basis.T
    solution = torch.randn(3, size, size, dtype=torch.float64)
    solution = solution - solution.mT if skew else solution
    found = sylvester_by_products(
        root.expand(3, size, size), root @ solution + solution @ root, 1e-3, skew=skew
    )
    torch.testing.assert_close(found, solution, rtol=0, atol=1e-10)
    alone = sylvester_by_products(root, root @ solution[0] + solution[0] @ root, 1e-3, skew=skew)
    torch.testing.assert_close(alone, solution[0], rtol=0, atol=1e-10)
