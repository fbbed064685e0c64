r"""How well M images can serve a linear model of unknown start: a bound, and a set that nearly meets it.

``X <-> inputs, y <-> targets, s <-> deviation, C <-> covariance, theta* <-> best``

**The model.** ``<theta, x>`` on N real points in R^D, with the loss ``|X theta - y|^2 / 2N``. Its excess over
the best theta* is ``(theta - theta*)' C (theta - theta*) / 2``, with ``C = X'X / N``. Training starts at
``theta_0 ~ N(0, s^2 I)`` and sees M distilled points X~ with targets y~.

**One step, without a loss** (Wang, Zhu, Torralba, Efros 2018, arXiv 1811.10959). A step of rate eta gives

    theta_1 = (I - S) theta_0 + eta/M X~'y~,      S = eta/M X~'X~.

It is theta* for every theta_0 if and only if S = I, which has rank D, and the offset is theta*. It takes D
images, and D are enough: X~ a multiple of an orthogonal matrix, y~ = X~ theta*. A start that is known needs
one image, along theta* - theta_0.

**Fewer than D.** Every gradient of a loss of the predictions <theta, x~> is a combination of the distilled
points: whatever the number of steps, their rates and their momentum, theta_T - theta_0 lies in their span V,
dim V <= M. (Weight decay would leave it along theta_0, and Adam, elementwise, in any direction.) With
r = theta* - theta_0 and the best combination of all, the excess is at least

    min over v in V of |C^{1/2} (r - v)|^2 / 2 = |(I - P) C^{1/2} r|^2 / 2,

P the projector onto C^{1/2} V. Over the starts, E r r' = s^2 I + theta* theta*', so

    E excess >= tr((I - P) G) / 2,      G = C^{1/2} (s^2 I + theta* theta*') C^{1/2},

and as P has rank M at most, this is at least half the sum of the D - M smallest eigenvalues of G: the
*bound*. It is zero from M = D on, and below that a matter of the number of images, not of that of steps.

**A set that nearly meets it.** With V spanned by the first M eigenvectors u_i of C (eigenvalues l_i,
descending), S = P_V and the offset P_V theta*, one step leaves ``-(I - P_V) r``, whose expected excess is

    1/2 sum over i > M of l_i (s^2 + <u_i, theta*>^2):      what *principal images* reach.

Both equal ``s^2/2 sum l_i`` up to theta*, which is small against s sqrt(D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etflayers.checks import require

__all__ = ["LinearTask"]


@dataclass(frozen=True)
class LinearTask:
    r"""The excess ``(theta - theta*)' C (theta - theta*) / 2`` of a linear model, and what M images can do.

    Args:
        inputs: X, ``(N, D)``, real points, float64.
        targets: y, ``(N,)``.
        deviation: s, of each entry of the random start.

    Raises:
        InvalidArgumentError: shapes that do not fit.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959, for one step and no loss.

    >>> task = LinearTask(
    ...     torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), deviation=1.0
    ... )
    >>> [round(task.bound(count), 3) for count in range(4)]
    [0.5, 0.333, 0.167, 0.0]
    """

    inputs: Tensor
    targets: Tensor
    deviation: float

    def __post_init__(self) -> None:
        require(
            self.inputs.ndim == 2 and self.targets.shape == self.inputs.shape[:1],
            f"inputs must have shape (N, D) and targets (N,), got {tuple(self.inputs.shape)} and "
            f"{tuple(self.targets.shape)}",
        )

    @property
    def dim(self) -> int:
        """D."""
        return self.inputs.shape[1]

    @property
    def covariance(self) -> Tensor:
        """C, ``(D, D)``."""
        return self.inputs.mT @ self.inputs / len(self.inputs)

    @property
    def best(self) -> Tensor:
        """theta*, of least norm where it is not unique."""
        best: Tensor = torch.linalg.pinv(self.inputs) @ self.targets
        return best

    @property
    def untrained(self) -> float:
        """The expected excess of theta_0."""
        return self.expected_excess(torch.eye(self.dim, dtype=torch.float64), torch.zeros_like(self.best))

    def excess(self, theta: Tensor) -> Tensor:
        """Excess of each row of ``theta``, ``(n, D)``."""
        error = theta - self.best
        return 0.5 * ((error @ self.covariance) * error).sum(-1)

    def expected_excess(self, matrix: Tensor, offset: Tensor) -> float:
        """Over the starts, after training that takes theta_0 to ``matrix theta_0 + offset``."""
        spread = 0.5 * self.deviation**2 * (matrix.mT @ self.covariance @ matrix).trace()
        return float(spread + self.excess(offset))

    def bound(self, count: int) -> float:
        """No training on ``count`` images has a smaller expected excess."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
        second_moment = self.deviation**2 * torch.eye(self.dim, dtype=root.dtype)
        second_moment = second_moment + torch.outer(self.best, self.best)
        left = torch.linalg.eigvalsh(root @ second_moment @ root)[: max(self.dim - count, 0)]
        return 0.5 * float(left.clamp(min=0).sum())

    def principal(self, count: int) -> float:
        """The expected excess after one step on the first ``count`` principal images."""
        values, vectors = torch.linalg.eigh(self.covariance)
        left = values * (self.deviation**2 + (vectors.mT @ self.best).square())
        return 0.5 * float(left[: max(self.dim - count, 0)].sum())
