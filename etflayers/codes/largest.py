"""The largest of many logits, of which only a block of classes exists at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["largest", "largest_k"]


def largest(blocks: Iterable[Tensor]) -> Tensor:
    """The place of the largest logit, the first of those that are equal.

    Args:
        blocks: the logits ``(..., n)`` of consecutive classes, at least one block.

    Returns:
        ``(...)``, int64, counted from the first class of the first block.

    >>> largest([torch.tensor([1.0, 4.0]), torch.tensor([4.0, 3.0])])
    tensor(1)
    """
    best: Tensor | None = None
    labels, first = torch.empty(0), 0
    for block in blocks:
        if best is None:
            best = block.new_full(block.shape[:-1], -torch.inf)
            labels = torch.zeros_like(best, dtype=torch.int64)
        values, places = block.max(-1)
        labels = torch.where(values > best, places + first, labels)
        best = torch.maximum(best, values)
        first += block.shape[-1]
    return labels


def largest_k(blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, descending, and their places.

    Args:
        blocks: as for :func:`largest`, of k classes or more.
        k: how many.

    Returns:
        Logits ``(..., k)`` and places ``(..., k)``, int64.

    >>> largest_k([torch.tensor([1.0, 4.0]), torch.tensor([5.0, 3.0])], 2)
    (tensor([5., 4.]), tensor([2, 1]))
    """
    best = labels = None
    first = 0
    for block in blocks:
        places = torch.arange(first, first + block.shape[-1], device=block.device).expand_as(block)
        first += block.shape[-1]
        if best is not None and labels is not None:
            block, places = torch.cat((best, block), -1), torch.cat((labels, places), -1)
        best, order = block.topk(min(k, block.shape[-1]))
        labels = places.gather(-1, order)
    assert best is not None
    assert labels is not None
    return best, labels
