r"""The symmetric Sylvester equation P Y + Y P = S, differentiable to any order.

In the eigenbasis of P = V diag(sigma) V' the solution divides the entries of V'SV by sigma_i + sigma_j.
Differentiating the equation instead of the eigenbasis (whose derivative does not exist at repeated
sigma):

    dP Y + P dY + dY P + Y dP = dS,   hence   dY = L(dS - dP Y - Y dP),   L the solution map, self-adjoint,

so for a cotangent G of Y, with Z = L(G):   S gets Z,   P gets -(Z Y' + Y' Z).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["solve_sylvester"]


def _solve(rhs: Tensor, basis: Tensor, divisors: Tensor) -> Tensor:
    return basis @ ((basis.mT @ rhs @ basis) * divisors) @ basis.mT


class _Sylvester(torch.autograd.Function):
    # The spectrum (basis, divisors) is data of the solver, not a variable: P carries the derivative.

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, rhs: Tensor, basis: Tensor, divisors: Tensor) -> Tensor:
        return _solve(rhs, basis, divisors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        matrix, _, basis, divisors = inputs
        ctx.save_for_backward(matrix, basis, divisors, output)
        ctx.save_for_forward(matrix, basis, divisors, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, basis, divisors, solution = ctx.saved_tensors
        z = solve_sylvester(matrix, grad, basis, divisors)
        transposed = solution.mT
        return -(z @ transposed + transposed @ z), z, None, None

    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor | None, d_rhs: Tensor | None, *_: Tensor | None) -> Tensor:
        matrix, basis, divisors, solution = ctx.saved_tensors
        change = torch.zeros_like(solution) if d_rhs is None else d_rhs
        if d_matrix is not None:
            change = change - d_matrix @ solution - solution @ d_matrix
        return solve_sylvester(matrix, change, basis, divisors)


def solve_sylvester(matrix: Tensor, rhs: Tensor, basis: Tensor, divisors: Tensor) -> Tensor:
    """Y with P Y + Y P = S, given the spectrum of P.

    Args:
        matrix: P, ``(..., n, n)``, symmetric.
        rhs: S, ``(..., n, n)``.
        basis: V, eigenvectors of P in columns, ``(..., n, n)``; held constant.
        divisors: 1 / (sigma_i + sigma_j), zero where a pair is to be dropped, ``(..., n, n)``; held constant.

    Returns:
        ``(..., n, n)``.
    """
    solution: Tensor = _Sylvester.apply(matrix, rhs, basis, divisors)  # type: ignore[no-untyped-call]
    return solution
