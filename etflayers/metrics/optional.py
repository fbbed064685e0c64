"""Base classes of optional packages; the stand-ins say what to install when something is made of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from etflayers.checks import require_module

__all__ = ["CallbackBase", "Metric"]

if TYPE_CHECKING:
    from torchmetrics import Metric
else:
    try:
        from torchmetrics import Metric
    except ImportError:

        class Metric:
            """Stands for ``torchmetrics.Metric`` where that is not installed."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                require_module("torchmetrics", extra="metrics")


def _callback_base() -> Any:
    """Lightning's Callback under either of its names; without Lightning any object will do."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    return object


CallbackBase: Any = _callback_base()
