r"""Which class gets which word of a code: the assignment problem between class means and code words.

Symbols: X <-> means, V <-> words, sigma <-> assignment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import require_concrete, require_finite, require_floating, require_module
from etflayers.errors import InvalidArgumentError
from etflayers.functional.logits import directions

__all__ = ["assign_labels"]


@torch.no_grad()
def assign_labels(means: Tensor, words: Tensor) -> Tensor:
    r"""The one-to-one map sigma of classes to words with the largest ``sum_k <x_k / |x_k|, v_sigma(k)>``.

    A fixed code leaves open which class gets which word, and with words that are not equally far from each
    other, as those of any code but a simplex ETF, the choice matters. Means of a network at its start, or of
    a pretrained one, make it: ``words[assign_labels(means, words)]`` is the code in the order of the classes.

    Lengths of the means do not count, nor does a common factor > 0 of the words. A vector added to all words
    changes nothing either, because it adds the same number for every sigma. A vector added to all *means*
    turns their directions: subtract their mean first where the words sum to zero, as those of an ETF do. A
    mean that is zero is indifferent.

    Args:
        means: X, ``(K, d)``.
        words: V, ``(N, d)`` with N >= K; where N > K some words are left over.

    Returns:
        sigma, ``(K,)``, int64, on the device of ``means``: an index of a word for each class. Solved exactly,
        in float64 on the CPU, in O(K^2 N).

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, fewer words than classes, or a tensor that is
            traced and has no values.
        NonFiniteError: NaN or infinity.
        MissingDependencyError: scipy is not installed (extra ``solvers``).

    Reference:
        Kuhn (1955), The Hungarian method for the assignment problem; Crouse (2016), On implementing 2D
        rectangular assignment algorithms, which is scipy's.

    >>> means = torch.tensor([[0.0, 2.0], [3.0, 0.1], [-1.0, -1.0]])
    >>> words = torch.tensor([[1.0, 0.0], [-0.5, -0.9], [-0.5, 0.9]])
    >>> assign_labels(means, words)
    tensor([2, 0, 1])
    """
    for name, rows in (("means", means), ("words", words)):
        require_floating(name, rows.dtype)
        if rows.ndim != 2:
            raise InvalidArgumentError(f"{name} must have two dimensions, got shape {tuple(rows.shape)}")
        require_concrete(rows, "assign_labels", "assign before the model is traced")
        require_finite(rows.cpu(), f"{name} must be finite: look for what has overflowed in it")
    if means.shape[1] != words.shape[1] or len(means) > len(words):
        raise InvalidArgumentError(
            "means and words must have shapes (K, d) and (N, d) with N >= K, "
            f"got {tuple(means.shape)} and {tuple(words.shape)}"
        )
    products = directions(means.double()).cpu() @ words.double().cpu().mT
    optimize = require_module("scipy.optimize", extra="solvers")
    _, assignment = optimize.linear_sum_assignment(products.numpy(), maximize=True)
    return torch.as_tensor(assignment, dtype=torch.int64, device=means.device)
