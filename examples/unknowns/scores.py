"""The scores, all larger for what is more in-distribution; none of them has seen anything unknown."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from etflayers.ood import NECO, Detector, PytorchOOD, VertexDistance

OF_LOGITS = ("msp", "max-logit", "energy")
OWN = ("neco", "vertex")
OF_PACKAGE = ("knn", "mahalanobis", "vim")
SCORES = (*OF_LOGITS, *OWN, *OF_PACKAGE)
NEIGHBORS = 50  # of KNN, as published for ten classes


def missing() -> str | None:
    """Why the detectors of pytorch-ood cannot be used here; nothing if they can."""
    try:
        importlib.import_module("pytorch_ood.detector")
    except (ImportError, RuntimeError) as error:  # a torchvision for another PyTorch raises RuntimeError
        names = ", ".join(OF_PACKAGE)
        return f"not scored: {names}, because pytorch-ood could not be imported ({error})"
    return None


def logit_scores(logits: Tensor) -> dict[str, Tensor]:
    """Maximum softmax probability, largest logit, energy; float64, where few probabilities are 1."""
    rows = logits.double()
    return {
        "msp": rows.softmax(-1).amax(-1),
        "max-logit": rows.amax(-1),
        "energy": rows.logsumexp(-1),
    }


def feature_detectors(
    features: Tensor, targets: Tensor, num_classes: int, head: nn.Module | None
) -> Iterator[tuple[str, Detector]]:
    """Detectors of features, fitted to those of the training set.

    NECO takes K - 1 directions, which collapsed class means span, and, with ResNets, no logit, as published.
    KNN takes 50 neighbors, or as many as the smallest class has. ViM's principal space is half of the
    dimensions, as published for fewer than 768, and it needs the head that reads these features.

    Args:
        features: ``(N, d)``.
        targets: ``(N,)``.
        num_classes: K.
        head: that reads these features; ``None``: none does.
    """
    found: dict[str, Detector] = {
        "neco": NECO(dimension=num_classes - 1, max_logit=False),
        "vertex": VertexDistance(num_classes),
    }
    if missing() is None:
        width, smallest = features.shape[1], int(torch.bincount(targets).min())
        # KNN and Mahalanobis look at no weight, and have to be given one.
        linear = nn.Linear(width, num_classes) if head is None else head
        found["knn"] = PytorchOOD.from_head("KNN", linear, k=min(NEIGHBORS, smallest))
        found["mahalanobis"] = PytorchOOD.from_head("Mahalanobis", linear)
        if head is not None:
            found["vim"] = PytorchOOD.from_head("ViM", head, d=width // 2)
    for name, detector in found.items():
        yield name, detector.fit(features, targets)
