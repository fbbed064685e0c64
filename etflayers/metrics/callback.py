"""A callback for Lightning's Trainer that logs the collapse of a network after each validation epoch."""

from __future__ import annotations

import importlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from etflayers.checks import require_module
from etflayers.errors import InvalidArgumentError
from etflayers.metrics.nc2 import frame_distance
from etflayers.metrics.probe import NeuralCollapseProbe

__all__ = ["NeuralCollapseCallback"]


def _callback_base() -> Any:
    """Lightning's Callback under either of its names; without Lightning any object will do."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    return object


CallbackBase: Any = _callback_base()


def second_of_batch(batch: Any) -> Tensor:
    """The targets of a batch ``(inputs, targets, ...)``."""
    if not isinstance(batch, (tuple, list)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise InvalidArgumentError(
            "batch must be (inputs, targets): for batches of another kind pass targets=lambda batch: ..."
        )
    return batch[1]


class NeuralCollapseCallback(CallbackBase):  # type: ignore[misc]
    """Run a :class:`~etflayers.metrics.NeuralCollapseProbe` through validation and log what it measures.

    Logged as ``{prefix}{layer}/{metric}``, with the drift of the ETF nearest to the means since the last
    epoch as ``nc2_etf_drift_means``. To measure the training set, as the literature does, make it (without
    augmentation) the first validation loader.

    Where Lightning is installed this is one of its callbacks; a loop of your own can call the three hooks.

    Args:
        num_classes: K.
        layers: names of modules of the LightningModule.
        classifier: name of its classifier.
        dataloader_idx: which of the validation loaders is measured.
        targets: from a batch to its targets; default: the second entry.
        prefix: of the logged names.
        options: of :class:`~etflayers.metrics.NeuralCollapseProbe`.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        layers: Sequence[str] = (),
        classifier: str | None = None,
        dataloader_idx: int = 0,
        targets: Callable[[Any], Tensor] = second_of_batch,
        prefix: str = "",
        **options: Any,
    ) -> None:
        require_module("torchmetrics", extra="metrics")
        super().__init__()
        self.num_classes = num_classes
        self.layers = tuple(layers)
        self.classifier = classifier
        self.dataloader_idx = dataloader_idx
        self.targets = targets
        self.prefix = prefix
        self.options = options
        self.probe: NeuralCollapseProbe | None = None
        self._hooks = ExitStack()
        weakref.finalize(self, self._hooks.close)  # for a loop that was left without a word
        self._frames: dict[str, Tensor] = {}

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the hooks in."""
        self._hooks.close()
        self.probe = self._hooks.enter_context(
            NeuralCollapseProbe(
                pl_module, self.num_classes, layers=self.layers, classifier=self.classifier, **self.options
            )
        )

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch."""
        if self.probe is None:
            return
        if dataloader_idx != self.dataloader_idx:
            self.probe.discard()
            return
        try:
            self.probe.update(self.targets(batch))
        except BaseException:
            self._hooks.close()
            raise

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the metrics and take the hooks out; the sanity check before training is not measured.

        A layer whose metrics do not exist, because a class had no sample or all its means coincide, is left
        out of this epoch with a warning.
        """
        probe, self.probe = self.probe, None
        if probe is None:
            return
        self._hooks.close()
        if getattr(trainer, "sanity_checking", False):
            return
        for layer, metric in probe.metrics.items():
            try:
                measures = metric.compute()
                frame = metric.nearest_frame() if "nc2_etf_distance_means" in measures else None
            except InvalidArgumentError as error:
                warnings.warn(f"nothing is logged of layer {layer!r} in this epoch: {error}", stacklevel=2)
                continue
            if frame is not None:
                if layer in self._frames and self._frames[layer].shape == frame.shape:
                    measures["nc2_etf_drift_means"] = frame_distance(frame, self._frames[layer])
                self._frames[layer] = frame
            pl_module.log_dict({f"{self.prefix}{layer}/{name}": value for name, value in measures.items()})

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks out."""
        self._hooks.close()
