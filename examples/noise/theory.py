r"""The memorization-dilation model of two classes, solved: how much is memorized, and how far classes spread.

Symbols: z <-> gap, R <-> dilation, M <-> memorization, C/D <-> slope, eta <-> eta, lambda <-> decay,
alpha <-> alpha, s <-> the sigmoid; ``a = |h_k|``, ``b = |w_k|``, ``D = |h_1 - h_2|``.

After Nguyen, Levie, Lienen, Kutyniok, Hüllermeier (2023, arXiv 2206.05530), from knowledge of the paper and
not with its text at hand. Features are free and not negative. To each sample with a right label come eta with
a wrong one.

**Without noise** features and weights minimize the mean of ``l(W h) + lambda_H |h|^2`` plus
``lambda_W |W|^2``. The minimum has ``h_1`` and ``h_2`` orthogonal, of one length a, and ``w_1 = -w_2`` of
length b along ``h_1 - h_2``. All depends on the gap of the logits ``z = (w_1 - w_2)' h_1 = sqrt(2) a b``. The
regularizer ``lambda_H a^2 + 2 lambda_W b^2`` is at least ``2 sqrt(lambda) z``, where lambda is
``lambda_H lambda_W``, and equal where ``lambda_H a^2 = sqrt(lambda) z``. So ``l'(z) + 2 sqrt(lambda) = 0``:

    cross-entropy, smoothing:  s(z) = 1 - alpha/2 - 2 sqrt(lambda)
    relaxation:                s(z) = 1 - alpha - 2 sqrt(lambda).

**With noise** this configuration stays. Features of class k become ``h_k + v`` with a random v of mean 0 and
standard deviation r, and those of class 1 with the label 2 become ``u_2 + v``, likewise with 1 and 2 swapped.
A network of limited expressivity cannot move u_2 away from h_1 for free: **memorization needs dilation**. So
minimize over ``u_1, u_2 >= 0`` and ``r >= 0``

    sum_k E [l_k(W (h_k + v)) + lambda_H |h_k + v|^2] + eta sum_k E [l_k(W (u_k + v)) + lambda_H |u_k + v|^2]

    subject to  eta |h_1 - u_2| <= C r / D  and  eta |h_2 - u_1| <= C r / D.

By symmetry one u is enough. In units of a the problem has the numbers eta, lambda, alpha and ``C/D`` alone.
It is convex in (u, r) together: the expectation of a convex function of something linear, in a cone.

**What is chosen here**: v is Gaussian with the covariance ``r^2/2 I`` in the plane of ``h_1, h_2``. Lengths
in the constraint are in units of D, so that one slope serves features of any scale:
``M = eta |h_1 - u_2| / D`` is at most ``slope R``, with ``R = r / D``. The slope is a property of network and
data, which the model does not know; neither does it know lambda, because a weight decay of all layers is not
one of features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import minimize
from scipy.special import logit, xlogy

from etflayers.checks import require

Array = np.ndarray
Loss = Literal["ce", "smoothing", "relaxation"]
NODES, WEIGHTS = hermegauss(60)  # of the expectation over a normal number
WEIGHTS = WEIGHTS / WEIGHTS.sum()
SLACK = 1e-12  # relative, of the optimizer


class Equilibrium(NamedTuple):
    """The minimum, lengths in units of the distance D of the classes.

    Attributes:
        memorization: M, the distance of a wrongly labeled sample from its class, times eta.
        dilation: R, the standard deviation of the features of a class.
        point: ``u_2`` in units of a: (1, 0), which is h_1, where nothing is memorized, and h_2 is (0, 1).
        value: what was minimized, half of it by symmetry.
    """

    memorization: float
    dilation: float
    point: tuple[float, float]
    value: float


def loss_of(kind: Loss, alpha: float) -> Callable[[Array], Array]:
    """The loss of a sample as a function of the logit of its label less that of the other class."""
    if kind == "relaxation":

        def relaxed(gap: Array) -> Array:
            log_p, log_q = -np.logaddexp(0, -gap), -np.logaddexp(0, gap)
            target = xlogy(1 - alpha, 1 - alpha) + xlogy(alpha, alpha)
            divergence = target - (1 - alpha) * log_p - alpha * log_q
            return np.where(gap < logit(1 - alpha), divergence, 0)

        return relaxed
    away = alpha / 2 if kind == "smoothing" else 0.0
    return lambda gap: (1 - away) * np.logaddexp(0, -gap) + away * np.logaddexp(0, gap)


def probability(kind: Loss, alpha: float, decay: float) -> float:
    """``s(z)``, what a network without noise gives to the right label.

    Raises:
        InvalidArgumentError: a decay so large that nothing is learned.
    """
    away = {"ce": 0.0, "smoothing": alpha / 2, "relaxation": alpha}[kind]
    limit = (0.5 - away) ** 2 / 4
    require(0 < decay < limit, f"decay must lie in (0, {limit:g}), or nothing is learned; got {decay:g}")
    return 1 - away - 2 * math.sqrt(decay)


def decay_of(right: float) -> float:
    """lambda, from the probability that a network trained by cross-entropy without noise gives to labels.

    >>> decay_of(probability("ce", 0.0, 1e-4))
    0.0001
    """
    require(0.5 < right < 1, f"right must be a probability in (0.5, 1), got {right}")
    return ((1 - right) / 2) ** 2


def equilibrium(kind: Loss, *, eta: float, slope: float, decay: float, alpha: float = 0.1) -> Equilibrium:
    """Solve the model for a loss.

    Args:
        kind: of the loss.
        eta: wrong labels for each right one.
        slope: C/D, memorization for each unit of dilation.
        decay: lambda.
        alpha: of smoothing and relaxation.

    Raises:
        InvalidArgumentError: numbers out of their range.
    """
    require(eta >= 0, f"eta must be at least 0, got {eta}")
    require(slope > 0, f"slope must be positive, got {slope}")
    objective = risk(kind, eta, decay, alpha)
    if eta == 0:
        return Equilibrium(0.0, 0.0, (1.0, 0.0), objective(np.array([1.0, 0.0, 0.0])))
    reach = math.sqrt(2) * slope / eta  # |h_1 - u_2| / a for each unit of R

    def inside(x: Array) -> float:
        return reach * reach * x[2] ** 2 - (x[0] - 1) ** 2 - x[1] ** 2

    found = minimize(
        objective,
        np.array([0.9, 0.1, 0.2 / reach]),
        method="SLSQP",
        bounds=[(0, None), (0, None), (0, None)],
        constraints={"type": "ineq", "fun": inside},
        options={"ftol": SLACK, "maxiter": 500},
    )
    require(bool(found.success), f"no equilibrium was found ({found.message}): take a larger decay or slope")
    x, y, dilation = (float(number) for number in found.x)
    return Equilibrium(eta * math.hypot(x - 1, y) / math.sqrt(2), dilation, (x, y), float(found.fun))


def risk(kind: Loss, eta: float, decay: float, alpha: float) -> Callable[[Array], float]:
    """What is minimized over ``(u_2 / a, R)``: three numbers."""
    gap, loss = float(logit(probability(kind, alpha, decay))), loss_of(kind, alpha)
    length = math.sqrt(decay) * gap  # lambda_H a^2

    def value(x: Array) -> float:
        # Along w_1 - w_2, of length 2 b, a number with the deviation r/sqrt(2): 2 b r/sqrt(2) = sqrt(2) z R.
        spread = math.sqrt(2) * gap * x[2] * NODES
        squared = 2 * x[2] ** 2  # |v|^2 / a^2 in the mean, as D = sqrt(2) a
        right = WEIGHTS @ loss(gap + spread) + length * (1 + squared)
        wrong = WEIGHTS @ loss(gap * (x[1] - x[0]) + spread) + length * (x[0] ** 2 + x[1] ** 2 + squared)
        return float(right + eta * wrong)

    return value
