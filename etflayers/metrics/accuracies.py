"""Accuracies that an average over all samples hides: by group of classes, and from session to session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.errors import InvalidArgumentError
from etflayers.functional.class_means import ignored_targets, require_class_indices, require_target_for_each
from etflayers.metrics.groups import require_groups
from etflayers.metrics.nc4 import decisions_of

__all__ = ["Average", "class_hits", "group_accuracy", "grouped", "require_average", "session_measures"]

Average = Literal["macro", "micro"]


@torch.no_grad()
def group_accuracy(
    predictions: Tensor,
    targets: Tensor,
    num_classes: int,
    groups: Mapping[str, Tensor],
    *,
    average: Average = "macro",
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    r"""Accuracy of all samples, and of those whose class is in a group.

    Args:
        predictions: logits ``(B, K)``, floating point; or classes ``(B,)``, integers.
        targets: y, ``(B,)``, integers in [0, K) or ``ignore_index``.
        num_classes: K.
        groups: class indices by name, as from :func:`~etflayers.metrics.groups_from_counts`.
        average: ``"macro"``: each class counts once, as usual for long-tailed data; ``"micro"``: each sample.
        ignore_index: target of the samples to leave out.

    Returns:
        Float64 scalars: ``"all"``, and each group of which there is a sample.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, targets or groups out of range, a group that
            is called "all", no sample at all.
        NonFiniteError: NaN or plus infinity in logits.

    Reference:
        Liu, Miao, Zhan, Wang, Gong, Yu (2019), arXiv 1904.05160.

    >>> predictions, targets = torch.tensor([0, 0, 0, 1, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 2])
    >>> group_accuracy(predictions, targets, 3, {"many": torch.tensor([0]), "few": torch.tensor([1, 2])})
    {'all': tensor(0.5000, dtype=torch.float64), 'many': tensor(1., dtype=torch.float64),
     'few': tensor(0.2500, dtype=torch.float64)}
    """
    require_average(average)
    require_named_groups(groups, num_classes)
    correct, total = class_hits(predictions, targets, num_classes, ignore_index)
    return grouped(correct, total, groups, average)


def session_measures(correct: Tensor, total: Tensor) -> dict[str, Tensor]:
    r"""How well classes that came later are learned, and the first ones are remembered.

    After session t a model is tested on the classes of the sessions 0 to t. a_t is its accuracy there, with
    every sample counted once; b and n are those of the base classes, of session 0, and of the novel ones,
    after the last session T.

    Args:
        correct: numbers of samples that were classified correctly, ``(sessions, 2)``: base and novel.
        total: numbers of samples, ``(sessions, 2)``.

    Returns:
        Float64 scalars: ``"accuracy"`` a_T, ``"accuracy_base"`` b, ``"accuracy_novel"`` n and
        ``"accuracy_harmonic"`` 2bn / (b + n) where there are samples of each; and ``"accuracy_average"``
        mean_t a_t and ``"accuracy_drop"`` a_0 - a_T, unless a session before T has no sample.

    Raises:
        InvalidArgumentError: shapes that do not fit, or no sample at all.

    Reference:
        Zhang, Song, Lin, Zheng, Pan, Xu (2021), arXiv 2104.03047; Oh, Yun (2022), arXiv 2206.10596.

    >>> session_measures(torch.tensor([[9, 0], [8, 1]]), torch.tensor([[10, 0], [10, 5]]))
    {'accuracy': tensor(0.6000, dtype=torch.float64), 'accuracy_base': tensor(0.8000, dtype=torch.float64),
     'accuracy_novel': tensor(0.2000, dtype=torch.float64),
     'accuracy_harmonic': tensor(0.3200, dtype=torch.float64),
     'accuracy_average': tensor(0.7500, dtype=torch.float64),
     'accuracy_drop': tensor(0.3000, dtype=torch.float64)}
    """
    require(
        total.ndim == 2 and total.shape[1] == 2 and correct.shape == total.shape,
        f"correct and total must have shape (sessions, 2), got {tuple(correct.shape)} and "
        f"{tuple(total.shape)}",
    )
    tested = total.sum(-1) > 0
    require(bool(tested.any()), "no sample has been seen: call update first")
    last = int(tested.nonzero().max())
    correct, total = correct[: last + 1].double(), total[: last + 1].double()
    accuracies = correct.sum(-1) / total.sum(-1)
    result = {"accuracy": accuracies[-1]}
    for part, name in enumerate(("accuracy_base", "accuracy_novel")):
        if total[-1, part] > 0:
            result[name] = correct[-1, part] / total[-1, part]
    if len(result) == 3:
        base, novel = result["accuracy_base"], result["accuracy_novel"]
        both = base + novel
        result["accuracy_harmonic"] = 2 * base * novel / torch.where(both > 0, both, 1)
    if bool(tested[:last].all()):
        result["accuracy_average"] = accuracies.mean()
        result["accuracy_drop"] = accuracies[0] - accuracies[-1]
    return result


def class_hits(
    predictions: Tensor, targets: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Of each class the number of samples that were classified correctly, and of all: ``(K,)`` int64 each."""
    require(
        isinstance(predictions, Tensor),
        f"predictions must be a tensor, got {type(predictions).__name__}: pass torch.as_tensor(predictions)",
    )
    logits = predictions.dtype.is_floating_point
    expected = "(B, num_classes)" if logits else "(B,)"
    if predictions.ndim != (2 if logits else 1) or (logits and predictions.shape[1] != num_classes):
        raise InvalidArgumentError(
            "predictions must be logits (B, num_classes) or class indices (B,): with "
            f"{predictions.dtype} shape {expected}, num_classes = {num_classes}, got "
            f"{tuple(predictions.shape)}"
        )
    require_target_for_each(predictions, targets)
    valid = ~ignored_targets(targets, num_classes, ignore_index)
    classes = targets.long()[valid]
    if logits:
        decisions = decisions_of(predictions[valid])
    else:
        require_class_indices(predictions, "predictions")
        decisions = predictions.long()[valid]
    right = classes[decisions == classes]
    return torch.bincount(right, minlength=num_classes), torch.bincount(classes, minlength=num_classes)


def grouped(
    correct: Tensor, total: Tensor, groups: Mapping[str, Tensor], average: Average
) -> dict[str, Tensor]:
    """Accuracies of all classes and of groups, from the hits of each class."""
    require(bool((total > 0).any()), "no sample has been seen: call update first")
    everything = {"all": torch.arange(len(total)), **groups}
    result = {}
    for name, classes in everything.items():
        members = torch.unique(classes).to(total.device)
        members = members[total[members] > 0]
        if len(members):
            hits, numbers = correct[members].double(), total[members].double()
            result[name] = (hits / numbers).mean() if average == "macro" else hits.sum() / numbers.sum()
    return result


def require_average(average: str) -> None:
    """Raise unless ``average`` is one of the two."""
    require(average in get_args(Average), f"average must be 'macro' or 'micro', got {average!r}")


def require_named_groups(groups: Mapping[str, Tensor], num_classes: int) -> None:
    """Raise unless ``groups`` are class indices in [0, K) by name, and none is called "all"."""
    require_groups(groups, num_classes)
    require("all" not in groups, "groups must not have the name 'all', which all classes have")
