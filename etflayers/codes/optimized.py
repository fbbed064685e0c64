r"""Words found by optimization, for any K and d.

**Far from each other.** The largest cosine is not smooth. Its smooth maximum with inverse temperature beta
is, and for beta sqrt(d) of order 1 it has few local minima: that is where the search starts. Then beta rises
by factors of two, each minimum the start of the next search, until the smooth maximum is the maximum.

**Far from the hull of the others.** The distance of w_k from the convex hull of the others is a maximum
itself,

    dist_k = max_{|h| <= 1} min_{j != k} <h, w_k - w_j>,

h being normal to the hyperplane that separates best. So the smallest distance is made large by minimizing the
maximum over k and j != k of <h_k, w_j - w_k> over all h and w, in the same way.

Each search is by L-BFGS over free vectors, of which only the directions count; as they have length 1 at its
start, its gradient is the Riemannian one on the product of spheres, and it returns to the spheres at its end.

Symbols: W <-> words, h <-> normals, beta <-> beta.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from etflayers.checks import require, require_size
from etflayers.codes.bounds import coherence_bound
from etflayers.codes.measures import coherence, one_vs_rest_distance
from etflayers.codes.smooth_maximum import smooth_maximum

__all__ = ["optimized_rows", "softmax_rows"]

# The last beta: what rounding to float64 still tells from the maximum.
_COLDEST = 2.0**17
_STEPS = 50
# A largest cosine that is so little above the bound needs no other search.
_NOTHING = 1e-4


def optimized_rows(
    num_classes: int,
    in_features: int,
    *,
    generator: torch.Generator | None = None,
    restarts: int | None = None,
) -> Tensor:
    """K unit vectors in R^d with a largest cosine as small as a search finds it.

    On one CPU thread 500 vectors in R^64 take 5 seconds, 2103 about a minute. The K x K matrix is never
    stored.

    Args:
        num_classes: K >= 2.
        in_features: d >= 1; for d = 1 there are two unit vectors.
        generator: random numbers of the starts, on the device of which the search runs.
        restarts: searches, of which the best is continued; default: up to 16 where they are cheap, else one.

    Returns:
        ``(K, d)`` in float64.

    Raises:
        InvalidArgumentError: sizes that are too small.

    >>> rows = optimized_rows(4, 3, generator=torch.Generator().manual_seed(0))
    >>> round(float(coherence(rows)), 4)
    -0.3333
    """
    _require_sizes(num_classes, in_features)
    if restarts is None:
        restarts = max(1, min(16, 10**6 // (num_classes**2 * in_features)))
    require_size("restarts", restarts)
    # Not the default device, which may be "meta": a search needs values.
    device = torch.device("cpu") if generator is None else generator.device
    start = torch.randn(
        restarts, num_classes, in_features, generator=generator, device=device, dtype=torch.float64
    )
    warm = 2 * math.sqrt(in_features)
    # One start so warm that it forgets its random numbers has few local minima to end in, often the best.
    best = _cooled(start[:1], start.new_tensor([warm]))[0]
    if restarts == 1 or float(coherence(best)) - coherence_bound(num_classes, in_features) < _NOTHING:
        return best
    # Colder ones find others. They share their steps, and so need not be exact.
    colder = warm * 64 ** torch.linspace(0, 1, restarts - 1, dtype=torch.float64, device=start.device)
    best = _best(torch.cat((best[None], _cooled(start[1:], colder))))
    polished = best[None, None]
    for power in (13, 15, 17, 19):
        polished = _search(polished, start.new_tensor([2.0**power]), relative=False)
    return _best(torch.stack((best, polished[0, 0])))


def softmax_rows(
    num_classes: int,
    in_features: int,
    *,
    generator: torch.Generator | None = None,
    restarts: int | None = None,
) -> Tensor:
    """K unit vectors in R^d, each as far from the convex hull of the others as a search finds them.

    The search starts from :func:`optimized_rows` and takes a few times as long.

    Args:
        num_classes: K >= 2.
        in_features: d >= 2.
        generator: as in :func:`optimized_rows`.
        restarts: as in :func:`optimized_rows`.

    Returns:
        ``(K, d)`` in float64.

    Raises:
        InvalidArgumentError: sizes that are too small.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351.

    >>> rows = softmax_rows(5, 2, generator=torch.Generator().manual_seed(0))  # a pentagon: 1 - cos 72
    >>> round(float(one_vs_rest_distance(rows).min()), 4)
    0.691
    """
    words = optimized_rows(num_classes, in_features, generator=generator, restarts=restarts)
    best, distance = words, float(one_vs_rest_distance(words).min())
    pair = torch.stack((words, words)).unsqueeze(1)
    beta = words.new_tensor([2 * math.sqrt(in_features)])
    while float(beta) <= _COLDEST:
        pair = _search(pair, beta, relative=True)
        beta = 2 * beta
    found = float(one_vs_rest_distance(pair[1, 0]).min())
    return pair[1, 0] if found > distance else best


def _cooled(start: Tensor, beta: Tensor) -> Tensor:
    """The ends ``(R, K, d)`` of searches from given starts, each with its own first beta."""
    words = start.unsqueeze(0)
    while True:
        words = _search(words, beta, relative=False)
        if bool((beta >= _COLDEST).all()):
            return words[0]
        beta = (2 * beta).clamp(max=_COLDEST)


def _search(start: Tensor, beta: Tensor, *, relative: bool) -> Tensor:
    """A local minimum of the smooth maxima, of words ``(1, R, K, d)`` or normals and words ``(2, ...)``."""
    free = normalize(start, dim=-1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=_STEPS,
        max_eval=2 * _STEPS,
        history_size=20,
        tolerance_grad=1e-10,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def closure() -> Tensor:
        lengths = torch.linalg.vector_norm(free, dim=-1, keepdim=True)
        units = free / lengths
        queries, words = units[0], units[0] if len(units) == 1 else units[1]
        found = smooth_maximum(queries, words, beta, relative=relative)
        gradient = torch.stack((found.by_queries, found.by_words)[-len(units) :])
        free.grad = (gradient - units * (gradient * units).sum(-1, keepdim=True)) / lengths
        return found.value.sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return normalize(free.detach(), dim=-1)


def _best(candidates: Tensor) -> Tensor:
    """The one of several matrices ``(R, K, d)`` with the smallest largest cosine."""
    return candidates[min(range(len(candidates)), key=lambda r: float(coherence(candidates[r])))]


def _require_sizes(num_classes: int, in_features: int) -> None:
    require_size("num_classes", num_classes, at_least=2)
    require_size("in_features", in_features)
    require(
        in_features > 1 or num_classes == 2,
        f"in_features must be at least 2 for {num_classes} classes, got 1: a line has two unit vectors",
    )
