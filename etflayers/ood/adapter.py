"""Detectors of pytorch-ood, fitted to features of a model with any head of this library."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.checks import require, require_module
from etflayers.functional.logits import directions
from etflayers.ood.detector import Detector

__all__ = ["PytorchOOD"]


class PytorchOOD(Detector):
    """A detector of pytorch-ood as one of these: larger is more in-distribution, the reverse of its own sign.

    pytorch-ood has detectors of features and detectors of logits. Both are given here by features: of the
    second kind the logits are those passed to ``score``, or those that the head gives. What a head with
    ``normalize=True`` is linear in are directions, so that a detector then sees directions.

    Args:
        detector: with ``fit_features`` and ``predict_features``, or ``predict_logits`` and perhaps
            ``fit_logits``; :meth:`from_head` makes one.
        head: a linear layer or a head of this library.

    Raises:
        InvalidArgumentError: a detector of neither kind (of images, or of several layers).

    Reference:
        Kirchheim, Filax, Ortmeier (2022), PyTorch-OOD, CVPR Workshops.
    """

    def __init__(self, detector: Any, head: nn.Module) -> None:
        of_features, of_logits = (hasattr(detector, f"predict_{kind}") for kind in ("features", "logits"))
        require(
            of_features or of_logits,
            f"detector must have predict_features or predict_logits, {type(detector).__name__} has neither: "
            "detectors of images, feature maps or several layers have to be used directly",
        )
        self.detector = detector
        self.head = head
        self.of_features = of_features
        if not getattr(detector, "requires_fit", True):
            self.in_features = as_linear(head).in_features

    @classmethod
    def from_head(cls, name: str, head: nn.Module, **options: Any) -> PytorchOOD:
        """Make a detector by its name, with the weight and bias of a head.

        Args:
            name: a class of ``pytorch_ood.detector``, such as ``"ViM"``, ``"KNN"`` or ``"EnergyBased"``.
            head: a linear layer or a head of this library. Its weight, bias and linear layer become the
                arguments ``w``, ``b`` and ``head`` of the detectors that have them.
            options: other arguments of the detector, such as ``d=64``.

        Returns:
            A detector, to be fitted if it needs that.

        Raises:
            MissingDependencyError: pytorch-ood is not installed.
            InvalidArgumentError: there is no such detector, or pytorch-ood is older than 0.3.
        """
        detectors = require_module("pytorch_ood.detector", extra="ood")
        # Before 0.3 detectors of logits took them by predict_features: features would be read as logits.
        require(
            hasattr(require_module("pytorch_ood.api", extra="ood"), "LogitsDetector"),
            "pytorch-ood must be 0.3 or newer, which tells detectors of logits from those of features: "
            "pip install 'etflayers[ood]'",
        )
        made = getattr(detectors, name, None)
        require(inspect.isclass(made), f"name must be a class of pytorch_ood.detector, got {name!r}")
        assert made is not None
        linear = as_linear(head)
        weight = linear.weight.detach()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        known = {"encoder": None, "model": None, "w": weight, "b": bias, "head": linear}
        wanted = inspect.signature(made.__init__).parameters
        given = {key: value for key, value in known.items() if key in wanted and key not in options}
        return cls(made(**given, **options), head)

    def _fit(self, features: Tensor, targets: Tensor | None) -> None:
        if not getattr(self.detector, "requires_fit", True):
            return
        name = type(self.detector).__name__
        require(targets is not None, f"targets are needed by {name}, which is fitted to classes")
        rows = self._inputs(features)
        if self.of_features:
            self.detector.fit_features(rows, targets)
        else:
            self.detector.fit_logits(self._logits(rows), targets)

    def _score(self, features: Tensor, logits: Tensor | None) -> Tensor:
        rows = self._inputs(features)
        if self.of_features:
            outlier: Tensor = self.detector.predict_features(rows)
        else:
            outlier = self.detector.predict_logits(self._logits(rows) if logits is None else logits)
        return -outlier

    def _inputs(self, features: Tensor) -> Tensor:
        """What the weight of the head is applied to."""
        return directions(features) if getattr(self.head, "normalize", False) else features

    def _logits(self, rows: Tensor) -> Tensor:
        linear = as_linear(self.head)
        return F.linear(rows.to(linear.weight), linear.weight, linear.bias)


@torch.no_grad()
def as_linear(head: Any) -> nn.Linear:
    """The linear layer with the logits of a head, or the layer itself."""
    if isinstance(head, nn.Linear):
        return head
    require(
        hasattr(head, "to_linear"),
        f"head must be an nn.Linear or a head of this library, got {type(head).__name__}",
    )
    linear: nn.Linear = head.to_linear(normalized_inputs=True)
    return linear
