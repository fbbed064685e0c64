r"""What is kept of classes whose data are gone: their mean, how many there were, and a few of the features.

Symbols: m_k <-> means, n_k <-> counts, C <-> capacity.

**A sample that can be merged.** Every feature draws a random number, its *key*, when it is seen, and of each
class the C features with the smallest keys are kept. All features have the same chance, as in reservoir
sampling, and what is kept depends on the keys alone and not on the order or the grouping: of two memories the
C smallest keys of both together are those that one memory of all data would have kept. Means and counts add
exactly, too:

    n = n_a + n_b,    m = m_a + (n_b / n) (m_b - m_a).
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from etflayers.checks import require, require_floating, require_size
from etflayers.collectives import world_size
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import class_means, ignored_targets
from etflayers.nn.base import class_numbers
from etflayers.nn.keeps_precision import KeepsPrecision
from etflayers.precision import working_dtype
from etflayers.storage import read_tensors, write_tensors

__all__ = ["FeatureMemory"]

# The key of a place that holds no feature.
_EMPTY = 2**63 - 1
_KIND = "feature_memory"


class FeatureMemory(KeepsPrecision):
    r"""Class means, counts and up to C features of each class, to be replayed when its data are gone.

    Everything is in buffers: a memory that is part of a model is saved with it. Of the features that
    :meth:`update` is given it keeps the exact mean of each class, the number of samples, and a uniformly
    random choice of C of them. Two memories of different data are merged into that of all data.

    .. code-block:: python

        for images, targets in loader:  # after a session
            memory.update(backbone(images), targets)
        old, labels = memory.sample(64)  # in later ones
        loss = criterion(backbone(images), targets) + criterion(old, labels)

    Under ``DistributedDataParallel`` keep it outside of the model, whose buffers are overwritten with those
    of the first rank: each rank has a memory of its own data, and :meth:`merged_over_ranks` is that of all.

    Features are replayed as they were. They stay good for a head on a backbone that is frozen, or a layer
    below the head that learns slowly.

    Args:
        in_features: d.
        num_classes: K, all that may ever come.
        capacity: C >= 0, features kept of each class; with 0 the means alone are replayed.
        ignore_index: target of the samples to leave out.
        device: of the buffers.
        dtype: of means and features: float32 (also where a half precision is asked for) or float64.
            ``half()`` and ``bfloat16()`` leave it.

    Attributes:
        means: ``(K, d)``, zero for classes never seen.
        counts: ``(K,)`` int64, number of samples seen.
        features: ``(K, C, d)``, in the order of their keys.
        keys: ``(K, C)`` int64, random numbers, the largest of all where there is no feature.

    Raises:
        InvalidArgumentError: a size out of its range.

    Reference:
        Yang, Yuan, Li, Lin, Torr, Tao (2023), arXiv 2302.03004 (replay of means); Vitter (1985), Random
        sampling with a reservoir; Cohen, Kaplan (2007), Summarizing data using bottom-k sketches.

    >>> memory = FeatureMemory(in_features=2, num_classes=5)
    >>> _ = memory.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 3]))
    >>> memory.means_of([3, 0])
    (tensor([[0., 5.],
            [2., 0.]]), tensor([3, 0]))
    """

    means: Tensor
    counts: Tensor
    features: Tensor
    keys: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        capacity: int = 0,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_size("in_features", in_features)
        require_size("num_classes", num_classes)
        require_size("capacity", capacity, at_least=0)
        require_size("ignore_index", ignore_index, at_least=None)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        self.in_features = in_features
        self.num_classes = num_classes
        self.capacity = capacity
        self.ignore_index = ignore_index
        means = torch.zeros(num_classes, in_features, device=device, dtype=working_dtype(dtype))
        self.register_buffer("means", means)
        self.register_buffer("counts", torch.zeros(num_classes, device=device, dtype=torch.int64))
        self.register_buffer("features", means.new_zeros(num_classes, capacity, in_features))
        self.register_buffer(
            "keys", torch.full((num_classes, capacity), _EMPTY, device=device, dtype=torch.int64)
        )

    @property
    def remembered(self) -> Tensor:
        """Numbers of the classes that have been seen, ascending; waits for the device."""
        return self.counts.nonzero().flatten()

    @torch.no_grad()
    def update(
        self, features: Tensor, targets: Tensor, *, generator: torch.Generator | None = None
    ) -> FeatureMemory:
        """Remember a batch. Nothing of it is part of a graph.

        Args:
            features: ``(..., d)``, finite.
            targets: ``(...)``, integers in [0, K) or ``ignore_index``.
            generator: random numbers of the keys, on the device of the memory; under ``torch.distributed``
                one with a seed of its own on each rank.

        Returns:
            The memory.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, or targets out of range.
            NonFiniteError: NaN or infinity in the features.
        """
        if features.shape[-1:] != (self.in_features,):
            raise InvalidArgumentError(
                f"features must have shape (..., in_features) = (..., {self.in_features}), as the memory, "
                f"got {tuple(features.shape)}"
            )
        if targets.shape != features.shape[:-1]:
            raise InvalidArgumentError(
                f"targets must have the leading shape of features, {tuple(features.shape[:-1])}, "
                f"got {tuple(targets.shape)}"
            )
        rows, labels = features.detach().reshape(-1, self.in_features), targets.reshape(-1)
        ignored = ignored_targets(labels, self.num_classes, self.ignore_index)
        means, counts = class_means(rows, labels, self.num_classes, ignore_index=self.ignore_index)
        labels = torch.where(ignored, self.num_classes, labels.long())
        keys = torch.randint(_EMPTY, labels.shape, generator=generator, device=self.keys.device)
        self._add(means.to(self.means), counts)
        self._keep(rows.to(self.features), keys, labels)
        return self

    @torch.no_grad()
    def merge(self, other: FeatureMemory) -> FeatureMemory:
        """Remember what another memory does, of other data; this one is then that of both.

        Args:
            other: of the same width and capacity, for at most as many classes; it stays as it is.

        Returns:
            The memory.

        Raises:
            InvalidArgumentError: no memory, this one, or one that does not fit.
        """
        require(
            isinstance(other, FeatureMemory),
            f"other must be a FeatureMemory, got {type(other).__name__}",
        )
        require(other is not self, "other must not be the memory itself: its samples would count twice")
        require(
            (other.in_features, other.capacity) == (self.in_features, self.capacity),
            f"other must have in_features = {self.in_features} and capacity = {self.capacity}, "
            f"got {other.in_features} and {other.capacity}",
        )
        require(
            other.num_classes <= self.num_classes,
            f"other must have at most num_classes = {self.num_classes}, got {other.num_classes}: merge this "
            "memory into the larger one",
        )
        more = self.num_classes - other.num_classes
        means, counts = F.pad(other.means, (0, 0, 0, more)), F.pad(other.counts, (0, more))
        self._add(means.to(self.means), counts.to(self.counts))
        classes = torch.arange(other.num_classes, device=self.keys.device).repeat_interleave(self.capacity)
        self._keep(
            other.features.flatten(0, 1).to(self.features), other.keys.flatten().to(self.keys), classes
        )
        return self

    def merged_over_ranks(self, process_group: dist.ProcessGroup | None = None) -> FeatureMemory:
        """The memory of the data of all ranks, a new one, which every rank of the group gets.

        Args:
            process_group: the ranks, which all call it; default all.
        """
        whole = FeatureMemory(
            self.in_features,
            self.num_classes,
            capacity=self.capacity,
            ignore_index=self.ignore_index,
            device=self.means.device,
            dtype=self.means.dtype,
        )
        size = world_size(process_group)
        if size == 1:
            return whole.merge(self)
        states: list[dict[str, Tensor]] = [{} for _ in range(size)]
        for name, buffer in self.named_buffers():
            parts = [torch.empty_like(buffer) for _ in range(size)]
            dist.all_gather(parts, buffer.contiguous(), group=process_group)
            for state, part in zip(states, parts, strict=True):
                state[name] = part
        for state in states:
            one = FeatureMemory(self.in_features, self.num_classes, capacity=self.capacity, device="meta")
            one.load_state_dict(state, assign=True)
            whole.merge(one)
        return whole

    # --- replay ---

    def means_of(self, classes: Iterable[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Class means as features, and their classes as targets, for a loss of a head.

        Args:
            classes: numbers in [0, K), all of them seen; default all that have been.

        Returns:
            ``(n, d)`` and ``(n,)`` int64.

        Raises:
            InvalidArgumentError: no numbers of classes, or one that has not been seen.
        """
        index = self._seen(classes)
        return self.means[index], index

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        *,
        classes: Iterable[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features that were seen, every class with the same chance; with ``capacity=0`` class means.

        Args:
            batch_size: n >= 1; drawn with replacement.
            classes: as in :meth:`means_of`.
            generator: random numbers, on the device of the memory.

        Returns:
            ``(n, d)`` and targets ``(n,)`` int64.

        Raises:
            InvalidArgumentError: a batch size below 1, no numbers of classes, or one that has not been seen.
        """
        require_size("batch_size", batch_size)
        index = self._seen(classes)
        device = self.means.device
        targets = index[torch.randint(len(index), (batch_size,), generator=generator, device=device)]
        if self.capacity == 0:
            return self.means[targets], targets
        held = (self.keys[targets] < _EMPTY).sum(-1)
        share = torch.rand(batch_size, generator=generator, device=device, dtype=self.means.dtype)
        return self.features[targets, torch.minimum((share * held).long(), held - 1)], targets

    def _seen(self, classes: Iterable[int] | Tensor | None) -> Tensor:
        if classes is None:
            index = self.remembered
            require(len(index) > 0, "the memory is empty: call memory.update(features, targets) first")
            return index
        index = class_numbers(classes, self.num_classes).to(self.counts.device)
        require(len(index) > 0, "classes must name at least one class")
        missing = index[self.counts[index] == 0].tolist()
        require(
            not missing,
            f"classes must have been seen by the memory, got {missing[:8]}: memory.remembered are those that "
            "have been",
        )
        return index

    # --- state ---

    def _add(self, means: Tensor, counts: Tensor) -> None:
        total = self.counts + counts
        share = (counts / total.clamp(min=1)).to(self.means.dtype).unsqueeze(-1)
        self.means.lerp_(means, share)
        self.counts.copy_(total)

    def _keep(self, rows: Tensor, keys: Tensor, classes: Tensor) -> None:
        """Keep the C smallest keys of each class, of those here and of new rows; class K is for none."""
        if self.capacity == 0:
            return
        own = torch.arange(self.num_classes, device=keys.device)
        rows = torch.cat((self.features.flatten(0, 1), rows))
        keys = torch.cat((self.keys.flatten(), keys))
        classes = torch.cat((own.repeat_interleave(self.capacity), classes))
        # By class, and by key within a class: at least the C places from before, empty ones last.
        order = keys.argsort(stable=True)
        order = order[classes[order].argsort(stable=True)]
        first = torch.searchsorted(classes[order], own)
        chosen = order[first.unsqueeze(-1) + torch.arange(self.capacity, device=keys.device)]
        self.features.copy_(rows[chosen])
        self.keys.copy_(keys[chosen])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget everything."""
        self.means.zero_()
        self.counts.zero_()
        self.features.zero_()
        self.keys.fill_(_EMPTY)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the memory into a safetensors file, without pickle.

        Raises:
            MissingDependencyError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        sizes = {"capacity": self.capacity, "ignore_index": self.ignore_index}
        write_tensors(path, dict(self.named_buffers()), {_KIND: sizes})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> FeatureMemory:
        """Read what :meth:`save` has written.

        Raises:
            InvalidArgumentError: a file with something else, or a damaged one.
            MissingDependencyError: safetensors is not installed.
            OSError: the file cannot be read.
        """
        tensors, record = read_tensors(path)
        require(_KIND in record, f"{path} holds no FeatureMemory")
        try:
            num_classes, in_features = tensors["means"].shape
            dtype = tensors["means"].dtype
            memory = cls(in_features, num_classes, **record[_KIND], device=device, dtype=dtype)
            memory.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # what was never saved by a memory
            raise InvalidArgumentError(f"{path} does not hold a FeatureMemory: {error}") from error
        return memory

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, capacity={self.capacity}, "
            f"ignore_index={self.ignore_index}"
        )
