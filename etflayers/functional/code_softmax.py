r"""The normalizer of a softmax over the words of a spherical code, without a matrix of logits.

For rows u the logits are z_k = <w_k, u>, and the loss of any target is made of

    L(u) = log sum_k exp z_k,        dL/du = sum_k p_k w_k,        p_k = exp(z_k - L).

Both are sums over the classes, so a few pieces of the code are made, used and forgotten at a time, on the way
back once more. With m_j the largest logit of the first j pieces, the partial sums s_j = sum exp(z_k - m_j)
follow

    s_{j+1} = s_j exp(m_j - m_{j+1}) + sum_{k in piece j+1} exp(z_k - m_{j+1}).

Where a word and its negative are both in the code, with logits h and -h, one product serves both, and they
give sum (p_+ - p_-) w to the gradient. No logit is larger than |u|: where that is moderate, as it is for
features of length 1 and any usual scale, m = 0 will do, and one exponential serves both as well: exp(-h) is
1 / exp(h).

u <-> rows, m <-> peak, s <-> total, L <-> found, exp(h) <-> powers, p <-> shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etflayers._torch import allow_in_graph, apply_function, forward_mode, inside_transform, is_batched
from etflayers.checks import reads_values
from etflayers.codes import SphericalCode

__all__ = ["code_logsumexp"]

# Logits that exist at a time, on a CPU (where they should stay in a cache) and elsewhere.
_CPU_ENTRIES, _ENTRIES = 2**17, 2**25
# exp(40) = 2e17: sums of 10^12 of it are within float32, and so are their reciprocals.
_MODERATE = 40.0


def code_logsumexp(rows: Tensor, code: SphericalCode) -> Tensor:
    r"""``log sum_k exp <w_k, u>`` over the words of a code, differentiable to any order and in both modes.

    Derivatives other than the first in reverse mode, and ``torch.func`` transforms, do make all logits.

    Args:
        rows: u, ``(B, d)``, float32 or float64.
        code: K words in R^d.

    Returns:
        ``(B,)``.

    >>> from etflayers.codes import OrthoplexCode
    >>> code_logsumexp(torch.zeros(1, 2), OrthoplexCode(4, 2)).exp()
    tensor([4.])
    """
    if inside_transform():
        return torch.logsumexp(code.piece_logits(rows, 0, code.pieces), -1)
    return _log_sum_exp(rows, code)


# torch.compile refuses functions with a forward mode; as one node of the graph they keep it.
@allow_in_graph
def _log_sum_exp(rows: Tensor, code: SphericalCode) -> Tensor:
    found: Tensor = apply_function(_LogSumExp, rows, code)
    return found


class _LogSumExp(torch.autograd.Function):
    """u -> L."""

    @staticmethod
    def forward(rows: Tensor, code: SphericalCode) -> Tensor:
        return torch.cat([_found(rows[part], code) for part in _parts(rows, code)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, ctx.code = inputs
        ctx.save_for_backward(rows, output)
        ctx.save_for_forward(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, found = ctx.saved_tensors
        code: SphericalCode = ctx.code
        if torch.is_grad_enabled() or forward_mode() or is_batched(grad):
            # By operations that can be differentiated and batched themselves.
            shares = torch.softmax(code.piece_logits(rows, 0, code.pieces), -1)
            return code.piece_adjoint(shares * grad.unsqueeze(-1), 0, code.pieces), None
        means = [_mean_word(rows[part], found[part], code) for part in _parts(rows, code)]
        return torch.cat(means).mul_(grad.unsqueeze(-1)), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (rows,) = ctx.saved_tensors
        code: SphericalCode = ctx.code
        shares = torch.softmax(code.piece_logits(rows, 0, code.pieces), -1)
        change: Tensor = (shares * code.piece_logits(tangent, 0, code.pieces)).sum(-1)
        return change


class _Run(NamedTuple):
    """Consecutive pieces, and whether each of them is words with their negatives."""

    start: int
    stop: int
    halved: bool


def _runs(count: int, code: SphericalCode, device: str) -> Iterator[_Run]:
    """The pieces of a code, as many at a time as ``count`` rows allow."""
    most = _CPU_ENTRIES if device == "cpu" else _ENTRIES
    width = code.piece_size // 2 if code.antipodal else code.piece_size
    step = max(1, most // max(1, count * width))
    halved = code.full_pieces if code.antipodal else 0
    for start in range(0, halved, step):
        yield _Run(start, min(start + step, halved), True)
    for start in range(halved, code.pieces, step):
        yield _Run(start, min(start + step, code.pieces), False)


def _parts(rows: Tensor, code: SphericalCode) -> list[slice]:
    """The batch in slices, of which even one piece has no more logits than allowed."""
    most = _CPU_ENTRIES if rows.device.type == "cpu" else _ENTRIES
    size = max(1, most // code.piece_size)
    return [slice(i, i + size) for i in range(0, len(rows), size)] or [slice(0, 0)]


def _moderate(rows: Tensor) -> bool:
    """Whether no logit of these rows can be large; asked only where the answer costs nothing."""
    return reads_values(rows) and bool((torch.linalg.vector_norm(rows, dim=-1) < _MODERATE).all())


def _found(rows: Tensor, code: SphericalCode) -> Tensor:
    """L, ``(B,)``."""
    total = rows.new_zeros(len(rows))
    if _moderate(rows):
        for start, stop, halved in _runs(len(rows), code, rows.device.type):
            if halved:
                powers = torch.exp(code.half_logits(rows, start, stop))
                total += powers.sum((0, 2))
                total += powers.reciprocal_().sum((0, 2))
            else:
                total += torch.exp(code.piece_logits(rows, start, stop)).sum(-1)
        return total.log_()
    peak = torch.full_like(total, -torch.inf)
    for start, stop, halved in _runs(len(rows), code, rows.device.type):
        if halved:
            logits = code.half_logits(rows, start, stop)
            higher = torch.maximum(peak, torch.linalg.vector_norm(logits, torch.inf, dim=(0, 2)))
        else:
            logits = code.piece_logits(rows, start, stop)
            higher = torch.maximum(peak, logits.amax(-1))
        total *= (peak - higher).exp_()
        peak, column = higher, higher.unsqueeze(-1)
        if halved:
            total += (logits - column).exp_().sum((0, 2))
            total += (-column - logits).exp_().sum((0, 2))
        else:
            total += (logits - column).exp_().sum(-1)
    return peak + total.log()


def _mean_word(rows: Tensor, found: Tensor, code: SphericalCode) -> Tensor:
    """``sum_k p_k w_k``, ``(B, d)``."""
    mean, column = torch.zeros_like(rows), found.unsqueeze(-1)
    moderate = _moderate(rows)
    for start, stop, halved in _runs(len(rows), code, rows.device.type):
        if halved and moderate:
            powers = torch.exp(code.half_logits(rows, start, stop))
            powers -= powers.reciprocal()
            mean += code.half_adjoint(powers.mul_((-column).exp()), start, stop)
        elif halved:
            logits = code.half_logits(rows, start, stop)
            shares = (logits - column).exp_()
            shares -= (-column - logits).exp_()
            mean += code.half_adjoint(shares, start, stop)
        else:
            shares = (code.piece_logits(rows, start, stop) - column).exp_()
            mean += code.piece_adjoint(shares, start, stop)
    return mean
