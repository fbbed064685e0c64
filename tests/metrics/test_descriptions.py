"""The words for the measures: there is one for each, and its ideal is the value at collapse."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from etflayers import simplex_etf
from etflayers.metrics import DESCRIPTIONS, NeuralCollapse


def test_every_measure_has_a_description_and_reaches_its_ideal() -> None:
    pytest.importorskip("torchmetrics")
    frame, targets = simplex_etf(4, 6, dtype=torch.float64), torch.arange(4).repeat(3)
    head = nn.Linear(6, 4, bias=False, dtype=torch.float64)
    head.weight.data = 30 * frame  # sure of itself, so that confidence is accuracy
    data = 5 * frame[targets], targets
    first = NeuralCollapse(4, 6, classifier=head, normalize=True)
    first.update(*data)
    second = NeuralCollapse(
        4, 6, classifier=head, centers=first.statistics(), scatter="per_class", normalize=True
    )
    second.update(*data)
    values = second.compute()
    # What takes two epochs, groups of classes, or sessions.
    elsewhere = {name for name in DESCRIPTIONS if name.startswith(("minority_collapse_", "accuracy_"))}
    assert set(values) == set(DESCRIPTIONS) - {"nc2_etf_drift_means"} - elsewhere
    simplex = {"margin_mean": 4 / 3}  # what depends on the number of classes
    for of in ("means", "weights"):
        simplex[f"gnc2_largest_cosine_{of}"] = -1 / 3
        simplex |= dict.fromkeys((f"gnc2_one_vs_rest_{which}_{of}" for which in ("min", "mean")), 4 / 3)
    for name, value in values.items():
        ideal = DESCRIPTIONS[name].ideal
        if name in simplex:
            assert value == pytest.approx(simplex[name])
        else:
            assert value == pytest.approx(0 if ideal is None else ideal, abs=1e-6), name


def test_labels_differ_and_sources_are_papers() -> None:
    labels = [description.label for description in DESCRIPTIONS.values()]
    assert len(set(labels)) == len(labels)
    sources = {description.source for description in DESCRIPTIONS.values()} - {""}
    assert all(re.fullmatch(r"arXiv \d{4}\.\d{5}", source) for source in sources)
