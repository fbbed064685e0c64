"""Forward hooks that measure the collapse of any layer of any model."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_module
from etflayers.errors import EtfLayersError, InvalidArgumentError
from etflayers.hooks import on_input
from etflayers.metrics.collapse import NeuralCollapse

__all__ = ["NeuralCollapseProbe", "spatial_mean"]


def spatial_mean(activations: Tensor) -> Tensor:
    """Average ``(B, C, ...)`` over all dimensions after the channels, ``(B, C)``; ``(B, d)`` stays.

    >>> spatial_mean(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3])
    """
    return activations.flatten(2).mean(2) if activations.ndim > 2 else activations


class NeuralCollapseProbe:
    """Measure neural collapse at the outputs of layers and at the input of the classifier of a running model.

    Use it as a context manager, within which models under ``torch.compile`` run eagerly, because compiled
    code does not call hooks that came after it; or call :meth:`remove` in the end. After each forward pass
    of the model call :meth:`update` with its targets. On several ranks each must see at least one batch.

    What a layer returns is pooled and copied at once: later layers may change it in place.

    Args:
        model: any module.
        num_classes: K.
        layers: dotted names, as in ``model.named_modules()``, of modules that return one tensor and run once
            in a forward pass.
        classifier: name of the last linear layer or head; measured with its weight, at its input: for a head
            with ``normalize=True`` at the directions that it takes of that.
        pool: from the output of a layer to ``(B, d)``; default: the mean over all dimensions after the
            second. For tokens ``(B, T, d)`` choose e.g. ``lambda x: x[:, 0]``, to flatten
            ``lambda x: x.flatten(1)``.
        options: of :class:`~etflayers.metrics.NeuralCollapse`, for every layer.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
        InvalidArgumentError: no layer, or a name that the model does not have.

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
        require_module("torchmetrics", extra="metrics")
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
        self._names = names
        self._classifier = classifier
        self._module = None if classifier is None else modules[classifier]
        self._eager = ExitStack()
        self.discard()
        self._handles = [model.register_forward_pre_hook(self._start_pass)]
        for name in layers:
            self._handles.append(modules[name].register_forward_hook(partial(self._keep_output, name)))
        if classifier is not None:
            module = modules[classifier]
            self._handles.append(on_input(module, partial(self._keep, classifier)))
            self._handles.append(module.register_forward_hook(self._keep_logits))

    def update(self, targets: Tensor) -> None:
        """Add what the layers computed in the forward pass since the last update.

        Args:
            targets: ``(B,)``, integers in [0, K) or ``ignore_index``.

        Raises:
            EtfLayersError: a layer that has not run since, or more than once: whose targets these are is then
                not known. What ran is forgotten.
            InvalidArgumentError: activations that are not ``(B, d)`` after pooling, targets that do not fit.
        """
        features, logits, runs, passes = self._features, self._logits, self._runs, self._passes
        self.discard()
        if len(features) != len(self._names):
            raise EtfLayersError(
                f"only {sorted(features)} of the layers {self._names} ran since the last update: run the "
                "model first, and update once for each forward pass; a compiled model calls the probe within "
                "`with NeuralCollapseProbe(...) as probe:`"
            )
        again = [f"layer {name!r} ran {count} times" for name, count in runs.items() if count > 1]
        if passes > 1 or again:
            what = f"the model ran {passes} times" if passes > 1 else ", ".join(again)
            raise EtfLayersError(
                f"{what} since the last update, and targets are those of one run: update after each forward "
                "pass, call discard() before the pass that is to be measured, and name no layer that the "
                "model uses several times in a pass"
            )
        for name, rows in features.items():
            if rows.ndim != 2:
                raise InvalidArgumentError(
                    f"pool must return (B, d), got {tuple(rows.shape)} from layer {name!r}: "
                    "e.g. lambda x: x.flatten(1)"
                )
        for name, rows in features.items():
            is_classifier = name == self._classifier
            if name not in self.metrics:
                module = self._module if is_classifier else None
                metric = NeuralCollapse(self.num_classes, rows.shape[1], classifier=module, **self.options)
                self.metrics[name] = metric.to(rows.device)
            self.metrics[name].update(rows, targets, logits if is_classifier else None)

    def discard(self) -> None:
        """Forget the forward passes since the last update, whose targets are not to be added."""
        self._features: dict[str, Tensor] = {}
        self._logits: Tensor | None = None
        self._runs: Counter[str] = Counter()  # of each layer since the last update or the start of a pass
        self._passes = 0

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """The metrics of each layer, by its name."""
        require(bool(self.metrics), "no sample has been seen: run the model and call update first")
        return {name: metric.compute() for name, metric in self.metrics.items()}

    def reset(self) -> None:
        """Forget all samples."""
        self.discard()
        for metric in self.metrics.values():
            metric.reset()

    def remove(self) -> None:
        """Take the hooks out of the model; what has been measured stays."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> NeuralCollapseProbe:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        self._eager.close()

    def _start_pass(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._passes += 1
        self._runs.clear()

    def _keep_output(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._keep(name, output)

    def _keep_logits(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._logits = _tensor("the classifier", output).clone()

    def _keep(self, name: str, value: Any) -> None:
        self._runs[name] += 1
        self._features[name] = self.pool(_tensor(f"layer {name!r}", value)).clone()


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InvalidArgumentError(
            f"{name} must take and return one tensor to be measured, got {type(value).__name__}"
        )
    return value.detach()
