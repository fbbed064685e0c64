import torch
from scipy import linalg
from torch.autograd import gradcheck, gradgradcheck

from etflayers.adjoints.sylvester import Eigenbasis, solve_sylvester


def problem(n=4):
    root = torch.randn(n, n, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(n, dtype=torch.float64)
    values, basis = torch.linalg.eigh(matrix)
    return matrix, torch.randn(n, n, dtype=torch.float64), basis, 1 / (values[:, None] + values)


def test_solution_agrees_with_scipy():
    matrix, rhs, basis, divisors = problem()
    expected = linalg.solve_sylvester(matrix.numpy(), matrix.numpy(), rhs.numpy())
    torch.testing.assert_close(
        solve_sylvester(matrix, rhs, Eigenbasis(basis, divisors)), torch.from_numpy(expected)
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
