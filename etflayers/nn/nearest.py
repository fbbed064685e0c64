r"""The head whose frame is the simplex ETF nearest to the class means of the features.

Symbols: X <-> averages.means, omega <-> weights, W <-> vertices, A <-> anchor, m <-> global_mean,
delta <-> proximity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from etflayers.adjoints import Adjoint
from etflayers.checks import reads_values, require, require_flag, require_floating, require_number
from etflayers.errors import EtfLayersError
from etflayers.geometry import is_simplex_etf, simplex_etf
from etflayers.kernels.class_sums.momentum import PUBLISHED_SCHEDULE
from etflayers.nn.averages import FeatureMovingAverage, Momentum
from etflayers.nn.base import LogitTerms
from etflayers.nn.distributed import overwrite
from etflayers.nn.etf import ETFHead
from etflayers.nn.keeps_precision import KeepsPrecision
from etflayers.nn.rules import FrameRule, HuberNearestETF, MahalanobisNearestETF, NearestETF
from etflayers.precision import full_precision, working_dtype
from etflayers.solvers import FrameSolver, StiefelSolver

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["NearestETFHead"]


class NearestETFHead(KeepsPrecision, ETFHead):
    r"""Classifier whose weight is the simplex ETF nearest to the class means: ``logits = s (z - m) W'``.

    A training pass, with features and targets,

    1. updates the running class means X (:class:`~etflayers.nn.FeatureMovingAverage` of the inputs z),
    2. finds the frame nearest to them by its ``rule``, with weights ``omega_k`` = class weight, 0 for classes
       never seen; plainly ``W = argmin sum_k omega_k |x_k / r - w_k - t|^2 + delta |W - A|^2``,
    3. takes as center m the mean of the running means over the classes seen (each class counts the same, and
       no eval batch has a say in it).

    The length r (see :func:`~etflayers.functional.unit_spread`) makes delta, the ``proximity``, a pure
    number. The anchor A makes W unique, and its gradient bounded, where means coincide or classes have not
    been seen; with ``proximity=0`` the frame depends there on the order of the classes and of the batch.

    The loss reaches the features along two paths: through z, and through W and m. ``detach=True`` cuts the
    second.

    In eval mode, and for what a checkpoint needs, everything is in buffers: no targets, a batch of one is
    fine, and a resumed run continues with the same numbers. A training pass changes them, under
    ``torch.no_grad`` too, as in BatchNorm. Gradient checkpointing, which would run it
    twice, is refused: keep the head outside.

    Averages of models (EMA or SWA with their buffers) average frames, and an average of ETFs is none. The
    head makes it one again before it uses it: the nearest ETF to the average (eagerly; a compiled eval pass
    takes the frame as it is).

    The defaults come from a sweep on images and on free features (``docs/evidence/study.md``); those of the
    paper are :meth:`published`. ``normalize=True`` with ``scale=5`` collapses further at the same
    accuracy, and later; the other options matter less.

    Args:
        in_features: d >= K - 1.
        num_classes: K >= 2.
        scale: s > 0, multiplies the logits (inverse temperature); an ``nn.Parameter`` learns.
        normalize: whether to divide each feature vector by its length.
        momentum: of the class means: see :class:`~etflayers.nn.FeatureMovingAverage`.
        center: whether to subtract m.
        proximity: delta >= 0, relative as described above.
        rule: how W comes from the means: :class:`~etflayers.nn.NearestETF` (the default),
            :class:`~etflayers.nn.MahalanobisNearestETF`, :class:`~etflayers.nn.HuberNearestETF`, or any
            module or function with the signature of :class:`~etflayers.nn.FrameRule` that returns a simplex
            ETF.
        anchor: A: ``"previous"``, the frame of the step before; ``"initial"``, the frame at the start; or a
            simplex ETF ``(K, d)``, which is then also the frame at the start.
        detach: whether to treat W and m as constants in the backward pass.
        class_weights: ``(K,)``, not negative; default all 1.
        ignore_index: target of the samples that do not enter the means (they still get logits).
        synchronize: whether to form the means over all ranks when ``torch.distributed`` is initialized.
        process_group: the ranks; default all. Copies and pickles start with the default group.
        solver: of the default rule: see :func:`~etflayers.functional.nearest_etf`.
        adjoint: of the default rule: see :func:`~etflayers.functional.nearest_etf`.
        generator: random numbers of the frame at the start, which is Haar distributed.
        device: of the buffers.
        dtype: of the buffers: float32 (also where a half precision is asked for) or float64. ``half()`` and
            ``bfloat16()`` leave it.

    Attributes:
        averages: the :class:`~etflayers.nn.FeatureMovingAverage`.
        vertices: W after the latest training pass, ``(K, d)``.
        global_mean: m, ``(d,)``; ``None`` with ``center=False``.
        anchor: A, ``(K, d)``; ``None`` with ``anchor="previous"``, where it is ``vertices``.
        rule: the frame rule; its parameters, if it has any, are those of the head.
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

    accepts_targets = True
    renamed_state: ClassVar = {"frame": "vertices", "centre": "global_mean"}

    averages: FeatureMovingAverage
    vertices: Tensor
    global_mean: Tensor | None
    anchor: Tensor | None
    class_weights: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        momentum: Momentum = 0.1,
        center: bool = True,
        proximity: float = 1e-3,
        rule: FrameRule | None = None,
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
        require_number("proximity", proximity)
        require_flag("center", center)
        require_flag("detach", detach)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        dtype = working_dtype(dtype)
        require(
            rule is None or (solver is None and adjoint is None),
            "solver and adjoint belong to the default rule: give them to the rule that you pass, or leave "
            "rule out",
        )
        require(rule is None or callable(rule), f"rule must be callable, got {rule!r}")
        self.proximity = proximity
        self.detach = detach
        self.rule: FrameRule = NearestETF(solver=solver, adjoint=adjoint) if rule is None else rule
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
        self.register_buffer("vertices", frame)
        self.register_buffer("anchor", None if follows else frame.clone())
        self.register_buffer("global_mean", frame.new_zeros(in_features) if center else None)
        if class_weights is not None:
            class_weights = _checked_class_weights(class_weights, num_classes).to(device, dtype, copy=True)
        self.register_buffer("class_weights", class_weights)
        self.trust(frame)
        # What `to_empty` takes from the buffers and no random number can give back.
        self._given_anchor = frame.clone() if isinstance(anchor, Tensor) else None
        self._given_weights = None if class_weights is None else class_weights.clone()

    @classmethod
    def published(
        cls,
        in_features: int,
        num_classes: int,
        *,
        temperature: float = 5.0,
        delta: float = 1e-3,
        **options: Any,
    ) -> Self:
        r"""The head with the settings of the paper, whose numbers mean something else than ours.

        The paper multiplies normalized features by tau and finds ``argmin_U |H - U E|^2 + delta/2 |U - P|^2``
        over U with K orthonormal columns: H are the centered means with ``|H|_F = 1``, P is the U of the step
        before and ``E = (I - 11'/K) / sqrt(K - 1)``. Its frame is ``W' = sqrt(K) U E``, so that ``<H, UE>``
        is ``<X / r, W> / K`` and, but for the direction of U that E does not see, ``<P, U>`` is
        ``(K - 1) <A, W> / K``. Both objectives then agree for ``proximity = delta (K - 1) / 2``.

        See ``docs/moving/migration.md`` for what differs on purpose.

        Args:
            in_features: d >= K - 1.
            num_classes: K >= 2.
            temperature: tau > 0, the scale of the head.
            delta: weight of the paper's proximal term, >= 0.
            options: any other argument of the head.

        Raises:
            InvalidArgumentError: as the class.

        Reference:
            Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

        >>> head = NearestETFHead.published(in_features=512, num_classes=100)
        >>> head.scale, head.normalize, head.averages.momentum, head.proximity
        (5.0, True, '2/(t+1)', 0.0495)
        """
        require_number("delta", delta)
        settings: dict[str, Any] = {"normalize": True, "momentum": PUBLISHED_SCHEDULE, "center": False}
        settings |= {"scale": temperature, "proximity": delta * (num_classes - 1) / 2}
        return cls(in_features, num_classes, **(settings | options))

    @property
    def frame(self) -> Tensor:
        """W after the latest training pass, ``(K, d)``, unit rows."""
        return self.trusted(self.vertices)

    @property
    def center(self) -> Tensor | None:
        """m after the latest training pass, ``(d,)``; ``None`` with ``center=False``."""
        return self.global_mean

    def logit_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        """z, W and m of the logits ``s (z - m) W'``; in training W and m follow the batch first.

        Args:
            features: ``(..., d)``; finite in training.
            targets: ``(...)``, integers in [0, K) or ``ignore_index``, or soft targets ``(..., K)``, floating
                point, with rows that sum to 1; in training needed, here or from
                :func:`~etflayers.nn.provide_targets` (these win); not used in eval mode.

        Raises:
            MissingTargetsError: training without targets.
            InvalidArgumentError: shapes or dtypes that do not fit, targets out of range, or a rule whose
                frame is not a simplex ETF.
            NonFiniteError: NaN or infinity in the features.
            RecomputationError: this is the second forward pass of gradient checkpointing.
            RanksDisagreeError: another rank has refused its batch.
        """
        if not self.training:
            inputs = self.inputs(features)
            return LogitTerms(inputs, self._frame_beside(inputs), self.global_mean)
        try:
            inputs, targets = self.inputs(features), self.require_targets(targets, self.averages.ignore_index)
        except EtfLayersError as error:
            self.averages.refuse(error)
        frame = self._frame_beside(inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach), full_precision(inputs):
            state = self.averages.propose(inputs, targets)
            seen = state.counts > 0
            weights = seen.to(state.means.dtype)
            if self.class_weights is not None:
                weights = weights * self.class_weights
            frame = self.rule(
                state.means,
                weights=weights,
                anchor=frame if self.anchor is None else self.anchor,
                proximity=self.proximity,
            )
            self._check(frame)
            center = None if self.global_mean is None else _mean_over(state.means, seen)
        # Nothing is stored before everything has been checked and computed.
        self.averages.commit(state)
        self._commit(frame, center)
        return LogitTerms(inputs, frame, center)

    def _frame_beside(self, inputs: Tensor) -> Tensor:
        """W, in a copy where a graph will keep it: a training pass overwrites the buffer."""
        keeps_graph = torch.is_grad_enabled() and inputs.requires_grad
        return self.frame.clone() if keeps_graph else self.frame

    def _check(self, frame: Tensor) -> None:
        """Raise unless the frame of a rule that is not ours is a simplex ETF."""
        if isinstance(self.rule, (NearestETF, MahalanobisNearestETF, HuberNearestETF)):
            return
        require(
            isinstance(frame, Tensor) and frame.shape == self.vertices.shape,
            f"rule must return a frame of shape (num_classes, in_features) = {tuple(self.vertices.shape)}, "
            f"got {tuple(frame.shape) if isinstance(frame, Tensor) else type(frame).__name__}",
        )
        if reads_values(frame):
            is_etf = is_simplex_etf(frame)
            require(
                is_etf.ok,
                f"rule must return a simplex ETF, but {is_etf.reason}: apply etflayers.nearest_etf to it",
            )

    @torch.no_grad()
    def _commit(self, frame: Tensor, center: Tensor | None) -> None:
        self.vertices.copy_(frame)
        self.trust(self.vertices)
        if self.global_mean is not None and center is not None:
            self.global_mean.copy_(center)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget all class means; the frame is the anchor that was given, or is drawn anew.

        Under ``torch.distributed`` all ranks call it, and get the frame that the first one draws.
        """
        frame = self._given_anchor
        if frame is None:
            frame = simplex_etf(
                self.num_classes,
                self.in_features,
                rotation="haar",
                device=self.vertices.device,
                dtype=self.vertices.dtype,
            )
        super().reset_parameters()
        self.averages.reset_parameters()
        overwrite(self.vertices, frame.to(self.vertices.device))
        self.trust(self.vertices)
        if self.class_weights is not None and self._given_weights is not None:
            self.class_weights.copy_(self._given_weights)
        if self.anchor is not None:
            self.anchor.copy_(self.vertices)
        if self.global_mean is not None:
            self.global_mean.zero_()
        for module in self.rule.modules() if isinstance(self.rule, nn.Module) else ():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, proximity={self.proximity}, detach={self.detach}"


def _mean_over(means: Tensor, seen: Tensor) -> Tensor:
    """Mean of the rows that have been seen; 0 if there are none."""
    share = seen.to(means.dtype)
    return share @ means / share.sum().clamp(min=1)


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
    require_floating("class_weights", class_weights.dtype)
    values = class_weights.detach().double()
    require(
        bool((values >= 0).all() & torch.isfinite(values).all() & (values > 0).any()),
        f"class_weights must be finite, not negative and not all zero, got {class_weights.tolist()}",
    )
    return class_weights.detach()
