r"""The symmetric Sylvester equation T X + X T = S for T = T' >= 0.

**With an eigenbasis** T = V diag(tau) V' the solution divides the entries of V'SV by tau_i + tau_j.

**By products** (Roberts 1980), without one: the steps of ``linalg.newton_schulz`` take

    sign [[T, S], [0, -T]] = [[I, 2X], [0, -I]].

A step keeps the form of the block matrix: with A = T^2 and D = TS - ST,

    T <- T q(A),    S <- T (b D + c (AD + DA)) + S q(A),        q(t) = a + b t + c t^2,

where ST = -(TS)' and DA = (AD)' are free if S is skew, which leaves seven products. Three products of the
whole block matrix are 3.4 times as many operations, and faster for small ones, which only wait for launches.
Zero eigenvalues of T: an entry of S between two of them grows without bound and has to be removed; one
between a zero and a positive one converges to half of what it should be.

**Its derivative.** Differentiating the equation instead of the eigenbasis (whose derivative does not exist at
repeated tau):

    dT X + T dX + dX T + X dT = dS,   hence   dX = L(dS - dT X - X dT),   L the solution map, self-adjoint,

so for a cotangent G of X, with Z = L(G):   S gets Z,   T gets -(Z X' + X' Z).

T <-> matrix or root, S <-> rhs, X <-> solution, V <-> basis, 1 / (tau_i + tau_j) <-> reciprocals,
I - T T^+ <-> absent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from etflayers.linalg.newton_schulz import LAST_STEPS, add_product, schedule

__all__ = ["Eigenbasis", "Root", "Spectrum", "solve_sylvester", "sylvester_by_products"]

# Up to this size a product takes about as long as its launch.
_LAUNCHES_COUNT = 128


class Eigenbasis(NamedTuple):
    """T by its eigenvectors.

    Attributes:
        basis: V, eigenvectors in columns, ``(..., n, r)``.
        reciprocals: 1 / (tau_i + tau_j), ``(..., r, r)``, zero for a pair to drop.
    """

    basis: Tensor
    reciprocals: Tensor

    def solve(self, rhs: Tensor, *, skew: bool = False) -> Tensor:
        """X for a right-hand side S."""
        turned = self.basis.mT @ rhs @ self.basis
        return self.basis @ (turned * self.reciprocals) @ self.basis.mT


class Root(NamedTuple):
    """T itself, for a solution by products.

    Attributes:
        root: T, ``(..., n, n)``.
        absent: I - T T^+, the projector on its null space, between whose vectors X is zero.
        smallest: smallest eigenvalue of T that is not zero, relative to its Frobenius norm.
    """

    root: Tensor
    absent: Tensor
    smallest: float

    def solve(self, rhs: Tensor, *, skew: bool = False) -> Tensor:
        """X for a right-hand side S, ``skew`` where S' = -S."""
        # The iteration halves an entry between an absent direction and a present one, which has to be whole.
        left = self.absent @ rhs
        right = -left.mT if skew else rhs @ self.absent
        rhs = rhs + left + right - 3 * (left @ self.absent)
        floor = torch.finfo(self.root.dtype).tiny
        size = torch.linalg.matrix_norm(self.root, keepdim=True).clamp_min(floor)
        solution = sylvester_by_products(self.root / size, rhs / size, self.smallest, skew=skew)
        # What rounding left between absent directions has grown by up to 1 / smallest.
        return solution - self.absent @ solution @ self.absent


Spectrum = Eigenbasis | Root
"""What a solver knows of T."""


def sylvester_by_products(root: Tensor, rhs: Tensor, smallest: float, *, skew: bool = False) -> Tensor:
    """X with T X + X T = S, by a fixed number of products.

    Args:
        root: T, ``(..., n, n)``, symmetric, eigenvalues in [0, 1].
        rhs: S, ``(..., n, n)``, zero between eigenvectors of T of eigenvalue zero.
        smallest: the smallest eigenvalue of T that is not zero.
        skew: whether S' = -S, which saves two of nine products of large matrices.

    Returns:
        ``(..., n, n)``.

    Reference:
        Roberts (1980), Linear model reduction and solution of the algebraic Riccati equation by use of the
        sign function.
    """
    steps = (*schedule(smallest), *LAST_STEPS)
    num_rows = root.shape[-1]
    if num_rows <= _LAUNCHES_COUNT:
        zero = torch.zeros_like(root)
        block = torch.cat((torch.cat((root, rhs), -1), torch.cat((zero, -root), -1)), -2)
        for a, b, c in steps:
            square = block @ block
            rest = add_product(square, square, square, beta=b, alpha=c)
            block = add_product(block, block, rest, beta=a)
        return block[..., :num_rows, num_rows:] / 2
    for a, b, c in steps:
        square = root @ root
        rest = add_product(square, square, square, beta=b, alpha=c)
        left = root @ rhs
        if skew:
            change = left + left.mT
            change = add_product(change, square, change, beta=b / 2, alpha=c)
            change = change + change.mT
        else:
            change = add_product(left, rhs, root, alpha=-1.0)
            change = add_product(b * change, square, change, alpha=c) + c * (change @ square)
        rhs = add_product(add_product(rhs, rhs, rest, beta=a), root, change)
        root = add_product(root, root, rest, beta=a)
    return rhs / 2


class _Sylvester(torch.autograd.Function):
    # The spectrum is a constant, not a variable: T carries the derivative.

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Tensor, rhs: Tensor, kind: type[Eigenbasis] | type[Root], *spectrum: Tensor | float
    ) -> Tensor:
        return kind(*spectrum).solve(rhs)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        matrix, _, ctx.kind, first, second, *ctx.numbers = inputs
        ctx.save_for_backward(matrix, output, first, second)
        ctx.save_for_forward(matrix, output, first, second)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, solution, *spectrum = ctx.saved_tensors
        z = solve_sylvester(matrix, grad, ctx.kind(*spectrum, *ctx.numbers))
        transposed = solution.mT
        d_matrix = -(z @ transposed + transposed @ z)
        return d_matrix, z, None, None, None, *(None for _ in ctx.numbers)

    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor | None, d_rhs: Tensor | None, *_: Tensor | None) -> Tensor:
        matrix, solution, *spectrum = ctx.saved_tensors
        change = torch.zeros_like(solution) if d_rhs is None else d_rhs
        if d_matrix is not None:
            change = change - d_matrix @ solution - solution @ d_matrix
        return solve_sylvester(matrix, change, ctx.kind(*spectrum, *ctx.numbers))


def solve_sylvester(matrix: Tensor, rhs: Tensor, spectrum: Spectrum) -> Tensor:
    """X with T X + X T = S, differentiable in T and S to any order and in both modes.

    Args:
        matrix: T, ``(..., n, n)``, symmetric.
        rhs: S, ``(..., n, n)``.
        spectrum: of T; held constant.

    Returns:
        ``(..., n, n)``.

    >>> from etflayers.linalg import pair_sums
    >>> matrix = torch.diag(torch.tensor([1.0, 3.0]))
    >>> solve_sylvester(matrix, torch.ones(2, 2), Eigenbasis(torch.eye(2), 1 / pair_sums(matrix.diagonal())))
    tensor([[0.5000, 0.2500],
            [0.2500, 0.1667]])
    """
    solution: Tensor = _Sylvester.apply(matrix, rhs, type(spectrum), *spectrum)  # type: ignore[no-untyped-call]
    return solution
