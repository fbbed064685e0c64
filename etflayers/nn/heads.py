"""What every ETF head is, and the head whose frame is fixed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.checks import require, require_floating
from etflayers.errors import InvalidArgumentError
from etflayers.functional.logits import canonical_etf_logits, linear_dtype
from etflayers.geometry import require_etf_dims, simplex_etf
from etflayers.precision import full_precision, working_dtype

__all__ = ["ETFHead", "FixedETFHead"]


class ETFHead(nn.Module, ABC):
    r"""Linear classifier whose weight is a simplex ETF: ``logits = s (z - m) W'``.

    W is ``(K, d)`` with unit rows, the inputs z are the features, on the unit sphere with ``normalize=True``,
    and the center m is zero except in :class:`~etflayers.nn.NearestETFHead`. The scale s > 0 is the inverse
    of a softmax temperature; it is a constant and multiplies nothing but the logits. The logits have the
    dtype of the features or, under autocast, autocast's, as those of ``nn.Linear``.

    Args:
        in_features: d >= K - 1.
        num_classes: K >= 2.
        scale: s > 0.
        normalize: whether to divide each feature vector by its length.
    """

    def __init__(self, in_features: int, num_classes: int, *, scale: float, normalize: bool) -> None:
        super().__init__()
        require_etf_dims(num_classes, in_features)
        require(0 < scale < float("inf"), f"scale must be positive and finite, got {scale}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.scale = scale
        self.normalize = normalize

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The current frame W, ``(K, d)``, unit rows."""

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            features: ``(..., d)``.
            targets: not used; accepted so that heads can be exchanged.

        Returns:
            ``(..., K)``.

        Raises:
            InvalidArgumentError: features of another width or dtype.
        """
        return self._logits(features, *self._linear_form(features, targets))

    def _linear_form(self, features: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """z, W and m of the logits ``s (z - m) W'``; what a training pass changes has been changed."""
        return self._inputs(features), self.weight, None

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
        frame, center = self.weight, self._center
        # By way of "meta", which draws no random numbers for a start that is overwritten.
        linear = nn.Linear(
            self.in_features, self.num_classes, bias=center is not None, device="meta", dtype=frame.dtype
        ).to_empty(device=frame.device)
        linear.weight.copy_(self.scale * frame)
        if center is not None:
            linear.bias.copy_(-self.scale * (frame.double() @ center.double()))
        return linear.train(self.training)

    @property
    def _center(self) -> Tensor | None:
        return None

    def _inputs(self, features: Tensor) -> Tensor:
        """z, after checking the features."""
        require_floating("features", features.dtype)
        if features.shape[-1:] != (self.in_features,):
            raise InvalidArgumentError(
                f"features must have shape (..., in_features) = (..., {self.in_features}), "
                f"got {tuple(features.shape)}"
            )
        if not self.normalize:
            return features
        with full_precision(features):
            return F.normalize(features.to(working_dtype(features.dtype)), dim=-1)

    def _logits(
        self, features: Tensor, inputs: Tensor, frame: Tensor, center: Tensor | None = None
    ) -> Tensor:
        if center is not None:
            # Before the product, not as a bias after it: a large common mean would cancel between the two.
            inputs = inputs - center
        dtype = torch.promote_types(inputs.dtype, frame.dtype)
        logits = self.scale * F.linear(inputs.to(dtype), frame.to(dtype))
        return logits.to(linear_dtype(features))

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, scale={self.scale}, "
            f"normalize={self.normalize}"
        )


class FixedETFHead(ETFHead):
    r"""Classifier with a constant simplex-ETF weight: ``logits = s z W'``.

    The canonical frame ``W = c (I - 11'/K)`` needs no weight matrix: a slice, a mean and a scale, O(K) a
    sample. Any other rotation is a buffer ``frame``. It has no parameter: only the features learn.

    Args:
        in_features: d >= K - 1.
        num_classes: K >= 2.
        rotation: ``"canonical"``, ``"haar"`` (uniformly random) or Q in St(d, K-1), ``(d, K-1)``.
        scale: s > 0, multiplies the logits (inverse temperature).
        normalize: whether to divide each feature vector by its length.
        generator: random numbers of the Haar rotation.
        device: of the frame.
        dtype: of the frame.

    Raises:
        InvalidArgumentError: K < 2, d < K - 1, a scale that is not positive, an unknown rotation.

    Reference:
        Yang, Chen, Li, Xie, Lin, Tao (2022), arXiv 2203.09081; Pernici et al. (2019), arXiv 1902.10441.

    >>> head = FixedETFHead(in_features=4, num_classes=3, scale=2.0)
    >>> head(torch.tensor([[3.0, 0.0, 0.0, 7.0]]))
    tensor([[ 4.8990, -2.4495, -2.4495]])
    """

    frame: Tensor | None
    _like: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        rotation: Literal["canonical", "haar"] | Tensor = "canonical",
        scale: float = 1.0,
        normalize: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        frame = like = None
        if isinstance(rotation, str) and rotation == "canonical":
            dtype = torch.get_default_dtype() if dtype is None else dtype
            require_floating("dtype", dtype)
            # One number that remembers, for `weight`, where the module is and in which precision.
            like = torch.ones((), device=device, dtype=dtype)
        else:
            frame = simplex_etf(
                num_classes, in_features, rotation=rotation, generator=generator, device=device, dtype=dtype
            )
        self.register_buffer("frame", frame)
        self.register_buffer("_like", like, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frame W, ``(K, d)``, unit rows; the canonical one is made on demand."""
        if self.frame is not None:
            return self.frame
        assert self._like is not None
        return simplex_etf(
            self.num_classes, self.in_features, device=self._like.device, dtype=self._like.dtype
        )

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of a batch: see :meth:`ETFHead.forward`."""
        if self.frame is not None:
            return super().forward(features)
        inputs = self._inputs(features)
        with full_precision(inputs):
            inputs = inputs.to(working_dtype(inputs.dtype))
            logits = self.scale * canonical_etf_logits(inputs, self.num_classes)
        return logits.to(linear_dtype(features))
