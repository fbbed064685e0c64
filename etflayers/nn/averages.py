"""Running means of the features of each class."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers._torch import inside_backward, is_concrete, stamp
from etflayers.checks import require, require_flag, require_floating, require_size, require_values
from etflayers.collectives import ClassShard, all_reduce_sum, world_size
from etflayers.errors import (
    EtfLayersError,
    InvalidArgumentError,
    MissingTargetsError,
    RanksDisagreeError,
    RecomputationError,
)
from etflayers.functional.class_means import (
    class_sums,
    ignored_targets,
    require_class_indices,
    require_same_device,
)
from etflayers.functional.soft_targets import are_soft, require_soft_shape
from etflayers.kernels.class_sums import (
    Momentum,
    averages_use_triton,
    class_averages,
    momentum_steps,
    require_momentum,
)
from etflayers.nn.keeps_precision import KeepsPrecision
from etflayers.precision import working_dtype

__all__ = ["AverageState", "FeatureMovingAverage", "Momentum"]


class AverageState(NamedTuple):
    """What the average knows of each class: its mean ``(K, d)``, samples and batches so far ``(K,)``."""

    means: Tensor
    counts: Tensor
    updates: Tensor


class FeatureMovingAverage(KeepsPrecision):
    r"""Running mean of the features of each class: ``m_k <- m_k + a_k (mean of the batch - m_k)``.

    The step ``a_k`` belongs to the class: it is 1 the first time that the class occurs, 0 when a batch holds
    none of its samples, and otherwise given by ``momentum``. In training the returned means carry a gradient
    to the batch, ``a_k / n_k`` for each of the n_k samples; the stored means are constants. In eval mode the
    stored means are returned and nothing changes. A training pass under ``torch.no_grad`` still updates, as
    in BatchNorm. Gradient checkpointing, which would run the pass twice, is refused: keep this layer outside
    the checkpoint.

    Soft targets P (mixup, cutmix, a teacher) give class k the share ``P_ik`` of sample i. The mean of the
    batch is then ``sum_i P_ik f_i / n_k`` with the mass ``n_k = sum_i P_ik``, and the step is multiplied by
    ``min(1, n_k)``: a class of which a batch holds less than one whole sample moves by that much less. Where
    all shares are 0 or 1 this is the rule above.

    Under ``torch.distributed`` the sums and counts are added over the ranks, so that every rank holds the
    average that one process would have computed on the whole batch. Where a rank refuses its batch, all
    raise. As with ``SyncBatchNorm``, every rank needs a batch in every step: ``DistributedDataParallel.join``
    cannot stand in for one that has none.

    Args:
        in_features: d.
        num_classes: K.
        momentum: a number a in (0, 1]: ``a_k = a``, as in BatchNorm. ``None``: the exact mean of all samples
            seen (each *sample* has the same weight, where BatchNorm gives it to each batch). ``"2/(t+1)"``:
            the schedule of Markou et al., t the number of batches with that class, this one included, never
            less than 1e-4.
        ignore_index: target of the samples to leave out.
        synchronize: whether to add over the ranks when ``torch.distributed`` is initialized.
        process_group: the ranks to add over; default: all. It is not part of copies and pickles, which
            start with the default group: assign the attribute again.
        class_range: ``(start, stop)``: only the means of the classes ``start <= k < stop``, where the classes
            are divided among ranks. Targets still count from 0 to K; samples of other classes are left out.
            The ranks that divide the classes have the same samples and must not add their sums: give
            ``process_group`` those with other samples, or ``synchronize=False``.
        device: of the buffers.
        dtype: of the means: float32 (also where a half precision is asked for) or float64. ``half()`` and
            ``bfloat16()`` leave it.

    Attributes:
        means: ``(K, d)``, zero rows for classes never seen; with ``class_range`` K is ``stop - start`` here
            and below.
        counts: ``(K,)`` int64, number of samples seen, with any share.
        updates: ``(K,)`` int64, number of batches in which the class occurred.

    Raises:
        InvalidArgumentError: in_features or num_classes < 1, an unknown momentum, or classes outside [0, K).

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> average = FeatureMovingAverage(in_features=1, num_classes=3, momentum=0.5)
    >>> average(torch.tensor([[2.0], [4.0], [8.0]]), torch.tensor([0, 0, 1]))
    tensor([[3.], [8.], [0.]])
    >>> average(torch.tensor([[5.0]]), torch.tensor([0]))
    tensor([[4.], [8.], [0.]])
    >>> average.seen
    tensor([ True,  True, False])
    """

    means: Tensor
    counts: Tensor
    updates: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        momentum: Momentum = 0.1,
        ignore_index: int = -100,
        synchronize: bool = True,
        process_group: dist.ProcessGroup | None = None,
        class_range: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_size("in_features", in_features)
        require_size("num_classes", num_classes)
        require_size("ignore_index", ignore_index, at_least=None)
        require_flag("synchronize", synchronize)
        require_momentum(momentum)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        self.in_features = in_features
        self.num_classes = num_classes
        self.momentum = momentum
        self.ignore_index = ignore_index
        self.synchronize = synchronize
        self.process_group = process_group
        self._shard = None if class_range is None else ClassShard(num_classes, *class_range)
        rows = num_classes if self._shard is None else len(self._shard)
        means = torch.zeros(rows, in_features, device=device, dtype=working_dtype(dtype))
        self.register_buffer("means", means)
        self.register_buffer("counts", torch.zeros(rows, device=device, dtype=torch.int64))
        self.register_buffer("updates", torch.zeros(rows, device=device, dtype=torch.int64))
        self._committed: tuple[int, int] | None = None

    @property
    def class_range(self) -> tuple[int, int]:
        """The classes whose means these are, ``start <= k < stop``."""
        return (0, self.num_classes) if self._shard is None else (self._shard.start, self._shard.stop)

    @property
    def seen(self) -> Tensor:
        """Which classes have occurred, ``(K,)`` bool."""
        return self.counts > 0

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Class means after this batch (in training; stores them too) or as stored (in eval mode).

        Args:
            features: ``(..., d)``, finite; half precision is accumulated in float32.
            targets: ``(...)``, integers in [0, K) or ``ignore_index``; or soft targets, ``(..., K)``,
                floating point, with rows that sum to 1; not used in eval mode.

        Returns:
            ``(K, d)``; in training differentiable in ``features`` and in soft targets.

        Raises:
            MissingTargetsError: training without targets.
            InvalidArgumentError: shapes or dtypes that do not fit, targets out of range, or soft targets with
                ``momentum=None``.
            NonFiniteError: NaN or infinity in the features.
        """
        if not self.training:
            return self.means.clone()
        if targets is None:
            raise MissingTargetsError(
                "FeatureMovingAverage needs targets in training: call average(features, targets), "
                "or average.eval() to read the stored means"
            )
        state = self.propose(features, targets)
        self.commit(state)
        return state.means

    def refuse(self, error: EtfLayersError) -> NoReturn:
        """Raise ``error``, after telling the other ranks, which would wait for this one's sums."""
        if self._distributed:
            self._summed_over_ranks(None, None, None)
        raise error

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget everything: no class has been seen."""
        self.means.zero_()
        self.counts.zero_()
        self.updates.zero_()

    def propose(self, features: Tensor, targets: Tensor) -> AverageState:
        """The state after one more batch, differentiable in ``features``, without storing it.

        Raises:
            RecomputationError: this is the second forward pass of gradient checkpointing.
        """
        self._require_first_pass()
        try:
            return self._proposed(features, targets)
        except RanksDisagreeError:
            raise
        except EtfLayersError as error:
            self.refuse(error)

    def _proposed(self, features: Tensor, targets: Tensor) -> AverageState:
        if features.shape[-1:] != (self.in_features,):
            raise InvalidArgumentError(
                f"features must have shape (..., in_features) = (..., {self.in_features}), "
                f"got {tuple(features.shape)}"
            )
        soft = are_soft(targets)
        if soft:
            require_soft_shape(targets, features.shape[:-1], self.num_classes)  # class_sums looks at values
            require(
                self.momentum is not None,
                "soft targets have shares of samples, of which momentum=None would need the sum over all "
                "batches, and counts holds whole samples: take a number or '2/(t+1)'",
            )
            require(self._shard is None, "soft targets have shares of all classes: leave class_range out")
        elif targets.shape != features.shape[:-1]:
            raise InvalidArgumentError(
                f"targets must have the leading shape of features, {tuple(features.shape[:-1])}, "
                f"got {tuple(targets.shape)}. Where a model pools after this layer, give the target to the "
                f"position that is pooled, and ignore_index={self.ignore_index} to the others"
            )
        features = features.reshape(-1, self.in_features)
        targets = targets.reshape(-1, self.num_classes) if soft else targets.reshape(-1)
        ignore_index = self.ignore_index
        if self._shard is not None:
            targets, ignore_index = _among(self._shard, targets, ignore_index), -1
            if len(self._shard) == 0:  # no means, but a graph, so that all ranks have a backward pass
                return AverageState(self.means + features[:0], self.counts, self.updates)
        if not soft and not self._distributed and averages_use_triton(features, self.means):
            # Sums, counts, all checks and the update in one launch.
            require_class_indices(targets)
            require_same_device(features, targets)
            return AverageState(
                *class_averages(
                    features,
                    targets,
                    self.means,
                    self.counts,
                    self.updates,
                    ignore_index,
                    self.momentum,
                )
            )
        sums, mass = class_sums(features, targets, len(self.means), ignore_index=ignore_index)
        samples = (targets > 0).sum(0) if soft else mass
        if self._distributed:
            sums, mass, samples = self._summed_over_ranks(sums, mass, samples)
        batch_means = sums / torch.where(mass > 0, mass, 1).unsqueeze(-1)
        steps = momentum_steps(self.momentum, mass, self.counts, self.updates, batch_means.dtype)
        step = steps.unsqueeze(-1)
        return AverageState(
            means=self.means + step * (batch_means - self.means),
            counts=self.counts + samples,
            updates=self.updates + (samples > 0),
        )

    def commit(self, state: AverageState) -> None:
        """Store state; the buffers themselves are never part of a graph."""
        with torch.no_grad():
            self.means.copy_(state.means)
            self.counts.copy_(state.counts)
            self.updates.copy_(state.updates)
        if is_concrete(self.means):
            self._committed = stamp(self.means)

    def _require_first_pass(self) -> None:
        # Another run of the same pass would start from the averages after it, and update them once more.
        # Where a caller hands in the averages of before (functional_call), these are other tensors.
        again = is_concrete(self.means) and inside_backward() and stamp(self.means) == self._committed
        if again:
            raise RecomputationError(
                "a training pass of FeatureMovingAverage, or of a head with one, runs a second time, inside "
                "a backward pass, as gradient checkpointing does: its gradient would be that of other class "
                "means. Keep it outside of torch.utils.checkpoint; the body of the model may stay inside"
            )

    @property
    def _distributed(self) -> bool:
        distributed = self.synchronize and world_size(self.process_group) > 1
        require(
            not distributed or self._shard is None or self.process_group is not None,
            "process_group must name the ranks with other samples where class_range is given, or synchronize "
            "be False: the default, all ranks, would add the sums of different classes",
        )
        return distributed

    def _summed_over_ranks(
        self, sums: Tensor | None, mass: Tensor | None, samples: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums, mass and samples of all ranks in one collective; ``None`` says that this rank has failed."""
        like = self.means
        failed = sums is None or mass is None or samples is None
        if sums is None or mass is None or samples is None:
            sums, mass, samples = torch.zeros_like(like), self.counts, self.counts
        # Counts below 2^24 are exact in float32. The same dtype on every rank, whatever its features have.
        columns = (sums, mass.unsqueeze(-1), samples.unsqueeze(-1))
        packed = torch.cat([column.to(like.dtype) for column in columns], dim=-1)
        flag = packed.new_full((1, packed.shape[-1]), float(failed))
        packed = all_reduce_sum(torch.cat((packed, flag)), self.process_group)
        if not failed:
            require_values(
                packed[-1, 0].detach() == 0,
                "another rank refused its batch, and says why; this rank could not go on alone",
                RanksDisagreeError,
            )
        return packed[:-1, :-2], packed[:-1, -2], packed[:-1, -1].detach().to(torch.int64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        faults = [
            f"{prefix}{name} {fault}"
            for name in ("means", "counts", "updates")
            if (fault := _fault(state_dict.get(prefix + name), whole=name != "means")) is not None
        ]
        error_msgs += faults
        if not faults:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process_group": None, "_committed": None}

    def extra_repr(self) -> str:
        """The arguments."""
        shown = f"in_features={self.in_features}, num_classes={self.num_classes}, momentum={self.momentum!r}"
        return shown if self._shard is None else f"{shown}, class_range={self.class_range}"


def _among(shard: ClassShard, targets: Tensor, ignore_index: int) -> Tensor:
    """Targets counted from the first class of the shard; -1 for what is ignored or in another shard."""
    ignored = ignored_targets(targets, shard.num_classes, ignore_index)
    targets = targets.long()
    own = (targets >= shard.start) & (targets < shard.stop) & ~ignored
    return torch.where(own, targets - shard.start, -1)


def _fault(stored: Tensor | None, *, whole: bool) -> str | None:
    """Why an entry of a state dict cannot be means or, if ``whole``, numbers of samples or batches."""
    if stored is None or not is_concrete(stored) or stored.is_meta or stored.numel() == 0:
        return None
    if not whole:
        finite = bool(torch.isfinite(stored).all())
        return None if finite else "must be finite: the run that saved them has diverged"
    if stored.is_floating_point() or stored.is_complex():
        return f"must be integers, got {stored.dtype}"
    lowest = int(stored.amin())
    return None if lowest >= 0 else f"must not be negative, got {lowest}: no class has been seen so often"
