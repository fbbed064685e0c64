r"""The polar factor from matrix products alone.

**The iteration.** For the Gram matrix G of the centered rows, scaled into (0, 1], Y = G and Z = I, repeat

    T = Z Y,    Y <- Y q(T),    Z <- q(T) Z,    q(T) = a (3 I - a^2 T) / 2.

All three are polynomials in G: Y -> G^(1/2), Z -> G^(-1/2), T -> I, and c Z M_c is the frame. The factor Y
carries the rounding errors of Z with it, which keeps the iteration stable (Higham 2008, section 6.7).

**Minimax coefficients.** A step maps a singular value x of the scaled rows to p(ax), p(x) = x (3 - x^2) / 2.
On [l, 1] the cubic nearest to 1 has p(al) = p(a), so a^2 = 3 / (1 + l + l^2); it maps [l, 1] onto [p(al), 1].
A true x below l still grows: a wrong l costs steps and nothing else. Far from 1 a step wins a factor
1.5 sqrt(3) = 2.6, where plain Newton-Schulz (a = 1) wins 1.5. (Chen and Chow 2014; Amsel et al. 2025,
arXiv 2505.16932, show that such steps compose to the best polynomial of their form.)

**Bounds.** An upper bound that is too small makes the iteration diverge, so it must be safe: those of
``linalg.spectral_bounds`` are, and they are sharp at neural collapse. The null direction of G is filled with
the mean of its other eigenvalues.

G <-> gram, Y <-> root, Z <-> inverse, T <-> product, a <-> scale, l <-> low, M_c <-> rows, c <-> etf_radius.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.checks import reads_values, require, require_values
from etflayers.errors import ConvergenceError
from etflayers.geometry import centered_rows, etf_radius
from etflayers.linalg import spectral_bounds, trace
from etflayers.solvers.frame_solver import FrameOnlySolver

__all__ = ["NewtonSchulz"]


@dataclass(frozen=True)
class NewtonSchulz(FrameOnlySolver):
    """Newton-Schulz iteration on the K x K Gram matrix, for M whose centered rows have full rank K - 1.

    The frame takes matrix products only, and so does its gradient with ``adjoint=Unrolled()``, which here is
    accurate at neural collapse too: nothing is divided. ``Implicit()`` adds one symmetric eigenproblem. On a
    CPU it is never the fastest (:class:`~etflayers.solvers.GramEigh` is one to three times faster); it is for
    devices on which an eigenproblem takes much longer than products do.

    Args:
        tolerance: largest relative error of the frame, estimated from the last step and from the rounding of
            the Gram matrix.
        dtype: precision to compute in; ``None``: float64.
        condition: the condition number of EM to be expected; a wrong guess costs steps, not accuracy.
        max_steps: where values can be read for free the iteration stops when it has converged; elsewhere (on
            an accelerator, under ``torch.compile``, inside ``torch.func`` transforms) it takes all of these
            steps.

    Raises:
        InvalidArgumentError: ``condition`` or ``max_steps`` below 1.
        ConvergenceError: not accurate after ``max_steps`` or not in this precision. Inside ``torch.func``
            transforms, where nothing can be raised, the frame is NaN instead.

    Reference:
        Chen, Chow (2014), A stable scaling of Newton-Schulz for improving the sign function computation of a
        Hermitian matrix.

    >>> NewtonSchulz().frame(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[ 0.6000,  0.8000],
            [-0.6000, -0.8000]], dtype=torch.float64)
    """

    dtype: torch.dtype | None = None
    condition: float = 10.0
    max_steps: int = 24

    def __post_init__(self) -> None:
        require(self.condition >= 1, f"condition must be at least 1, got {self.condition}")
        require(self.max_steps >= 1, f"max_steps must be at least 1, got {self.max_steps}")

    def frame(self, linear: Tensor) -> Tensor:
        """The frames for ``linear`` (``(..., K, d)``), in ``self.dtype``."""
        num_classes = linear.shape[-2]
        rows, _ = centered_rows(linear, self.dtype or torch.float64)
        gram = rows @ rows.mT
        with torch.no_grad():
            mean = trace(gram) / (num_classes - 1)
        filled = gram / mean + 1 / num_classes
        with torch.no_grad():
            lowest, highest = spectral_bounds(filled)
        root = self._inverse_root(filled / highest, lowest / highest)
        frame: Tensor = etf_radius(num_classes) * (root / (highest * mean).sqrt()) @ rows
        return frame

    def _inverse_root(self, gram: Tensor, lowest: Tensor) -> Tensor:
        """G^(-1/2) for eigenvalues in (0, 1], most of them above ``lowest`` (..., 1, 1)."""
        num_classes, eps = gram.shape[-1], torch.finfo(gram.dtype).eps
        identity = torch.eye(num_classes, dtype=gram.dtype, device=gram.device)
        reads = reads_values(gram) and gram.numel() > 0
        low = 1 / self.condition
        if reads:
            low = max(low, float(lowest.amin()) ** 0.5)
        # The step after a residual r leaves 3/4 r^2: below this, rounding.
        nearly = (eps * num_classes) ** 0.5
        product, root, inverse = gram, gram, identity
        for _ in range(self.max_steps):
            scale, low = _minimax(low)
            step = (1.5 * scale) * identity - (0.5 * scale**3) * product
            root, inverse = root @ step, step @ inverse
            product = inverse @ root
            residual = torch.linalg.matrix_norm(product.detach() - identity)
            if reads and float(residual.amax()) < nearly:
                break
        inverse = (1.5 * identity - 0.5 * product) @ inverse
        return self._checked(inverse, residual)

    def _checked(self, inverse: Tensor, residual: Tensor) -> Tensor:
        # Rounding of the Gram matrix moves an eigenvalue lambda by about eps, hence 1 / sqrt(lambda) by about
        # eps / lambda of itself. The mean over the spectrum is what moves the frame.
        mean = inverse.detach().square().sum((-2, -1)) / inverse.shape[-1]
        accurate = residual.square() + torch.finfo(inverse.dtype).eps * mean <= self.tolerance
        require_values(
            accurate.all(),
            f"solver=NewtonSchulz() did not reach its tolerance={self.tolerance:g}: the class means are "
            "ill-conditioned or of deficient rank (some coincide, or a class is unseen); raise max_steps, "
            "use dtype=torch.float64, use solver=SVD() or the default, or give anchor= and proximity= > 0",
            ConvergenceError,
        )
        return torch.where(accurate[..., None, None], inverse, torch.nan)


def _minimax(low: float) -> tuple[float, float]:
    """The a that maps [low, 1] to the interval nearest to 1, and the lower end of that interval."""
    scale = (3 / (1 + low + low**2)) ** 0.5
    return scale, scale * low * (3 - (scale * low) ** 2) / 2
