"""Batches that hold every class equally, however rare it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from etflayers.checks import require, require_size
from etflayers.data.subsets import class_members, class_targets

__all__ = ["ClassBalancedSampler", "balanced_order"]


def balanced_order(
    targets: Tensor | Sequence[int],
    num_classes: int | None = None,
    *,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""An order of samples in which every K consecutive ones are one of each class.

    So a batch of m K samples from the start on is stratified: m of each class. The samples of a class take
    turns in random order, and none comes a second time before all of its class have come once. A rare class
    is over-sampled by that, and a frequent one may not come as a whole.

    Args:
        targets: y, ``(N,)``, the class of each sample, in [0, K).
        num_classes: K; default: the largest target plus one.
        num_samples: length of the order; default: N.
        generator: random numbers, on the CPU; default: PyTorch's global ones.

    Returns:
        Numbers of samples, ``(num_samples,)``, int64, on the CPU.

    Raises:
        InvalidArgumentError: targets that are no classes, or a class without a sample.

    Reference:
        Shen, Lin, Huang (2016), arXiv 1512.05830 (class-aware sampling).

    >>> targets = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])
    >>> order = balanced_order(targets, generator=torch.Generator().manual_seed(0))
    >>> targets[order]
    tensor([1, 0, 2, 2, 0, 1, 1, 2])
    """
    labels, num_classes = _every_class(targets, num_classes)
    num_samples = len(labels) if num_samples is None else num_samples
    require_size("num_samples", num_samples)
    rounds = -(-num_samples // num_classes)
    columns = []
    for numbers in class_members(labels, num_classes):
        passes = -(-rounds // len(numbers))
        shuffles = [numbers[torch.randperm(len(numbers), generator=generator)] for _ in range(passes)]
        columns.append(torch.cat(shuffles)[:rounds])
    table = torch.stack(columns, dim=1)
    places = torch.rand(table.shape, generator=generator).argsort(1)
    return table.gather(1, places).flatten()[:num_samples]


class ClassBalancedSampler(Sampler[int]):
    r"""Samples of a data set in an order in which every K consecutive ones are one of each class.

    :func:`balanced_order` as the ``sampler=`` of a ``DataLoader``. Each epoch has an order of its own, which
    the seed and the number of the epoch decide: call :meth:`set_epoch` before each, as for a
    ``torch.utils.data.DistributedSampler``. Over several ranks each takes every R-th sample of one common
    order: batches of b on R ranks are stratified together where R b is a multiple of K.

    Args:
        targets: y, ``(N,)``, the class of each sample, in [0, K).
        num_classes: K; default: the largest target plus one.
        num_samples: samples of an epoch, of all ranks together; default: N. It is rounded up to a multiple of
            the number of ranks.
        seed: of the order, in [0, 2**31); the same on every rank.
        num_replicas: number of ranks R.
        rank: of this process, in [0, R).

    Raises:
        InvalidArgumentError: targets that are no classes, a class without a sample, a rank out of range.

    Reference:
        Shen, Lin, Huang (2016), arXiv 1512.05830 (class-aware sampling).

    >>> targets = torch.tensor([0] * 8 + [1] * 2)
    >>> loader = torch.utils.data.DataLoader(targets, batch_size=4, sampler=ClassBalancedSampler(targets))
    >>> [sorted(batch.tolist()) for batch in loader]
    [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1]]
    """

    def __init__(
        self,
        targets: Tensor | Sequence[int],
        num_classes: int | None = None,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.targets, self.num_classes = _every_class(targets, num_classes)
        num_samples = len(self.targets) if num_samples is None else num_samples
        require_size("num_samples", num_samples)
        require_size("seed", seed, at_least=0)
        require(seed < 2**31, f"seed must be less than 2**31, got {seed}")
        require_size("num_replicas", num_replicas)
        require_size("rank", rank, at_least=0)
        require(rank < num_replicas, f"rank must be less than num_replicas = {num_replicas}, got {rank}")
        self.seed, self.epoch = seed, 0
        self.num_replicas, self.rank = num_replicas, rank
        self.num_samples = -(-num_samples // num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch from the next iteration on."""
        require_size("epoch", epoch, at_least=0)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        total = self.num_samples * self.num_replicas
        order = balanced_order(self.targets, self.num_classes, num_samples=total, generator=generator)
        return iter(order[self.rank :: self.num_replicas].tolist())

    def __len__(self) -> int:
        return self.num_samples


def _every_class(targets: Tensor | Sequence[int], num_classes: int | None) -> tuple[Tensor, int]:
    """Targets and K, after checking that every class has a sample."""
    if num_classes is not None:
        require_size("num_classes", num_classes)
    labels = class_targets(targets, num_classes)
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    missing = torch.nonzero(torch.bincount(labels, minlength=num_classes) == 0).flatten().tolist()
    more = " and more" if len(missing) > 5 else ""
    require(
        not missing,
        f"targets must hold a sample of every class to be balanced: of {num_classes} classes "
        f"{missing[:5]}{more} have none",
    )
    return labels, num_classes
