"""The head whose frame is the simplex ETF nearest to the class means of the features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers.adjoints import Adjoint
from etflayers.checks import require, require_floating
from etflayers.errors import MissingTargetsError
from etflayers.functional.nearest import nearest_etf
from etflayers.geometry import is_simplex_etf, simplex_etf
from etflayers.nn.averages import ClassStatistics, FeatureMovingAverage, Momentum, keep_precision
from etflayers.nn.heads import ETFHead
from etflayers.precision import full_precision, working_dtype
from etflayers.solvers import FrameSolver, StiefelSolver

__all__ = ["NearestETFHead"]


class NearestETFHead(ETFHead):
    r"""Classifier whose weight is the simplex ETF nearest to the class means: ``logits = s (z - m) W'``.

    A training pass, with features and targets,

    1. updates the running class means X (:class:`~etflayers.nn.FeatureMovingAverage` of the inputs z),
    2. finds the frame nearest to them, with weights ``omega_k`` = class weight, 0 for classes never seen,
       ``W = argmin sum_k omega_k |x_k / r - w_k - t|^2 + delta |W - A|^2``,
    3. takes as center m the mean of the running means over the classes seen (each class counts the same, and
       no eval batch has a say in it).

    The length r makes delta, the ``proximity``, a pure number: with ``Y = diag(omega)(X - weighted mean)`` it
    is the root of the mean squared length of the rows of Y of the classes with positive weight (not less than
    ``eps sqrt(d) max|X|``, below which there is only rounding); 1 if delta = 0, where it has no effect. The
    anchor A makes W unique, and its gradient bounded, where means coincide or classes have not been seen.

    The loss reaches the features along two paths: through z, and through W and m. ``detach=True`` cuts the
    second.

    In eval mode, and for what a checkpoint needs, everything is in buffers: no targets, a batch of one is
    fine, and a resumed run continues with the same numbers. A training pass changes them, under
    ``torch.no_grad`` too, as in BatchNorm. Gradient checkpointing would run it twice: keep the head outside.

    The defaults come from a sweep on images and on free features (``docs/study.md``). ``normalize=True`` with
    ``scale=5`` collapses further at the same accuracy, and later; the other options matter less.

    Args:
        in_features: d >= K - 1.
        num_classes: K >= 2.
        scale: s > 0, multiplies the logits (inverse temperature).
        normalize: whether to divide each feature vector by its length.
        momentum: of the class means: see :class:`~etflayers.nn.FeatureMovingAverage`.
        center: whether to subtract m.
        proximity: delta >= 0, relative as described above.
        anchor: A: ``"previous"``, the frame of the step before; ``"initial"``, the frame at the start; or a
            simplex ETF ``(K, d)``, which is then also the frame at the start.
        detach: whether to treat W and m as constants in the backward pass.
        class_weights: ``(K,)``, not negative; default all 1.
        ignore_index: target of the samples that do not enter the means (they still get logits).
        synchronize: whether to form the means over all ranks when ``torch.distributed`` is initialized.
        process_group: the ranks; default all. Copies and pickles start with the default group.
        solver: see :func:`~etflayers.functional.nearest_etf`.
        adjoint: see :func:`~etflayers.functional.nearest_etf`.
        generator: random numbers of the frame at the start, which is Haar distributed.
        device: of the buffers.
        dtype: of the buffers: float32 (also where a half precision is asked for) or float64. ``half()`` and
            ``bfloat16()`` leave it.

    Attributes:
        averages: the :class:`~etflayers.nn.FeatureMovingAverage`.
        frame: W, ``(K, d)``.
        center: m, ``(d,)``; ``None`` with ``center=False``.
        anchor: A, ``(K, d)``; ``None`` with ``anchor="previous"``, where it is ``frame``.
        class_weights: ``(K,)`` or ``None``.

    Raises:
        InvalidArgumentError: an argument out of its range.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> head = NearestETFHead(in_features=4, num_classes=3, generator=torch.Generator().manual_seed(0))
    >>> features = torch.eye(3, 4, requires_grad=True)
    >>> logits = head(features, targets=torch.arange(3))
    >>> logits.argmax(-1)
    tensor([0, 1, 2])
    >>> head.eval()(features[:1]).argmax(-1)
    tensor([0])
    """

    averages: FeatureMovingAverage
    frame: Tensor
    center: Tensor | None
    anchor: Tensor | None
    class_weights: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 1.0,
        normalize: bool = False,
        momentum: Momentum = 0.1,
        center: bool = True,
        proximity: float = 1e-3,
        anchor: Literal["previous", "initial"] | Tensor = "previous",
        detach: bool = False,
        class_weights: Tensor | None = None,
        ignore_index: int = -100,
        synchronize: bool = True,
        process_group: dist.ProcessGroup | None = None,
        solver: FrameSolver | StiefelSolver | None = None,
        adjoint: Adjoint | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        require(0 <= proximity < float("inf"), f"proximity must be a finite number >= 0, got {proximity}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        dtype = working_dtype(dtype)
        self.proximity = proximity
        self.detach = detach
        self.solver = solver
        self.adjoint = adjoint
        self.averages = FeatureMovingAverage(
            in_features,
            num_classes,
            momentum=momentum,
            ignore_index=ignore_index,
            synchronize=synchronize,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        if isinstance(anchor, Tensor):
            frame = _checked_anchor(anchor, num_classes, in_features).to(device, dtype, copy=True)
        else:
            require(
                anchor in ("previous", "initial"),
                f"anchor must be 'previous', 'initial' or a tensor, got {anchor!r}",
            )
            frame = simplex_etf(
                num_classes, in_features, rotation="haar", generator=generator, device=device, dtype=dtype
            )
        follows = isinstance(anchor, str) and anchor == "previous"
        self.register_buffer("frame", frame)
        self.register_buffer("anchor", None if follows else frame.clone())
        self.register_buffer("center", frame.new_zeros(in_features) if center else None)
        if class_weights is not None:
            class_weights = _checked_class_weights(class_weights, num_classes).to(device, dtype, copy=True)
        self.register_buffer("class_weights", class_weights)
        # Set by provide_targets for the forward passes inside it.
        self._provided_targets: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frame W after the latest training pass, ``(K, d)``, unit rows."""
        return self.frame

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of a batch; in training the frame follows the batch first.

        Args:
            features: ``(..., d)``; finite in training.
            targets: ``(...)``, integers in [0, K) or ``ignore_index``; in training needed, here or from
                :func:`~etflayers.nn.provide_targets` (these win); not used in eval mode.

        Returns:
            ``(..., K)``.

        Raises:
            MissingTargetsError: training without targets.
            InvalidArgumentError: shapes or dtypes that do not fit, targets out of range.
            NonFiniteError: NaN or infinity in the features.
        """
        return super().forward(features, targets)

    def _linear_form(self, features: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = self._inputs(features)
        if not self.training:
            # A graph keeps the frame for its backward pass, and the next training pass overwrites the buffer.
            keeps_graph = torch.is_grad_enabled() and inputs.requires_grad
            return inputs, self.frame.clone() if keeps_graph else self.frame, self.center
        targets = self._provided_targets if targets is None else targets
        if targets is None:
            raise MissingTargetsError(
                "NearestETFHead needs targets in training: call head(features, targets), wrap the forward "
                "pass of the model in `with etflayers.provide_targets(model, targets):`, or call .eval()"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach), full_precision(inputs):
            statistics = self.averages.propose(inputs, targets)
            seen = statistics.counts > 0
            frame = self._nearest(statistics.means, seen)
            center = None if self.center is None else _mean_over(statistics.means, seen)
        # Nothing is stored before everything has been checked and computed.
        self._commit(statistics, frame, center)
        return inputs, frame, center

    def _nearest(self, means: Tensor, seen: Tensor) -> Tensor:
        weights = seen.to(means.dtype)
        if self.class_weights is not None:
            weights = weights * self.class_weights
        if self.proximity == 0:
            return nearest_etf(means, weights=weights, solver=self.solver, adjoint=self.adjoint)
        return nearest_etf(
            _to_unit_spread(means, weights),
            weights=weights,
            anchor=self.frame if self.anchor is None else self.anchor,
            proximity=self.proximity,
            solver=self.solver,
            adjoint=self.adjoint,
        )

    @torch.no_grad()
    def _commit(self, statistics: ClassStatistics, frame: Tensor, center: Tensor | None) -> None:
        self.averages.commit(statistics)
        self.frame.copy_(frame)
        if self.center is not None and center is not None:
            self.center.copy_(center)

    @property
    def _center(self) -> Tensor | None:
        return self.center

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NearestETFHead:
        super()._apply(keep_precision(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_provided_targets": None}

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, proximity={self.proximity}, detach={self.detach}"


def _mean_over(means: Tensor, seen: Tensor) -> Tensor:
    """Mean of the rows that have been seen; 0 if there are none."""
    return (means * seen.unsqueeze(-1)).sum(0) / seen.sum().clamp(min=1)


def _to_unit_spread(means: Tensor, weights: Tensor) -> Tensor:
    """The centered means divided by r, the root-mean-square length of their weighted rows."""
    info = torch.finfo(means.dtype)
    column = weights.unsqueeze(-1)
    # In units of the largest entry no square overflows or vanishes. The unit is a constant: r takes it back.
    unit = means.detach().abs().amax().clamp(min=info.tiny)
    rows = means / unit
    rows = rows - (column * rows).sum(0) / weights.sum().clamp(min=info.tiny)
    present = (weights > 0).sum().clamp(min=1).to(rows.dtype)
    spread = torch.linalg.vector_norm(column * rows) / present.sqrt()
    scaled: Tensor = rows / spread.clamp(min=info.eps * means.shape[-1] ** 0.5)
    return scaled


def _checked_anchor(anchor: Tensor, num_classes: int, in_features: int) -> Tensor:
    require(
        anchor.shape == (num_classes, in_features),
        f"anchor must have shape (num_classes, in_features) = ({num_classes}, {in_features}), "
        f"got {tuple(anchor.shape)}",
    )
    is_etf = is_simplex_etf(anchor)
    require(
        is_etf.ok,
        f"anchor must be a simplex ETF, but {is_etf.reason}: apply etflayers.nearest_etf to it first",
    )
    return anchor.detach()


def _checked_class_weights(class_weights: Tensor, num_classes: int) -> Tensor:
    require(
        class_weights.shape == (num_classes,),
        f"class_weights must have shape (num_classes,) = ({num_classes},), got {tuple(class_weights.shape)}",
    )
    values = class_weights.detach().double()
    require(
        bool((values >= 0).all() & torch.isfinite(values).all() & (values > 0).any()),
        f"class_weights must be finite, not negative and not all zero, got {class_weights.tolist()}",
    )
    return class_weights.detach()
