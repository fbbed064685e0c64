r"""The symmetric Sylvester equation P Y + Y P = S, differentiable to any order.

In the eigenbasis of P = V diag(sigma) V' the solution divides the entries of V'SV by sigma_i + sigma_j.
Differentiating the equation instead of the eigenbasis (whose derivative does not exist at repeated
sigma):

    dP Y + P dY + dY P + Y dP = dS,   hence   dY = L(dS - dP Y - Y dP),   L the solution map, self-adjoint,

so for a cotangent G of Y, with Z = L(G):   S gets Z,   P gets -(Z Y' + Y' Z).

L itself is a division in the eigenbasis, or products with P: the caller says by what it passes for the
spectrum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from etflayers.kernels.polar import solve_with_root

__all__ = ["Eigenbasis", "Root", "Spectrum", "solve_sylvester"]


class Eigenbasis(NamedTuple):
    """V, eigenvectors of P in columns, and 1 / (sigma_i + sigma_j), zero for a pair to drop."""

    basis: Tensor
    divisors: Tensor

    def solve(self, rhs: Tensor) -> Tensor:
        """L(S)."""
        return self.basis @ ((self.basis.mT @ rhs @ self.basis) * self.divisors) @ self.basis.mT


class Root(NamedTuple):
    """P itself, ``(..., n, n)``, and the projector on its null space, between whose vectors L(S) is zero."""

    root: Tensor
    absent: Tensor

    def solve(self, rhs: Tensor) -> Tensor:
        """L(S)."""
        return solve_with_root(self.root, rhs, self.absent)


Spectrum = Eigenbasis | Root


class _Sylvester(torch.autograd.Function):
    # The spectrum is data of the solver, not a variable: P carries the derivative.

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Tensor, rhs: Tensor, first: Tensor, second: Tensor, kind: type[Eigenbasis] | type[Root]
    ) -> Tensor:
        return kind(first, second).solve(rhs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        matrix, _, first, second, ctx.kind = inputs
        ctx.save_for_backward(matrix, first, second, output)
        ctx.save_for_forward(matrix, first, second, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, first, second, solution = ctx.saved_tensors
        z = solve_sylvester(matrix, grad, ctx.kind(first, second))
        transposed = solution.mT
        return -(z @ transposed + transposed @ z), z, None, None, None

    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor | None, d_rhs: Tensor | None, *_: Tensor | None) -> Tensor:
        matrix, first, second, solution = ctx.saved_tensors
        change = torch.zeros_like(solution) if d_rhs is None else d_rhs
        if d_matrix is not None:
            change = change - d_matrix @ solution - solution @ d_matrix
        return solve_sylvester(matrix, change, ctx.kind(first, second))


def solve_sylvester(matrix: Tensor, rhs: Tensor, spectrum: Spectrum) -> Tensor:
    """Y with P Y + Y P = S, given the spectrum of P.

    Args:
        matrix: P, ``(..., n, n)``, symmetric.
        rhs: S, ``(..., n, n)``.
        spectrum: of P; held constant.

    Returns:
        ``(..., n, n)``.
    """
    solution: Tensor = _Sylvester.apply(matrix, rhs, *spectrum, type(spectrum))  # type: ignore[no-untyped-call]
    return solution
