r"""Subsets of a data set in which classes are rare.

Symbols: n_k <-> sizes, r <-> ratio, K <-> num_classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from etflayers.checks import require, require_number, require_size

__all__ = ["class_members", "class_subset", "class_targets", "long_tail_sizes"]


def long_tail_sizes(
    largest: int,
    num_classes: int,
    *,
    ratio: float,
    kind: Literal["exponential", "step"] = "exponential",
    rare: int | None = None,
) -> Tensor:
    r"""Sizes of long-tailed classes: ``n_k = n r^(-k/(K-1))`` or, for the last of them, ``n / r``.

    Class 0 keeps ``n = largest`` samples, class K - 1 keeps ``n / r``. Sizes are rounded to the nearest
    integer, and no class is left without a sample.

    Args:
        largest: n >= 1.
        num_classes: K >= 2.
        ratio: r >= 1, the size of the largest class over that of the smallest.
        kind: ``"exponential"``: each class is rarer than the last by one factor; ``"step"``: the last
            ``rare`` classes are rarer than the others by r.
        rare: number of rare classes of a step, in [0, K]; default: half of all, rounded down.

    Returns:
        ``(K,)``, int64.

    Raises:
        InvalidArgumentError: an argument out of its range, or ``rare`` for an exponential tail.

    Reference:
        Cui, Jia, Lin, Song, Belongie (2019), arXiv 1901.05555 (exponential); Buda, Maki, Mazurowski (2018),
        arXiv 1710.05381 (step).

    >>> long_tail_sizes(50, 4, ratio=8)
    tensor([50, 25, 12,  6])
    >>> long_tail_sizes(50, 4, ratio=10, kind="step", rare=1)
    tensor([50, 50, 50,  5])
    """
    require_size("largest", largest)
    require_size("num_classes", num_classes, at_least=2)
    require_number("ratio", ratio)
    require(ratio >= 1, f"ratio must be at least 1, the largest over the smallest class, got {ratio}")
    require(kind in ("exponential", "step"), f"kind must be 'exponential' or 'step', got {kind!r}")
    require(rare is None or kind == "step", "rare is a part of kind='step': leave it out")
    rare = num_classes // 2 if rare is None else rare
    require_size("rare", rare, at_least=0)
    require(rare <= num_classes, f"rare must be at most num_classes = {num_classes}, got {rare}")

    classes = torch.arange(num_classes, dtype=torch.float64)
    if kind == "exponential":
        shares = ratio ** (-classes / (num_classes - 1))
    else:
        shares = torch.where(classes < num_classes - rare, 1.0, 1 / ratio)
    return (shares * largest).round().clamp(min=1).long()


def class_subset(targets: Tensor | Sequence[int], sizes: Tensor | Sequence[int], *, seed: int = 0) -> Tensor:
    r"""Choose ``n_k`` samples of each class k at random, without replacement.

    The choice is part of what the data set is, and the same wherever it is made: it comes from a generator of
    NumPy (``RandomState``) whose stream is guaranteed for good, which that of PyTorch is not.

    Args:
        targets: y, ``(N,)``, the class of each sample of the whole data set, in [0, K).
        sizes: n, ``(K,)``, such as from :func:`long_tail_sizes`; the same number for all classes leaves few
            samples of each.
        seed: of the choice, in [0, 2**32).

    Returns:
        The numbers of the chosen samples, ascending, ``(sum n_k,)``, int64, on the CPU: those of a
        ``torch.utils.data.Subset``.

    Raises:
        InvalidArgumentError: targets that are no classes, or a class with fewer samples than wanted.

    >>> targets = [0, 0, 0, 1, 1, 1]
    >>> class_subset(targets, [3, 1])
    tensor([0, 1, 2, 5])
    """
    require_size("seed", seed, at_least=0)
    require(seed < 2**32, f"seed must be less than 2**32, got {seed}")
    wanted = _integers("sizes", sizes)
    members = class_members(class_targets(targets, len(wanted)), len(wanted))
    found = torch.tensor([len(numbers) for numbers in members])
    short = torch.nonzero((wanted < 0) | (wanted > found)).flatten().tolist()
    require(
        not short,
        "sizes must lie between 0 and the number of samples of each class: "
        + ", ".join(f"class {k} has {int(found[k])}, got {int(wanted[k])}" for k in short[:5]),
    )
    random = np.random.RandomState(seed)
    chosen = [
        numbers[torch.from_numpy(random.permutation(len(numbers))[:size])]
        for numbers, size in zip(members, wanted.tolist(), strict=True)
    ]
    return torch.cat(chosen).sort().values


def class_targets(targets: Tensor | Sequence[int], num_classes: int | None) -> Tensor:
    """``targets`` as an int64 tensor ``(N,)`` on the CPU, N >= 1, after checking that they are classes."""
    labels = _integers("targets", targets)
    require(len(labels) > 0, "targets must hold at least one sample, got none")
    low, high = int(labels.min()), int(labels.max())
    require(
        low >= 0 and (num_classes is None or high < num_classes),
        f"targets must be class indices in [0, {'K' if num_classes is None else num_classes}), "
        f"got values from {low} to {high}",
    )
    return labels


def class_members(targets: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    """The numbers of the samples of each class, ascending; targets are those of :func:`class_targets`."""
    sizes = torch.bincount(targets, minlength=num_classes).tolist()
    return torch.split(targets.argsort(stable=True), sizes)


def _integers(name: str, values: Tensor | Sequence[int]) -> Tensor:
    tensor = torch.as_tensor(values).detach().cpu()
    integral = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    require(
        tensor.ndim == 1 and (integral or len(tensor) == 0),
        f"{name} must be integers of shape (n,), got {tensor.dtype} of shape {tuple(tensor.shape)}",
    )
    return tensor.long()
