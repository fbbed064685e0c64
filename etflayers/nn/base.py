r"""What every classifier head of the library is: a scaled product with a frame of unit rows.

Symbols: W <-> frame, s <-> scale, z <-> inputs, m <-> center, K <-> num_classes, d <-> in_features.

A head is a rule for W, and s, z and m say how logits are made of it. This module knows the logits and nothing
about the rule; a subclass knows the rule and nothing about logits. Losses, scores and metrics take what they
need from the public surface below, so that one written elsewhere needs nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers._torch import is_replica, is_symbolic
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
from etflayers.functional.logits import directions
from etflayers.precision import linear_dtype

__all__ = ["CodeHead", "LogitTerms"]


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

    **A head of your own** defines :attr:`frame`. If W or m depends on the batch it overrides
    :meth:`logit_terms`, too; if it needs targets for that, it sets ``accepts_targets`` and asks
    :meth:`require_targets` for them. :meth:`reset_parameters` gives its tensors their first values again.

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
        """The weight of the ``nn.Linear`` with the same logits, ``s W``, ``(K, d)``."""
        return self.scale * self.frame

    @property
    def bias(self) -> Tensor | None:
        """The bias of the ``nn.Linear`` with the same logits, ``-s W m``, ``(K,)``; ``None`` for no center.

        With ``normalize=True`` weight and bias are those of a linear layer on normalized features.
        """
        if self.center is None:
            return None
        frame = self.frame
        # In float64: a large common mean would cancel between the product and the bias.
        return (-self.scale * (frame.double() @ self.center.double())).to(frame.dtype)

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            features: ``(..., d)``.
            targets: for a head that ``accepts_targets``; accepted by the others so that heads can be
                exchanged.

        Returns:
            ``(..., K)``.

        Raises:
            InvalidArgumentError: features of another width or dtype.
        """
        inputs, frame, center = self.logit_terms(features, targets)
        if center is not None:
            # Before the product, not as a bias after it: a large common mean would cancel between the two.
            inputs = inputs - center
        dtype = torch.promote_types(inputs.dtype, frame.dtype)
        logits = self.scale * F.linear(inputs.to(dtype), frame.to(dtype))
        return logits.to(linear_dtype(features))

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
            "make it a leaf of the tracer (docs/heads.md), replace it by etflayers.restore_linear(model), or "
            "use torch.export",
        )
        require_floating("features", features.dtype)
        if features.shape[-1:] != (self.in_features,):
            raise InvalidArgumentError(
                f"features must have shape (..., in_features) = (..., {self.in_features}), "
                f"got {tuple(features.shape)}"
            )
        return directions(features) if self.normalize else features

    def require_targets(self, targets: Tensor | None) -> Tensor:
        """``targets``, or those from :func:`~etflayers.nn.provide_targets`.

        Raises:
            MissingTargetsError: there are none.
            InvalidArgumentError: the head is a copy made by ``nn.DataParallel``.
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
                ".eval(); for update_bn and loops of other libraries see docs/heads.md"
            )
        return targets

    def reset_parameters(self) -> None:
        """Give parameters and buffers their first values, as after construction.

        Needed after construction on the ``meta`` device and ``to_empty``. Nothing to do for a head without
        tensors of its own.
        """

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
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "provided_targets": None}

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, scale={_shown(self.scale)}, "
            f"normalize={self.normalize}"
        )


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


def _shown(scale: float | Tensor) -> str:
    if not isinstance(scale, Tensor):
        return str(scale)
    value = "meta" if scale.is_meta else f"{float(scale.detach()):.4g}"
    return f"{value} (learned)" if scale.requires_grad else value
