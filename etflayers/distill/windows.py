r"""Windows of steps through which the hypergradient flows, and what a window costs.

Truncation drops the part of the hypergradient that passes through the steps before the window. A window
``range(a, b)`` also ends training at step b, so that the outer loss sees the parameters at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from etflayers.checks import require

__all__ = ["last_window", "moving_window", "random_window", "truncation_cosine"]


def last_window(length: int, steps: int) -> range:
    """The last steps of training: ``range(T - w, T)``.

    Args:
        length: w, at most T.
        steps: T.

    Returns:
        The window, for :func:`~etflayers.distill.unrolled_inner_loop`.

    Raises:
        InvalidArgumentError: a length outside [1, T].

    Reference:
        Shaban, Cheng, Hatch, Boots (2018), arXiv 1810.10667.

    >>> last_window(10, 100)
    range(90, 100)
    """
    return moving_window(length, steps, progress=1.0)


def random_window(length: int, steps: int, *, generator: torch.Generator | None = None) -> range:
    """A window with its end uniform in {w, ..., T}, so that training stops at a random step.

    Args:
        length: w, at most T.
        steps: T.
        generator: source of the random number.

    Returns:
        The window, for :func:`~etflayers.distill.unrolled_inner_loop`.

    Raises:
        InvalidArgumentError: a length outside [1, T].

    Reference:
        Feng, Vedantam, Kempe (2023), arXiv 2311.07025.

    >>> window = random_window(10, 100, generator=torch.Generator().manual_seed(0))
    >>> len(window), window.stop <= 100
    (10, True)
    """
    _require_length(length, steps)
    device = "cpu" if generator is None else generator.device
    stop = int(torch.randint(length, steps + 1, (), generator=generator, device=device))
    return range(stop - length, stop)


def moving_window(length: int, steps: int, *, progress: float) -> range:
    """A curriculum: the window moves evenly from the first steps to the last as progress goes from 0 to 1.

    Args:
        length: w, at most T.
        steps: T.
        progress: in [0, 1], how much of the outer training is done; ``1 - progress`` moves it backwards.

    Returns:
        The window, for :func:`~etflayers.distill.unrolled_inner_loop`.

    Raises:
        InvalidArgumentError: a length outside [1, T], or progress outside [0, 1].

    Reference:
        Feng, Vedantam, Kempe (2023), arXiv 2311.07025.

    >>> [moving_window(10, 100, progress=p) for p in (0.0, 0.5, 1.0)]
    [range(0, 10), range(45, 55), range(90, 100)]
    """
    _require_length(length, steps)
    require(0 <= progress <= 1, f"progress must be in [0, 1], got {progress}")
    start = round(progress * (steps - length))
    return range(start, start + length)


def truncation_cosine(
    hypergradient: Callable[[range | None], Sequence[Tensor]], windows: Sequence[range]
) -> list[float]:
    """Cosine of the hypergradient through each window to the exact one, through all steps.

    Args:
        hypergradient: the gradient of the outer loss for any variables, as a function of the window, with the
            same random numbers in each call; ``None`` means all steps.
        windows: what to compare.

    Returns:
        One cosine for each window; 0 where a hypergradient vanishes.

    >>> exact = {None: [torch.tensor([3.0, 4.0])], range(1, 2): [torch.tensor([0.0, 4.0])]}
    >>> truncation_cosine(exact.get, [range(1, 2)])
    [0.8]
    """
    exact = _flat(hypergradient(None))
    cosines = []
    for window in windows:
        truncated = _flat(hypergradient(window))
        lengths = float(exact.norm() * truncated.norm())
        cosines.append(float(exact @ truncated) / lengths if lengths > 0 else 0.0)
    return cosines


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.detach().double().reshape(-1) for gradient in gradients])


def _require_length(length: int, steps: int) -> None:
    require(1 <= length <= steps, f"length must be in [1, {steps}], the number of steps, got {length}")
