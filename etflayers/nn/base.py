r"""What every classifier head of the library is: a scaled product with a frame of unit rows.

Symbols: W <-> frame, s <-> scale, z <-> inputs, m <-> center, K <-> num_classes, d <-> in_features.

A head is a rule for W, and s, z and m say how logits are made of it. This module knows the logits and nothing
about the rule; a subclass knows the rule and nothing about logits. Losses, scores and metrics take what they
need from the public surface below, so that one written elsewhere needs nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers._torch import is_concrete, is_replica, is_symbolic, stamp
from etflayers.checks import (
    require,
    require_flag,
    require_floating,
    require_number,
    require_size,
    require_values,
)
from etflayers.codes import SphericalCode
from etflayers.errors import InvalidArgumentError, MissingTargetsError
from etflayers.functional.active import DROP, masked_logits, require_active
from etflayers.functional.logits import directions
from etflayers.precision import linear_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CodeHead", "LogitTerms", "class_numbers"]


class LogitTerms(NamedTuple):
    """What the logits ``s (z - m) W'`` are made of, besides the scale s.

    Attributes:
        inputs: z, ``(..., d)``: the features, or their directions.
        frame: W, ``(K, d)``, unit rows.
        center: m, ``(d,)``, or ``None`` for zero.
    """

    inputs: Tensor
    frame: Tensor
    center: Tensor | None = None


class CodeHead(nn.Module, ABC):
    r"""Linear classifier whose weight is a code, one unit vector for each class: ``logits = s (z - m) W'``.

    W is ``(K, d)`` with unit rows, for any K and d. The inputs z are the features, divided by their lengths
    with ``normalize=True``. The center m is zero unless a subclass has one. The scale s > 0 is the inverse of
    a softmax temperature. The logits have the dtype of the features or, under autocast, autocast's, as those
    of ``nn.Linear`` have.

    A scale that learns is a parameter: ``scale=nn.Parameter(torch.tensor(10.0))``, or assign one later. Keep
    it positive, for instance by clamping it after each step of the optimizer.

    **Classes that come later.** ``num_classes`` may be all that will ever come. :meth:`deactivate` says which
    are not here yet, and :meth:`activate` that they have come. A class that is not here has a row in W and no
    part in a softmax, an argmax or a loss; its row gets no gradient, and it is refused as a target. The first
    call adds the buffer ``active``: make it before the model is wrapped (``DistributedDataParallel``,
    ``AveragedModel``), and on all ranks. Later ones write into the buffer.

    **A head of your own** defines :attr:`frame`. If W or m depends on the batch it overrides
    :meth:`logit_terms`, too; if it needs targets for that, it sets ``accepts_targets`` and asks
    :meth:`require_targets` for them. :meth:`reset_parameters` gives its tensors their first values again, and
    calls that of this class. A ``forward`` of its own ends with :meth:`of_active`.

    Args:
        in_features: d >= 1.
        num_classes: K >= 1.
        scale: s > 0, a number or a scalar tensor; an ``nn.Parameter`` learns.
        normalize: whether to divide each feature vector by its length.

    Attributes:
        accepts_targets: whether a training pass needs targets:
            :func:`~etflayers.nn.provide_targets` gives them to these heads.
        provided_targets: what it gave; no part of copies and pickles.

    Raises:
        InvalidArgumentError: a size below 1, or a scale that is not positive and finite.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351.

    >>> class AxesHead(CodeHead):
    ...     '''Classes 2i and 2i + 1 are the two directions of axis i.'''
    ...
    ...     @property
    ...     def frame(self):
    ...         axes = torch.eye(self.in_features)
    ...         return torch.stack((axes, -axes), 1).flatten(0, 1)[: self.num_classes]
    >>> AxesHead(in_features=2, num_classes=4, scale=3.0)(torch.tensor([[1.0, 0.5]]))
    tensor([[ 3.0000, -3.0000,  1.5000, -1.5000]])
    """

    accepts_targets: ClassVar[bool] = False
    # Names that entries of a state dict had in earlier versions, with those of today.
    renamed_state: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float | Tensor = 1.0,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        require_size("in_features", in_features)
        require_size("num_classes", num_classes)
        require_scale(scale)
        require_flag("normalize", normalize)
        self.in_features = in_features
        self.num_classes = num_classes
        self.scale = scale
        self.normalize = normalize
        self.provided_targets: Tensor | None = None
        # The numbers of the active classes, with the stamp of the buffer that they were read from.
        self._noted: tuple[tuple[int, int], Tensor] | None = None

    @property
    @abstractmethod
    def frame(self) -> Tensor:
        """W, ``(K, d)``, unit rows."""

    @property
    def center(self) -> Tensor | None:
        """m, ``(d,)``, which is subtracted from the inputs; ``None`` for zero."""
        return None

    @property
    def code(self) -> SphericalCode | None:
        """A code whose words are W and whose products need no matrix: losses then never ask for one."""
        return None

    @property
    def weight(self) -> Tensor:
        """The weight of the ``nn.Linear`` with the same logits, ``s W``, ``(K, d)``.

        A class that is not here has the mean of the active rows, as its logit is the mean of theirs, less D.
        """
        weight = self.scale * self.frame
        return weight if self.active is None else masked_logits(weight.mT, self.active, drop=0.0).mT

    @property
    def bias(self) -> Tensor | None:
        """The bias of the ``nn.Linear`` with the same logits, ``-s W m``, ``(K,)``; ``None`` for zero.

        With ``normalize=True`` weight and bias are those of a linear layer on normalized features.
        """
        if self.center is None:
            return None if self.active is None else -DROP * (~self.active).to(self.frame.dtype)
        frame = self.frame
        # In float64: a large common mean would cancel between the product and the bias.
        bias = -self.scale * (frame.double() @ self.center.double())
        return (bias if self.active is None else masked_logits(bias, self.active)).to(frame.dtype)

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            features: ``(..., d)``.
            targets: for a head that ``accepts_targets``; accepted by the others so that heads can be
                exchanged.

        Returns:
            ``(..., K)``. Classes that are not here have a logit of 1000 less than the mean of the others, and
            no part in anything: label smoothing of ``F.cross_entropy`` has the right gradient, too, and a
            value that is too large by a constant.

        Raises:
            InvalidArgumentError: features of another width or dtype, or in training a target that is not
                here.
        """
        inputs, frame, center = self.logit_terms(features, targets)
        if center is not None:
            # Before the product, not as a bias after it: a large common mean would cancel between the two.
            inputs = inputs - center
        dtype = torch.promote_types(inputs.dtype, frame.dtype)
        logits = self.scale * F.linear(inputs.to(dtype), frame.to(dtype))
        return self.of_active(logits, targets).to(linear_dtype(features))

    def logit_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        """z, W and m of the logits ``s (z - m) W'``; what a training pass changes has been changed then.

        A loss that needs more than logits, or less than all of them, calls this instead of the head.

        Args:
            features: as in :meth:`forward`.
            targets: as in :meth:`forward`.

        Raises:
            InvalidArgumentError: features of another width or dtype.
        """
        return LogitTerms(self.inputs(features), self.frame, self.center)

    def inputs(self, features: Tensor) -> Tensor:
        """z, ``(..., d)``: the features or, with ``normalize=True``, their directions, at least in float32.

        Raises:
            InvalidArgumentError: features of another width or dtype, or a symbol of ``torch.fx``.
        """
        require(
            not is_symbolic(features),
            f"torch.fx.symbolic_trace cannot look into {type(self).__name__}, which checks what it is given: "
            "make it a leaf of the tracer (docs/howto/models.md), replace it by "
            "etflayers.restore_linear(model), or use torch.export",
        )
        require_floating("features", features.dtype)
        if features.shape[-1:] != (self.in_features,):
            raise InvalidArgumentError(
                f"features must have shape (..., in_features) = (..., {self.in_features}), "
                f"got {tuple(features.shape)}"
            )
        return directions(features) if self.normalize else features

    def require_targets(self, targets: Tensor | None, ignore_index: int = -100) -> Tensor:
        """``targets``, or those from :func:`~etflayers.nn.provide_targets`.

        Raises:
            MissingTargetsError: there are none.
            InvalidArgumentError: the head is a copy made by ``nn.DataParallel``, or a target is not here yet.
        """
        require(
            not is_replica(self),
            f"{type(self).__name__} cannot be trained inside nn.DataParallel, which trains copies and throws "
            "their class means away: use DistributedDataParallel, with one process or several",
        )
        targets = self.provided_targets if targets is None else targets
        if targets is None:
            raise MissingTargetsError(
                f"{type(self).__name__} needs targets in training: call head(features, targets), wrap the "
                "forward pass of the model in `with etflayers.provide_targets(model, targets):`, call "
                "etflayers.capture_targets(model) once if it is the model that gets labels=..., or call "
                ".eval(); for update_bn and loops of other libraries see docs/howto/models.md"
            )
        if self.active is not None:
            require_active(targets, self.active, ignore_index)
        return targets

    # --- classes that come later ---

    @property
    def active(self) -> Tensor | None:
        """Which classes are here, ``(K,)`` bool, a buffer; ``None`` for all, until :meth:`deactivate`."""
        # Not registered as None at the start: torch.export counts such a buffer, and misnames the others.
        return self._buffers.get("active")

    @property
    def active_classes(self) -> Tensor:
        """Numbers of the classes that are here, ``(A,)`` int64, ascending.

        Read from the buffer once after each change, which on an accelerator waits for the device. As with a
        stored frame, a training pass trusts what ``DistributedDataParallel`` writes.
        """
        if self.active is None:
            return torch.arange(self.num_classes, device=self._device)
        if self._noted is None or (is_concrete(self.active) and not self._is_noted(self._noted[0])):
            self._note()
        assert self._noted is not None
        return self._noted[1]

    def activate(self, classes: Iterable[int] | Tensor) -> Self:
        """Classes have come: from now on they take part. Under ``torch.distributed`` all ranks call it.

        Args:
            classes: their numbers in [0, K).

        Returns:
            The head.

        Raises:
            InvalidArgumentError: no numbers of classes.

        >>> from etflayers.nn import FixedETFHead
        >>> head = FixedETFHead(in_features=8, num_classes=5).deactivate(range(2, 5))
        >>> head.activate([3]).active_classes
        tensor([0, 1, 3])
        """
        return self._set_active(classes, True)

    def deactivate(self, classes: Iterable[int] | Tensor) -> Self:
        """Classes are not here, or no more. Under ``torch.distributed`` all ranks call it.

        Args:
            classes: their numbers in [0, K); at least one class has to stay.

        Returns:
            The head.

        Raises:
            InvalidArgumentError: no numbers of classes, or all that are active.
        """
        return self._set_active(classes, False)

    @torch.no_grad()
    def _set_active(self, classes: Iterable[int] | Tensor, value: bool) -> Self:
        index = class_numbers(classes, self.num_classes)
        if self.active is None and value:
            return self
        before = self.active
        if before is None:
            before = torch.ones(self.num_classes, dtype=torch.bool, device=self._device)
        now = before.index_fill(0, index.to(before.device), value)
        require(
            before.is_meta or bool(now.any()),
            f"classes must leave at least one of the {self.num_classes} classes active",
        )
        if self.active is None:
            self._buffers["active"] = now
        else:
            self.active.copy_(now)
        self._note()
        return self

    def of_active(self, logits: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits ``(..., K)`` as they leave the head, masked where a class is not here; for a ``forward``.

        Args:
            logits: of all classes.
            targets: what a training pass was given; a head that accepts targets has checked them already.

        Raises:
            InvalidArgumentError: in training, a target that is not here.
        """
        if self.active is None:
            return logits
        if self.training and targets is not None and not self.accepts_targets:
            require_active(targets, self.active)
        return self._masked(logits, self.active)

    def _masked(self, logits: Tensor, active: Tensor) -> Tensor:
        return masked_logits(logits, active)

    def _note(self) -> None:
        """Read the numbers of the active classes from the buffer."""
        self._noted = None
        if self.active is not None and is_concrete(self.active):
            self._noted = stamp(self.active), self.active.nonzero().flatten()

    def _is_noted(self, known: tuple[int, int]) -> bool:
        assert self.active is not None
        now = stamp(self.active)
        return now[0] == known[0] if self.training else now == known

    @property
    def _device(self) -> torch.device | None:
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._note()
        return self

    # --- state ---

    def reset_parameters(self) -> None:
        """Give parameters and buffers their first values, as after construction; all classes are active.

        Needed after construction on the ``meta`` device and ``to_empty``. Nothing else to do for a head
        without tensors of its own.
        """
        if self.active is not None:
            self.active.fill_(True)
            self._note()

    @torch.no_grad()
    def to_linear(self, *, normalized_inputs: bool = False) -> nn.Linear:
        """A plain ``nn.Linear`` with the logits that this head gives in eval mode.

        Args:
            normalized_inputs: whether the caller divides the features by their lengths; needed with
                ``normalize=True``, because the logits are not linear in the features themselves.

        Returns:
            A copy of the present state: it does not follow further training. It has a bias if there is a
            center.

        Raises:
            InvalidArgumentError: ``normalize=True`` without ``normalized_inputs=True``.
        """
        require(
            normalized_inputs or not self.normalize,
            "normalize=True makes the logits nonlinear in the features: normalize them before the linear "
            "layer and ask for to_linear(normalized_inputs=True)",
        )
        weight, bias = self.weight, self.bias
        # By way of "meta", which draws no random numbers for a start that is overwritten.
        linear = nn.Linear(
            self.in_features, self.num_classes, bias=bias is not None, device="meta", dtype=weight.dtype
        ).to_empty(device=weight.device)
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
        return linear.train(self.training)

    def __prepare_scriptable__(self) -> nn.Module:
        # The place where torch.jit.script lets a module say that it is not for it.
        raise InvalidArgumentError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.export or, on a copy of the "
            "model, etflayers.restore_linear(model)"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for old, new in self.renamed_state.items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        stored = state_dict.get(prefix + "active")
        if stored is not None:
            fault = _mask_fault(stored)
            if fault is not None:
                args[-1].append(f"{prefix}active {fault}")
                return
            if self.active is None:
                everything = torch.ones(self.num_classes, dtype=torch.bool, device=self._device)
                self._buffers["active"] = everything
        elif self.active is not None:  # of a head for which all classes have always been here
            state_dict[prefix + "active"] = torch.ones_like(self.active)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._note()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "provided_targets": None, "_noted": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._note()  # at once: a compiled pass cannot

    def extra_repr(self) -> str:
        """The arguments."""
        shown = (
            f"in_features={self.in_features}, num_classes={self.num_classes}, scale={_shown(self.scale)}, "
            f"normalize={self.normalize}"
        )
        return shown if self._noted is None else f"{shown}, active={len(self._noted[1])}"


def require_scale(scale: float | Tensor) -> None:
    """Raise unless ``scale`` is a positive, finite number, or a scalar tensor that holds one."""
    if isinstance(scale, Tensor):
        require(
            scale.ndim == 0 and scale.is_floating_point(),
            f"scale must be a number or a scalar floating-point tensor, got {scale.dtype} of shape "
            f"{tuple(scale.shape)}",
        )
        require_values(
            (scale > 0) & torch.isfinite(scale), f"scale must be a finite number > 0, got {scale.detach()}"
        )
        return
    require_number("scale", scale, positive=True)


def class_numbers(classes: Iterable[int] | Tensor, num_classes: int) -> Tensor:
    """Numbers of classes as a tensor ``(n,)``, int64, wherever they come from.

    Raises:
        InvalidArgumentError: anything else, or numbers outside [0, K).
    """
    if isinstance(classes, Tensor):
        index = classes.detach().reshape(-1)
        integers = not (index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool)
        require(integers, f"classes must be numbers of classes, integers, got {index.dtype}")
    else:
        require(
            isinstance(classes, Iterable) and not isinstance(classes, str),
            f"classes must be numbers of classes, such as [3, 4] or range(3, 5), got {classes!r}",
        )
        numbers = list(classes)
        for number in numbers:
            require_size("classes", number, at_least=None)
        index = torch.tensor([int(number) for number in numbers], dtype=torch.int64, device="cpu")
    unknown = [] if index.is_meta else index[(index < 0) | (index >= num_classes)].tolist()
    require(
        not unknown,
        f"classes must be in [0, {num_classes}), the classes of the head, got {unknown[:8]}: "
        "etflayers.nn.expand_classes makes a head for more",
    )
    return index.long()


def _mask_fault(stored: Tensor) -> str | None:
    """Why an entry of a state dict cannot say which classes are active."""
    if stored.dtype != torch.bool:
        return f"must be boolean, got {stored.dtype}"
    if is_concrete(stored) and not bool(stored.any()):
        return "must hold at least one class that is here"
    return None


def _shown(scale: float | Tensor) -> str:
    if not isinstance(scale, Tensor):
        return str(scale)
    value = "meta" if scale.is_meta else f"{float(scale.detach()):.4g}"
    return f"{value} (learned)" if scale.requires_grad else value
