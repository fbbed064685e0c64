r"""Labels that are wrong in a known way: the noise whose memorization is to be measured.

Symbols: y <-> targets, eta <-> eta, T <-> transition, K <-> num_classes.

Label noise that does not look at the image is a Markov step: class k becomes j with probability ``T_kj``.
**Symmetric** noise tosses a coin for each label and, with probability eta, draws it anew from all K classes,

    T = (1 - eta) I + eta 11'/K,

so that a label which was drawn anew is its old self in one of K cases, and ``eta (K - 1)/K`` of all labels
truly change. **Latent** classes are no step among the K classes: each class k loses a share of its samples to
a class ``K + k`` of its own that looks the same and that a test set does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require, require_floating, require_size
from etflayers.data.subsets import class_members, class_targets
from etflayers.errors import InvalidArgumentError

__all__ = ["NoisyLabels", "latent_classes", "symmetric_noise", "transition_noise"]

# How far the rows of a transition matrix may be from one: what K float32 numbers lose in a sum.
_ROW_SUM = 1e-5


class NoisyLabels(NamedTuple):
    """Labels with noise, and what the noise did; all ``(N,)``, on the CPU, in the order of the samples.

    Attributes:
        targets: the noisy labels, int64.
        changed: where they differ from the labels that went in.
        redrawn: where a label was drawn at random; it may have come out as it was.
    """

    targets: Tensor
    changed: Tensor
    redrawn: Tensor


def symmetric_noise(
    targets: Tensor | Sequence[int],
    num_classes: int,
    eta: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> NoisyLabels:
    r"""Draw each label anew from all K classes with probability eta: ``eta (K - 1)/K`` of them change.

    Some papers call the share of labels that change the noise rate, and others eta: to change a share r of
    them, give ``eta = r K/(K - 1)``.

    Args:
        targets: y, ``(N,)``, the class of each sample, in [0, K).
        num_classes: K >= 2.
        eta: in [0, 1], a number or one for each class, ``(K,)``: noise that hits some classes harder.
        generator: random numbers, on the CPU; default: PyTorch's global ones.

    Returns:
        The noisy labels, where they changed and where they were drawn anew.

    Raises:
        InvalidArgumentError: targets that are no classes, K < 2, eta outside [0, 1] or of another shape.

    Reference:
        Nguyen, Levie, Lienen, Kutyniok, Hüllermeier (2023), arXiv 2206.05530.

    >>> noisy = symmetric_noise(
    ...     torch.arange(4).repeat(1000), 4, 0.4, generator=torch.Generator().manual_seed(0)
    ... )
    >>> round(noisy.redrawn.float().mean().item(), 1), round(noisy.changed.float().mean().item(), 1)
    (0.4, 0.3)
    """
    require_size("num_classes", num_classes, at_least=2)
    labels = class_targets(targets, num_classes)
    rates = _rates("eta", eta, num_classes)
    redrawn = _uniform(len(labels), generator) < rates[labels]
    drawn = torch.randint(num_classes, labels.shape, generator=generator)
    noisy = torch.where(redrawn, drawn, labels)
    return NoisyLabels(noisy, noisy != labels, redrawn)


def transition_noise(
    targets: Tensor | Sequence[int], transition: Tensor, *, generator: torch.Generator | None = None
) -> NoisyLabels:
    r"""Draw the label of each sample from the row of its class: class k becomes j with probability ``T_kj``.

    Args:
        targets: y, ``(N,)``, the class of each sample, in [0, K).
        transition: T, ``(K, K)``, not negative, with rows that sum to one.
        generator: random numbers, on the CPU; default: PyTorch's global ones.

    Returns:
        The noisy labels and where they changed; every label counts as drawn anew.

    Raises:
        InvalidArgumentError: targets that are no classes, a matrix that is not square, entries that are
            negative or not finite, rows that do not sum to one.

    Reference:
        Patrini, Rozza, Menon, Nock, Qu (2017), arXiv 1609.03683.

    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> transition_noise([0, 0, 1], swap).targets
    tensor([1, 1, 0])
    """
    _require_stochastic(transition)
    num_classes = len(transition)
    labels = class_targets(targets, num_classes)
    # The label is the first class at which the distribution function exceeds a uniform number. Divided by
    # its end, that function reaches one whatever rounding did, and a class of probability zero adds no step.
    reached = transition.detach().cpu().double().cumsum(1)
    reached = reached / reached[:, -1:]
    uniform = _uniform(len(labels), generator)
    noisy = torch.empty_like(labels)
    for steps, members in zip(reached, class_members(labels, num_classes), strict=True):
        noisy[members] = torch.searchsorted(steps, uniform[members], right=True)
    return NoisyLabels(noisy, noisy != labels, torch.ones_like(labels, dtype=torch.bool))


def latent_classes(
    targets: Tensor | Sequence[int],
    num_classes: int,
    share: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> NoisyLabels:
    r"""Move each sample of class k to a latent class ``K + k`` with probability ``share``: 2K classes then.

    What the network learns to tell apart within a class cannot be seen in its samples, so it has to remember
    them. Test data have classes below K only. To have both kinds of noise, apply :func:`symmetric_noise`
    first, as published.

    Args:
        targets: y, ``(N,)``, the class of each sample, in [0, K).
        num_classes: K >= 1.
        share: in [0, 1], a number or one for each class, ``(K,)``.
        generator: random numbers, on the CPU; default: PyTorch's global ones.

    Returns:
        Labels in [0, 2K); those that were moved have changed and count as drawn.

    Raises:
        InvalidArgumentError: targets that are no classes, a share outside [0, 1] or of another shape.

    Reference:
        Nguyen, Levie, Lienen, Kutyniok, Hüllermeier (2023), arXiv 2206.05530 (its latent noise classes, for
        K = 2).

    >>> latent_classes([0, 1, 2], 3, torch.tensor([0.0, 1.0, 0.0])).targets
    tensor([0, 4, 2])
    """
    require_size("num_classes", num_classes)
    labels = class_targets(targets, num_classes)
    moved = _uniform(len(labels), generator) < _rates("share", share, num_classes)[labels]
    return NoisyLabels(labels + num_classes * moved, moved, moved)


def _uniform(size: int, generator: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1): below a rate of 1 always, below one of 0 never."""
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _rates(name: str, rates: float | Tensor, num_classes: int) -> Tensor:
    """One probability for each class, ``(K,)``, float64, on the CPU."""
    values = torch.as_tensor(rates).detach().cpu().double()
    require(
        values.shape in ((), (num_classes,)),
        f"{name} must be a number or have shape (num_classes,) = ({num_classes},), got {tuple(values.shape)}",
    )
    outside = values[~((values >= 0) & (values <= 1))]
    require(
        not len(outside),
        f"{name} must be a probability in [0, 1], got {float(outside[0]) if len(outside) else ''}",
    )
    return values.expand(num_classes)


def _require_stochastic(transition: Tensor) -> None:
    if not isinstance(transition, Tensor) or transition.ndim != 2 or len(set(transition.shape)) != 1:
        found = tuple(transition.shape) if isinstance(transition, Tensor) else type(transition).__name__
        raise InvalidArgumentError(f"transition must be a tensor of shape (K, K), got {found}")
    require_floating("transition", transition.dtype)
    require(len(transition) > 0, "transition must have at least one class, got shape (0, 0)")
    require(
        bool((torch.isfinite(transition) & (transition >= 0)).all()),
        "transition must hold probabilities: finite numbers >= 0",
    )
    sums = transition.detach().double().sum(1)
    worst = int((sums - 1).abs().argmax())
    require(
        abs(float(sums[worst]) - 1) <= _ROW_SUM,
        f"transition must have rows that sum to one, got {float(sums[worst]):.6g} for class {worst}: divide "
        "each row by its sum",
    )
