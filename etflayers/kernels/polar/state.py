r"""What is known of the maximizing frame once it has been found: all that a derivative asks.

For M (K x d), M_c = CM its centered rows and c = sqrt(K/(K-1)), the frame W that maximizes <W, M> has (see
``solvers.state``)

    W = c^2 T^+ M_c,        T = M_c W' = c (M_c M_c')^(1/2),

and every derivative of W applies T^+ and solves T X + X T = S. A state answers both, however it was found.

W <-> frame, T <-> root, c^2 T^+ <-> inverse, V <-> basis, I - T T^+ <-> absent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from etflayers.geometry import centered
from etflayers.kernels.dispatch import Impl
from etflayers.linalg import Eigenbasis, Root, Spectrum, pair_sums

if TYPE_CHECKING:
    from etflayers.kernels.polar.numpy import SmallPolar

__all__ = ["CUTOFF", "FrameState", "RootState", "SmallState", "SpectralState", "absent_directions"]

# Singular values below this, relative to the fourth root of the sum of their fourth powers, count as absent.
CUTOFF = 1e-6


class FrameState(Protocol):
    """A frame that maximizes <W, M>, and the answers to what its derivative asks."""

    @property
    def frame(self) -> Tensor:
        """W, ``(..., K, d)``."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """In which the answers are computed."""
        ...

    @property
    def spectrum(self) -> Spectrum:
        """What is known of T, for :func:`etflayers.linalg.solve_sylvester`, which can be differentiated."""
        ...

    def solve_sylvester(self, rhs: Tensor, *, skew: bool = False) -> Tensor:
        """X with T X + X T = S, zero between absent directions; ``skew``: S' = -S."""
        ...

    def pseudo_inverse(self, rows: Tensor) -> Tensor:
        """c^2 T^+ times rows ``(..., K, m)``, which need not be centered: T^+ 1 = 0."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the state holds, W first, as an autograd node has to save it."""
        ...

    @property
    def form(self) -> Callable[..., FrameState]:
        """What makes a state of this kind from its ``tensors()``."""
        ...


class RootState(NamedTuple):
    """A state that knows T itself, and solves by products.

    Attributes:
        frame: W, ``(..., K, d)``.
        inverse: c^2 T^+, ``(..., K, K)`` float64; along 1 it may hold anything.
        root: T, ``(..., K, K)`` float64, zero along absent directions; along 1 it may hold any positive
            number.
        precision: of the data.
        impl: which path its derivative takes, see :func:`~etflayers.kernels.describe`.
    """

    frame: Tensor
    inverse: Tensor
    root: Tensor
    precision: torch.dtype
    impl: Impl = "auto"

    @property
    def dtype(self) -> torch.dtype:
        """float64."""
        return self.root.dtype

    @property
    def spectrum(self) -> Root:
        """T, for a solution by products."""
        # The norm of T is its largest eigenvalue times K^(1/2) at most; half of the cutoff, because a value
        # near it may count as present.
        smallest = 0.5 * CUTOFF / self.root.shape[-1] ** 0.25
        return Root(self.root, absent_directions(self.inverse, self.root), smallest)

    def solve_sylvester(self, rhs: Tensor, *, skew: bool = False) -> Tensor:
        """X with T X + X T = S, zero between absent directions; ``skew``: S' = -S."""
        return self.spectrum.solve(rhs, skew=skew)

    def pseudo_inverse(self, rows: Tensor) -> Tensor:
        """c^2 T^+ times rows ``(..., K, m)``."""
        return self.inverse @ centered(rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """W, c^2 T^+ and T."""
        return self.frame, self.inverse, self.root

    @property
    def form(self) -> Callable[..., RootState]:
        """What makes a state of this kind from its ``tensors()``."""
        return partial(RootState, precision=self.precision, impl=self.impl)


class SpectralState(NamedTuple):
    """A state that knows the eigenbasis of T, and solves by divisions.

    Attributes:
        frame: W, ``(..., K, d)``.
        inverse: c^2 T^+, ``(..., K, K)``; it maps 1 to zero.
        spectrum: orthonormal eigenvectors V of T, ``(..., K, r)``, r = K - 1, or r = K with 1 among them;
            and 1 / (tau_i + tau_j), zero for pairs of absent directions.
    """

    frame: Tensor
    inverse: Tensor
    spectrum: Eigenbasis

    @property
    def dtype(self) -> torch.dtype:
        """In which the solver computed."""
        return self.inverse.dtype

    def solve_sylvester(self, rhs: Tensor, *, skew: bool = False) -> Tensor:
        """X with T X + X T = S, zero between absent directions."""
        return self.spectrum.solve(rhs)

    def pseudo_inverse(self, rows: Tensor) -> Tensor:
        """c^2 T^+ times rows ``(..., K, m)``."""
        return self.inverse @ rows

    def tensors(self) -> tuple[Tensor, ...]:
        """W, c^2 T^+, V and the reciprocals."""
        return self.frame, self.inverse, *self.spectrum

    @property
    def form(self) -> Callable[..., SpectralState]:
        """What makes a state of this kind from its ``tensors()``."""
        return _from_tensors


class SmallState(NamedTuple):
    """A state in NumPy's arrays: to make tensors of them, and to save these, takes as long as to find them.

    Attributes:
        frame: W, ``(K, d)``.
        solved: W, c^2 T^+ and the eigenbasis of T.
    """

    frame: Tensor
    solved: SmallPolar

    @property
    def dtype(self) -> torch.dtype:
        """float64."""
        return torch.float64

    @property
    def spectrum(self) -> Eigenbasis:
        """The eigenbasis, in tensors."""
        return Eigenbasis(
            torch.from_numpy(self.solved.basis), pair_sums(torch.from_numpy(self.solved.values)).reciprocal()
        )

    def solve_sylvester(self, rhs: Tensor, *, skew: bool = False) -> Tensor:
        """X with T X + X T = S."""
        return self.spectrum.solve(rhs)

    def pseudo_inverse(self, rows: Tensor) -> Tensor:
        """c^2 T^+ times rows ``(..., K, m)``."""
        return torch.from_numpy(self.solved.inverse) @ rows

    def tensors(self) -> tuple[Tensor, ...]:
        """W alone; the arrays are constants, which go with the form."""
        return (self.frame,)

    @property
    def form(self) -> Callable[..., SmallState]:
        """What makes a state of W and these arrays again."""
        return partial(SmallState, solved=self.solved)


def _from_tensors(frame: Tensor, inverse: Tensor, basis: Tensor, reciprocals: Tensor) -> SpectralState:
    return SpectralState(frame, inverse, Eigenbasis(basis, reciprocals))


def absent_directions(inverse: Tensor, root: Tensor) -> Tensor:
    """I - T T^+, the projector on the directions of the classes that the data do not determine."""
    num_classes = root.shape[-1]
    identity = torch.eye(num_classes, dtype=root.dtype, device=root.device)
    return identity - (1 - 1 / num_classes) * (inverse @ root)
