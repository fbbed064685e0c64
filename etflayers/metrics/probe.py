"""Forward hooks that measure the collapse of any layer of any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from etflayers.checks import require
from etflayers.errors import EtfLayersError, InvalidArgumentError
from etflayers.metrics.collapse import NeuralCollapse

__all__ = ["NeuralCollapseProbe", "spatial_mean"]


def spatial_mean(activations: Tensor) -> Tensor:
    """Average ``(B, C, ...)`` over all dimensions after the channels, ``(B, C)``; ``(B, d)`` stays.

    >>> import torch
    >>> spatial_mean(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3])
    """
    return activations.flatten(2).mean(2) if activations.ndim > 2 else activations


class NeuralCollapseProbe:
    """Measure neural collapse at the outputs of layers and at the input of the classifier of a running model.

    Use it as a context manager, or call :meth:`remove` in the end. After each forward pass of the model call
    :meth:`update` with the targets. On several ranks each must see at least one batch.

    Args:
        model: any module.
        num_classes: K.
        layers: dotted names, as in ``model.named_modules()``, of modules that return one tensor.
        classifier: name of the last linear layer or head; measured with its weight, at its input.
        pool: from the output of a layer to ``(B, d)``; default: the mean over all dimensions after the
            second. For tokens ``(B, T, d)`` choose e.g. ``lambda x: x[:, 0]``, to flatten
            ``lambda x: x.flatten(1)``.
        options: of :class:`~etflayers.metrics.NeuralCollapse`, for every layer.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
        InvalidArgumentError: no layer, or a name that the model does not have.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> with NeuralCollapseProbe(model, 3, layers=["1"], classifier="2") as probe:
    ...     _ = model(torch.randn(30, 4))
    ...     probe.update(torch.arange(30) % 3)
    >>> list(probe.compute())
    ['1', '2']
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        layers: Sequence[str] = (),
        classifier: str | None = None,
        pool: Callable[[Tensor], Tensor] = spatial_mean,
        **options: Any,
    ) -> None:
        names = [*layers, *([] if classifier is None else [classifier])]
        modules = dict(model.named_modules(remove_duplicate=False))
        missing = [name for name in names if name not in modules]
        require(not missing, f"layers must be names of modules of the model, which has no {missing}")
        require(bool(names), "layers must name at least one module, or classifier one")
        require(len(set(names)) == len(names), f"layers must be different, got {names}")
        self.num_classes = num_classes
        self.pool = pool
        self.options = options
        self.metrics: dict[str, NeuralCollapse] = {}
        self._classifier = classifier
        self._module = None if classifier is None else modules[classifier]
        self._features: dict[str, Tensor] = {}
        self._logits: Tensor | None = None
        self._handles = [
            modules[name].register_forward_hook(partial(self._keep_output, name)) for name in layers
        ]
        if self._module is not None:
            self._handles.append(self._module.register_forward_hook(self._keep_classifier))

    def update(self, targets: Tensor) -> None:
        """Add what the layers computed in the forward pass since the last update.

        Args:
            targets: ``(B,)``, integers in [0, K) or ``ignore_index``.

        Raises:
            EtfLayersError: a layer that has not run since.
            InvalidArgumentError: activations that are not ``(B, d)`` after pooling, targets that do not fit.
        """
        expected = len(self._handles)
        if len(self._features) != expected:
            raise EtfLayersError(
                f"only {sorted(self._features)} of {expected} layers ran since the last update: run the "
                "model first, and update once for each forward pass"
            )
        features, logits = self._features, self._logits
        self._features, self._logits = {}, None
        for name, activations in features.items():
            rows = self.pool(activations)
            if rows.ndim != 2:
                raise InvalidArgumentError(
                    f"pool must return (B, d), got {tuple(rows.shape)} from layer {name!r}: "
                    "e.g. lambda x: x.flatten(1)"
                )
            is_classifier = name == self._classifier
            if name not in self.metrics:
                module = self._module if is_classifier else None
                metric = NeuralCollapse(self.num_classes, rows.shape[1], classifier=module, **self.options)
                self.metrics[name] = metric.to(rows.device)
            self.metrics[name].update(rows, targets, logits if is_classifier else None)

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """The metrics of each layer, by its name."""
        require(bool(self.metrics), "no sample has been seen: run the model and call update first")
        return {name: metric.compute() for name, metric in self.metrics.items()}

    def reset(self) -> None:
        """Forget all samples."""
        self._features, self._logits = {}, None
        for metric in self.metrics.values():
            metric.reset()

    def remove(self) -> None:
        """Take the hooks out of the model; what has been measured stays."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> NeuralCollapseProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _keep_output(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._features[name] = _tensor(name, output)

    def _keep_classifier(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert self._classifier is not None
        self._features[self._classifier] = _tensor(self._classifier, inputs[0] if inputs else None)
        self._logits = _tensor(self._classifier, output)


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidArgumentError(
            f"layer {name!r} must take and return one tensor to be measured, got {type(value).__name__}"
        )
    return value.detach()
