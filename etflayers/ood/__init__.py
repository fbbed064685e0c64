"""Whether an input is of the kind that a classifier was trained on, told from its features and logits.

All scores are **larger for what is more in-distribution**. ``NECO`` and ``VertexDistance`` need PyTorch
alone, ``ood_metrics`` torchmetrics and ``PytorchOOD`` pytorch-ood (``pip install 'etflayers[ood]'``).
"""

from etflayers.ood.adapter import PytorchOOD
from etflayers.ood.detector import Detector
from etflayers.ood.measures import OODMetrics, ood_metrics
from etflayers.ood.neco import NECO
from etflayers.ood.vertex_distance import VertexDistance

__all__ = ["NECO", "Detector", "OODMetrics", "PytorchOOD", "VertexDistance", "ood_metrics"]
