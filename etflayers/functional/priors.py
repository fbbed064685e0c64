r"""Logits that know how often each class occurs.

Symbols: pi <-> prior (normalized), z <-> logits, K <-> num_classes, s <-> scale, c <-> etf_radius(K).

A softmax trained on imbalanced data learns p(y | x) of these data, in which rare classes are rare. By Bayes'
rule ``log p(y | x) = log p(x | y) + log pi_y - log p(x)``. Adding log pi_y to the logit z_y in the loss
leaves to z the part that does not depend on how often the class occurs, so that the decision by the largest z
is the one for balanced data.

**Without a new kernel.** The losses from features make their logits from a product, and a product can add a
number to each class: of a matrix W,

    s W f + b = s [W, b / s] [f; 1],

one more column and one more feature, which is 1. The logits of the canonical frame are the first K features
themselves, up to what is common to all classes, which no softmax sees:

    s c (f_k - mean f) + b_k  =  s c (f_k + b_k / (s c))  +  something without k.
"""

from __future__ import annotations

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_floating, require_values
from etflayers.geometry import centered_basis_adjoint, etf_radius
from etflayers.precision import working_dtype

__all__ = [
    "features_with_prior",
    "linear_with_prior",
    "log_prior",
    "logit_adjustment",
    "require_frequencies",
    "require_prior",
]


def logit_adjustment(logits: Tensor, prior: Tensor, *, tau: float = 1.0) -> Tensor:
    r"""Add what is known of the frequency of each class: ``z_k + tau log pi_k``.

    In a loss, ``F.cross_entropy(logit_adjustment(z, prior), y)`` is the logit-adjusted loss, with tau = 1 the
    balanced softmax; at test time the class with the largest z, without the prior, is chosen. The other way
    round, of a network that was trained without, ``logit_adjustment(z, prior, tau=-1.0)`` takes the prior of
    the training set out of its logits.

    Args:
        logits: z, ``(..., K)``.
        prior: pi, ``(K,)``, probabilities or numbers of samples, which are divided by their sum.
        tau: how much of it to add.

    Returns:
        ``(..., K)``, float32 or better.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, a prior that is not positive and finite, tau
            that is not finite.

    Reference:
        Menon, Jayasumana, Rawat, Jain, Veit, Kumar (2021), arXiv 2007.07314; Ren, Yu, Sheng, Ma, Zhao, Yi, Li
        (2020), arXiv 2007.10740.

    >>> counts = torch.tensor([90, 10])
    >>> logit_adjustment(torch.zeros(1, 2), counts).softmax(-1)
    tensor([[0.9000, 0.1000]])
    """
    require_floating("logits", logits.dtype)
    require(logits.ndim > 0, "logits must have shape (..., num_classes), got a scalar")
    dtype = working_dtype(logits.dtype)
    return logits.to(dtype) + log_prior(prior, logits.shape[-1], tau, like=logits)


def log_prior(prior: Tensor, num_classes: int, tau: float = 1.0, *, like: Tensor) -> Tensor:
    """``tau log pi``, ``(K,)``, on the device and in the working precision of ``like``, after checks."""
    require_prior(prior, num_classes, tau)
    counts = prior.to(like.device, working_dtype(like.dtype))
    return tau * (counts.log() - counts.sum().log())


def require_prior(prior: Tensor, num_classes: int, tau: float = 1.0) -> None:
    """Raise unless ``prior`` has a positive, finite number for each class, and ``tau`` is a finite number."""
    require_frequencies("prior", prior)
    require(
        prior.shape == (num_classes,),
        f"prior must have one number for each class, shape ({num_classes},), got {tuple(prior.shape)}",
    )
    is_number = isinstance(tau, numbers.Real) and not isinstance(tau, bool)
    require(is_number and math.isfinite(tau), f"tau must be a finite number, got {tau!r}")


def require_frequencies(name: str, frequencies: Tensor) -> None:
    """Raise unless ``frequencies`` is a vector of positive, finite numbers: counts or probabilities."""
    require(
        isinstance(frequencies, Tensor)
        and not (frequencies.dtype.is_complex or frequencies.dtype == torch.bool),
        f"{name} must be a tensor of counts or probabilities, got "
        f"{frequencies.dtype if isinstance(frequencies, Tensor) else type(frequencies).__name__}: pass "
        "torch.as_tensor(counts)",
    )
    require(
        frequencies.ndim == 1 and len(frequencies) > 0,
        f"{name} must have one number for each class, shape (K,), got {tuple(frequencies.shape)}",
    )
    values = frequencies.detach()
    require_values(
        ((values > 0) & torch.isfinite(values)).all(),
        f"{name} must be positive and finite, because 0 has no logarithm and no reciprocal: a class without "
        "samples needs a guess of how often it occurs, for instance counts.clamp(min=1)",
    )


def linear_with_prior(rows: Tensor, frame: Tensor, added: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Features ``(B, d + 1)`` and a frame ``(K, d + 1)`` with the product ``s W f + b``: see above.

    Args:
        rows: f, ``(B, d)``.
        frame: W, ``(K, d)``.
        added: b, ``(K,)``.
        scale: s.
    """
    column = (added / scale).to(frame.dtype).unsqueeze(-1)
    return F.pad(rows, (0, 1), value=1.0), torch.cat((frame, column), -1)


def features_with_prior(features: Tensor, num_classes: int, added: Tensor, scale: float) -> Tensor:
    """Features ``(..., K)`` with the canonical logits of f plus b, up to what is common to all classes.

    Args:
        features: f, ``(..., d)`` with d >= K - 1; of d = K - 1 the reflection is done, too.
        num_classes: K.
        added: b, ``(K,)``.
        scale: s.
    """
    rows = features.to(working_dtype(features.dtype))
    if rows.shape[-1] == num_classes - 1:
        rows = centered_basis_adjoint(rows.unsqueeze(-1)).squeeze(-1)
    return rows[..., :num_classes] + added / (scale * etf_radius(num_classes))
