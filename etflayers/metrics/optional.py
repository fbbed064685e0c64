"""The base class of the metrics; its stand-in says what to install when a metric is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etflayers.checks import require_module

__all__ = ["Metric"]

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
