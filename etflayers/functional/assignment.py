r"""Which class gets which word of a code, and how the code is turned for that.

Symbols: X <-> means, V <-> words, sigma <-> assignment, R <-> rotation.

The words of a code are not equally far from each other, and classes are not equally alike: a code that is
dealt out blindly sets look-alikes anywhere, and the network has to tear them apart. The nearest arrangement
of the same code,

    maximize  sum_k <x_k, R v_sigma(k)>   over rotations R of R^d and one-to-one maps sigma,

is approached by turns. For given sigma, R is the polar factor of X'V_sigma (orthogonal Procrustes); for given
R, sigma is an assignment problem. No turn lowers the sum, so they end, where neither improves it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require_concrete, require_finite, require_floating, require_module
from etflayers.errors import InvalidArgumentError
from etflayers.functional.logits import directions

__all__ = ["Arrangement", "arrange_code", "assign_labels"]


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


class Arrangement(NamedTuple):
    """A code, turned and dealt out.

    Attributes:
        words: R v_sigma(k) for each class k, ``(K, d)`` float64.
        cosine: mean cosine between the directions of the means and their words, a scalar.
    """

    words: Tensor
    cosine: Tensor


@torch.no_grad()
def arrange_code(means: Tensor, words: Tensor, *, max_turns: int = 20) -> Arrangement:
    r"""Rotation R and one-to-one map sigma that no turn improves: ``max sum_k <x_k / |x_k|, R v_sigma(k)>``.

    Args:
        means: X, ``(K, d)``, as they are: subtract their common mean before, for a code whose words sum to
            zero. A mean that is zero is indifferent, and does not count for the cosine.
        words: V, ``(N, d)`` unit rows, N >= K.
        max_turns: rotations and assignments to compute, if they do not come to rest before.

    Returns:
        The arrangement: a local optimum, since the turns start from no rotation.

    Raises:
        InvalidArgumentError: as :func:`assign_labels`.
        NonFiniteError: as :func:`assign_labels`.
        MissingDependencyError: scipy is not installed (extra ``solvers``).

    Reference:
        Schönemann (1966), A generalized solution of the orthogonal Procrustes problem.

    >>> means = torch.tensor([[-2.0, 2.0], [2.0, 2.0], [-3.0, -3.0], [1.0, -1.0]])
    >>> words = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> arrange_code(means, words).cosine
    tensor(1., dtype=torch.float64)
    """
    assignment = assign_labels(means, words)
    rows, words = directions(means.double()), words.to(means.device, torch.float64)
    turned = words
    for _ in range(max_turns):
        left, _values, right = torch.linalg.svd(rows.mT @ words[assignment])
        turned = words @ (left @ right).mT
        found = assign_labels(rows, turned)
        if torch.equal(found, assignment):
            break
        assignment = found
    chosen = turned[assignment]
    counted = (rows != 0).any(-1).sum().clamp(min=1)
    return Arrangement(chosen, (rows * chosen).sum() / counted)
