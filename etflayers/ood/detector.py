"""What all detectors have in common: they are fitted to training features, and then score others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etflayers.checks import require, require_finite, require_floating
from etflayers.errors import InvalidArgumentError, NotFittedError
from etflayers.functional.class_means import require_class_indices, require_target_for_each

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Detector"]


class Detector(ABC):
    """Fitted to features of training samples; its scores are larger for what is more in-distribution.

    A detector of your own defines :meth:`_fit` and :meth:`_score`, which are given checked arguments.

    Attributes:
        in_features: d, the width of the features it was fitted to; ``None`` before.
    """

    in_features: int | None = None

    @torch.no_grad()
    def fit(self, features: Tensor, targets: Tensor | None = None) -> Self:
        """Learn what training features look like; a second call forgets the first.

        Args:
            features: h, ``(N, d)``, finite.
            targets: y, ``(N,)``, class indices, for the detectors that need them.

        Returns:
            The detector itself.

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, no sample.
            NonFiniteError: NaN or infinity in the features.
        """
        _require_features(features)
        require(len(features) > 0, "features must hold at least one sample, got none")
        if targets is not None:
            require_target_for_each(features, targets)
            require_class_indices(targets)
        self._fit(features.detach(), targets)
        self.in_features = features.shape[1]
        return self

    @torch.no_grad()
    def score(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """How much each sample looks like those of the training: larger is more in-distribution.

        Args:
            features: h, ``(B, d)``, finite.
            logits: ``(B, K)``, for the detectors that need them.

        Returns:
            ``(B,)``.

        Raises:
            NotFittedError: :meth:`fit` has not been called.
            InvalidArgumentError: features of another width than those of :meth:`fit`, shapes or dtypes that
                do not fit.
            NonFiniteError: NaN or infinity in features or logits.
        """
        if self.in_features is None:
            raise NotFittedError(
                f"{type(self).__name__} must be fitted before it can score: call fit(features, targets) with "
                "features of the training set"
            )
        _require_features(features)
        if features.shape[1] != self.in_features:
            raise InvalidArgumentError(
                f"features must have the width of those in fit, shape (B, {self.in_features}), "
                f"got {tuple(features.shape)}"
            )
        if logits is not None:
            require_floating("logits", logits.dtype)
            if logits.ndim != 2 or len(logits) != len(features):
                raise InvalidArgumentError(
                    f"logits must have shape (B, K) = ({len(features)}, K), got {tuple(logits.shape)}"
                )
            require_finite(logits, "logits must be finite: look at what produced them")
            logits = logits.detach()
        return self._score(features.detach(), logits)

    @abstractmethod
    def _fit(self, features: Tensor, targets: Tensor | None) -> None:
        """Keep what a score needs; change nothing before all is known to fit."""

    @abstractmethod
    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        """The scores, ``(B,)``."""


def _require_features(features: Tensor) -> None:
    require(
        isinstance(features, Tensor),
        f"features must be a tensor, got {type(features).__name__}: pass torch.as_tensor(features)",
    )
    require_floating("features", features.dtype)
    require(features.ndim == 2, f"features must have shape (B, d), got {tuple(features.shape)}: flatten them")
    require_finite(features, "features must be finite: look for an overflow in what produced them")
