r"""Heads whose classes are divided among the ranks of a process group.

Symbols: W_r <-> rows, the K_r rows of the frame that belong to the classes of this rank.

Two kinds of heads differ in what a rank has to store:

- A frame whose rows are independent of each other, constant or learned row by row, is stored in shards: a
  rank has its K_r rows and no other. The canonical simplex ETF is stored nowhere.
- Any other frame depends on all classes at once. Each rank has all that it comes from and makes all of it,
  and then takes its rows for its own logits. Only the logits are divided, and the gradient in the frame, of
  which each rank has its own rows, is summed over the ranks, so that every rank goes on with the whole.

:class:`~etflayers.nn.ClassParallel` turns a head into one of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers._torch import is_concrete, stamp
from etflayers.checks import require_values
from etflayers.collectives import ClassShard, all_reduce_sum, local_part, summed_backward
from etflayers.errors import InvalidArgumentError, ManifoldError
from etflayers.functional.active import DROP
from etflayers.functional.logits import directions
from etflayers.geometry import centered_basis_adjoint, etf_radius, simplex_etf
from etflayers.geometry.tolerance import default_atol
from etflayers.nn.base import CodeHead, LogitTerms
from etflayers.nn.distributed import gathered, overwrite
from etflayers.nn.fixed import FixedETFHead
from etflayers.nn.fixed_code import FixedCodeHead
from etflayers.nn.unit_rows import UnitRowHead
from etflayers.precision import full_precision, linear_dtype, working_dtype

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ShardedHead", "sharded_kind"]


class ShardedHead(CodeHead):
    """What a head is besides its own class once its classes are divided; here, if all ranks make its frame.

    Attributes:
        class_shard: the classes of this rank.
        class_mesh: the device mesh of the ranks, with one dimension.
    """

    # Names of the parameters (K, ...) of which a rank stores its rows.
    stored_rows: tuple[str, ...] = ()

    class_shard: ClassShard
    class_mesh: DeviceMesh

    def keep_rows(self) -> None:
        """Forget what belongs to the classes of other ranks and is no parameter."""

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits ``(..., K)`` of a batch that all ranks have: a ``DTensor``, sharded by class.

        See :meth:`CodeHead.forward`. ``torch.distributed.tensor.parallel.loss_parallel`` takes the logits as
        they are, and ``logits.full_tensor()`` gives all of them to every rank.
        """
        from torch.distributed.tensor import DTensor, Shard

        features = gathered(features)
        logits = self.of_active(self.local_logits(features, targets), targets)
        logits = logits.to(linear_dtype(features)).contiguous()
        shape = (*logits.shape[:-1], self.num_classes)
        stride = [1] * len(shape)
        for axis in range(len(shape) - 1, 0, -1):
            stride[axis - 1] = stride[axis] * max(shape[axis], 1)
        sharded: Tensor = DTensor.from_local(
            logits,
            self.class_mesh,
            [Shard(len(shape) - 1)],
            run_check=False,
            shape=torch.Size(shape),
            stride=tuple(stride),
        )
        return sharded

    def local_logits(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """The logits ``(..., K_r)`` of the classes of this rank."""
        inputs, rows, center = self.local_terms(features, targets)
        inputs = inputs if center is None else inputs - center
        if isinstance(self.scale, Tensor):  # before the classes part, so that its gradient has all of them
            inputs = self.scale * inputs.to(working_dtype(inputs.dtype))
        inputs = summed_backward(inputs, self.class_shard.process_group)
        dtype = torch.promote_types(inputs.dtype, rows.dtype)
        logits = F.linear(inputs.to(dtype), rows.to(dtype))
        return logits if isinstance(self.scale, Tensor) else self.scale * logits

    def local_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        """As :meth:`CodeHead.logit_terms`, with the rows W_r ``(K_r, d)`` of this rank for the frame."""
        inputs, frame, center = self.logit_terms(features, targets)
        rows = summed_backward(frame, self.class_shard.process_group)[self.class_shard.rows]
        return LogitTerms(inputs, rows, center)

    def _masked(self, logits: Tensor, active: Tensor) -> Tensor:
        """Logits ``(..., K_r)`` of this rank: the mean, of which D is subtracted, is that of all ranks."""
        own = active[self.class_shard.rows]
        total = torch.where(own, logits, 0).sum(-1, keepdim=True, dtype=working_dtype(logits.dtype))
        mean = all_reduce_sum(total, self.class_shard.process_group) / active.sum()
        return torch.where(own, logits, (mean - DROP).to(logits.dtype))

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise _refusal(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _refusal(self)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, classes={self.class_shard.start}:{self.class_shard.stop}"


class ShardedUnitRows(ShardedHead):
    """The rows of a :class:`UnitRowHead`: a parameter of which each rank has its own."""

    stored_rows = ("prototypes",)

    prototypes: Tensor

    def local_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        """See :meth:`ShardedHead.local_terms`."""
        return LogitTerms(self.inputs(features), directions(local_part(self.prototypes)))


class ShardedVertices(ShardedHead):
    """The rows of a :class:`FixedETFHead` with a matrix: a buffer of which each rank has its own.

    The buffer is an ordinary tensor ``(K_r, d)``, because ``DistributedDataParallel`` sends buffers around
    and cannot do that with a ``DTensor``. A state dict holds the ``DTensor`` with the same memory.
    """

    rotation: str
    vertices: Tensor
    _trusted: tuple[int, int] | None

    def keep_rows(self) -> None:
        """Forget the rows of all classes but those of this rank."""
        self.vertices = self.vertices[self.class_shard.rows].clone()
        self._trusted = stamp(self.vertices) if is_concrete(self.vertices) else None

    def local_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        """See :meth:`ShardedHead.local_terms`."""
        return LogitTerms(self.inputs(features), self._trusted_rows())

    @property
    def frame(self) -> Tensor:
        """W, ``(K, d)``, unit rows, gathered from all ranks, which all have to ask for it."""
        self._trusted_rows()
        return gathered(self._whole())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """See :meth:`FixedETFHead.reset_parameters`."""
        if self.rotation != "given":
            frame = simplex_etf(
                self.num_classes,
                self.in_features,
                rotation="haar",
                device=self.vertices.device,
                dtype=self.vertices.dtype,
            )
            overwrite(self._whole(), frame)
        self._trusted = None
        self._trusted_rows()

    def _whole(self) -> Tensor:
        """W as a ``DTensor``, in the memory of the rows."""
        from torch.distributed.tensor import DTensor, Shard

        whole: Tensor = DTensor.from_local(
            self.vertices,
            self.class_mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size((self.num_classes, self.in_features)),
            stride=(self.in_features, 1),
        )
        return whole

    def _trusted_rows(self) -> Tensor:
        """W_r, looked at once after each change by others: W_r W_r' is a block of ``c^2 (I - 11'/K)``.

        An average of frames is not made one again, as in a head with all rows: that needs all of them.
        """
        rows = self.vertices
        if not is_concrete(rows) or stamp(rows) == self._trusted:
            return rows
        with torch.no_grad(), full_precision(rows):
            wide = rows.to(working_dtype(rows.dtype))
            others = 1 / (self.num_classes - 1)
            expected = (1 + others) * torch.eye(len(rows), dtype=wide.dtype, device=wide.device) - others
            gap = (wide @ wide.mT - expected).abs()
            tolerance = max(default_atol(torch.float32), default_atol(rows.dtype))
        require_values(
            (gap <= tolerance).all(),
            "the rows of FixedETFHead on this rank have been overwritten with something that is no part of a "
            "simplex ETF (after to_empty() they hold whatever was in memory, and an average of frames is "
            "none): call head.reset_parameters() on every rank, or load a checkpoint that holds the frame",
            ManifoldError,
        )
        self._trusted = stamp(rows)
        return rows

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "vertices"] = self._whole()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "vertices")
        if stored is not None:
            rows = stored.to_local() if hasattr(stored, "to_local") else stored[self.class_shard.rows]
            state_dict = {**state_dict, prefix + "vertices": rows}
        super()._load_from_state_dict(state_dict, prefix, *args)


class ShardedCanonical(ShardedHead):
    """The canonical :class:`FixedETFHead`: a slice of the features of each sample, and their mean."""

    def local_logits(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """See :meth:`ShardedHead.local_logits`."""
        inputs = self.inputs(features)
        with full_precision(inputs):
            rows = self.scale * inputs.to(working_dtype(inputs.dtype))
            if self.in_features == self.num_classes - 1:
                rows = centered_basis_adjoint(rows.unsqueeze(-1)).squeeze(-1)
            rows = summed_backward(rows[..., : self.num_classes], self.class_shard.process_group)
            own = rows[..., self.class_shard.rows]
            return etf_radius(self.num_classes) * (own - rows.mean(-1, keepdim=True))


class ShardedCode(ShardedHead):
    """A :class:`FixedCodeHead` with a formula: each rank makes the words of its own classes, in each pass."""

    def local_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        """See :meth:`ShardedHead.local_terms`."""
        inputs, code = self.inputs(features), self.code
        assert code is not None
        index = torch.arange(self.class_shard.start, self.class_shard.stop, device=inputs.device)
        return LogitTerms(inputs, code.words(index, dtype=working_dtype(inputs.dtype)))


def sharded_kind(head: CodeHead) -> type[ShardedHead]:
    """Which kind of sharded head a head becomes.

    Raises:
        InvalidArgumentError: a head that makes its logits in a way of its own.
    """
    kind = type(head)
    if kind.forward not in (CodeHead.forward, FixedETFHead.forward, FixedCodeHead.forward):
        raise InvalidArgumentError(
            f"{kind.__name__} has a forward of its own: its classes can be divided among ranks only if its "
            "logits are s (z - m) W', those of CodeHead.forward; override frame or logit_terms instead"
        )
    own_terms = kind.logit_terms is not CodeHead.logit_terms
    if isinstance(head, UnitRowHead) and kind.frame is UnitRowHead.frame and not own_terms:
        return ShardedUnitRows
    if isinstance(head, FixedETFHead) and kind.frame is FixedETFHead.frame and not own_terms:
        return ShardedCanonical if head.canonical else ShardedVertices
    return ShardedCode if head.code is not None and not own_terms else ShardedHead


def _refusal(head: CodeHead) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"a head whose classes are divided among ranks ({type(head).__name__}) can be neither copied nor "
        "pickled, because it refers to these ranks: save it by torch.distributed.checkpoint, and copy the "
        "model before parallelize_module"
    )
