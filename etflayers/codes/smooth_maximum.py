r"""A smooth maximum over all pairs of words, with its gradient, a block of rows at a time.

For queries q_i and words w_j on the unit sphere, with c_ij = <q_i, w_j> - o_i,

    f(Q, W) = (1/beta) log sum_{i != j} exp(beta c_ij)

lies above the largest c_ij by at most log(K^2) / beta. With p_ij, the softmax of beta c over all pairs,

    df/dq_i = sum_j p_ij (w_j - o'_i),    df/dw_j = sum_i p_ij q_i - o''_j,

where o_i is 0 or <q_i, w_i>, which adds o'_i = w_i and o''_j = (sum_i p_ji) q_j. As in an attention that
stores no scores, blocks of rows are added up relative to the largest entry so far, and all is scaled down
when a larger one comes.

Symbols: Q <-> queries, W <-> words, p_ij times the sum <-> shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SmoothMaximum", "smooth_maximum"]

# Rows of scores that exist at a time.
_BLOCK = 512


class SmoothMaximum(NamedTuple):
    """The smooth maximum, its gradients in queries and words, and the largest value itself."""

    value: Tensor
    by_queries: Tensor
    by_words: Tensor
    largest: Tensor


def smooth_maximum(queries: Tensor, words: Tensor, beta: Tensor, *, relative: bool) -> SmoothMaximum:
    """The smooth maximum over i != j of ``<q_i, w_j>``, or of ``<q_i, w_j - w_i>`` if relative.

    Args:
        queries: ``(..., K, d)``.
        words: ``(..., K, d)``; where it is the same tensor as ``queries`` both gradients are the whole one.
        beta: inverse temperatures, ``(...)``.
        relative: whether to subtract ``<q_i, w_i>``.

    Returns:
        Value, gradients and the maximum itself.
    """
    symmetric = queries is words and not relative
    num_classes = words.shape[-2]
    largest = words.new_full(words.shape[:-2], -torch.inf)
    total = torch.zeros_like(largest)
    by_queries, by_words = torch.zeros_like(words), torch.zeros_like(words)
    for start in range(0, num_classes, _BLOCK):
        part = slice(start, min(start + _BLOCK, num_classes))
        scores = queries[..., part, :] @ words.mT
        own = scores.diagonal(start, -2, -1)
        if relative:
            scores = scores - own.unsqueeze(-1)
            own = scores.diagonal(start, -2, -1)
        own.fill_(-torch.inf)
        risen = torch.maximum(largest, scores.amax((-2, -1)))
        shrink = torch.exp(beta * (largest - risen))
        largest = risen
        shares = (scores - largest[..., None, None]).mul_(beta[..., None, None]).exp_()
        total = total * shrink + shares.sum((-2, -1))
        by_queries *= shrink[..., None, None]
        by_queries[..., part, :] = shares @ words
        if not symmetric:
            by_words *= shrink[..., None, None]
            by_words += shares.mT @ queries[..., part, :]
        if relative:
            of_rows = shares.sum(-1, keepdim=True)
            by_queries[..., part, :] -= of_rows * words[..., part, :]
            by_words[..., part, :] -= of_rows * queries[..., part, :]
    by_queries /= total[..., None, None]
    by_words = 2 * by_queries if symmetric else by_words / total[..., None, None]
    return SmoothMaximum(largest + total.log() / beta, by_queries, by_words, largest)
