"""What a network has memorized, and what that costs on test data.

Symbols: m_k <-> means of the test features, r <-> sqrt(dilation_trace), D <-> distance.

Memorization and dilation are in units of the features, whose scale differs between methods: a linear head
leaves it free, an ETF head with ``normalize=True`` sets it to 1. So both are given as published, and divided
by the distance D of two classes, the mean of ``|m_j - m_k|`` over all pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from etflayers.metrics import (
    LabelNoise,
    class_statistics,
    classifier_inputs,
    dilation,
    label_accuracies,
    memorization,
)
from lab.data import Split
from lab.files import Row
from noise.data import NoisyData

Samples = dict[str, Tensor]
Features = Callable[[Split], Tensor]


@torch.no_grad()
def measure(head: nn.Module, features: Features, noisy: NoisyData) -> tuple[Row, Samples]:
    """The measures of a trained network by name, and those of each corrupted training sample.

    Args:
        head: in eval mode.
        features: what the body makes of a split.
        noisy: the data.

    Returns:
        ``test_accuracy``, the dictionary of :class:`~etflayers.metrics.LabelNoise`, dilation, both relative
        to D, memorization of each class; accuracies on the right and on the wrong training labels. Measures
        of corrupted samples are not there where no label is wrong, and relative ones where D is 0. Of each
        corrupted sample its place in the training set, its label, its class and the distance of its feature
        from the test mean of its class.
    """
    data, classes = noisy.data, noisy.data.num_classes
    test_features, train_features = features(data.test), features(data.train)
    test = class_statistics(classifier_inputs(head, test_features), data.test.targets, classes)
    inputs, logits = classifier_inputs(head, train_features), head(train_features)
    labels = (data.train.targets, noisy.originals)
    metric = LabelNoise(classes, inputs.shape[1], centers=test).to(inputs.device)
    metric.update(inputs, *labels, logits)
    row: Row = {"test_accuracy": float((head(test_features).argmax(1) == data.test.targets).double().mean())}
    row |= {name: float(value) for name, value in metric.compute().items()}

    spread, distance = dilation(test), float(torch.pdist(test.means).mean())
    row |= {"dilation_nc1": float(spread.nc1), "dilation_trace": float(spread.trace), "distance": distance}
    corrupted = noisy.corrupted
    found = memorization(inputs, *labels, test)
    said = logits.double().softmax(1).gather(1, labels[0].unsqueeze(1)).squeeze(1)
    for name, part in {"right": ~corrupted, "wrong": corrupted}.items():
        if part.any():
            agreed = label_accuracies(logits[part], *(values[part] for values in labels))
            row[f"accuracy_{name}_labels"] = float(agreed.noisy)
            row[f"probability_{name}_labels"] = float(said[part].mean())
    if corrupted.any():
        row["recovered"] = float(agreed.clean)  # of the last part, the corrupted one
        row |= {f"memorization_class{k}": float(value) for k, value in enumerate(found.class_means)}
    samples = {
        "index": corrupted.nonzero().squeeze(1),
        "label": labels[0][corrupted],
        "class": labels[1][corrupted],
        "distance": found.distances,
    }
    if distance > 0:  # a network that has died puts all classes into one place
        row["dilation_relative"] = row["dilation_trace"] ** 0.5 / distance
        # Summed over the corrupted samples and divided by all of them, so that it is 0 without noise.
        row["memorization_relative"] = row["memorization"] / len(inputs) / distance
        for name in ("memorization_mean", "corruption_bias"):
            if name in row:
                row[f"{name}_relative"] = row[name] / distance
        samples["distance_relative"] = found.distances / distance
    return row, {name: value.cpu() for name, value in samples.items()}
