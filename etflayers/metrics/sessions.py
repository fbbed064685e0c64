"""``GroupAccuracy`` and ``SessionAccuracy``: accuracies of some of the classes, for torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from etflayers.checks import require, require_size
from etflayers.functional.class_means import require_class_indices
from etflayers.metrics.accuracies import (
    Average,
    class_hits,
    grouped,
    require_average,
    require_named_groups,
    session_measures,
)
from etflayers.metrics.groups import require_groups
from etflayers.metrics.pictures import plot_measures
from etflayers.metrics.shell import ExactMetric

__all__ = ["GroupAccuracy", "SessionAccuracy"]


class _Accuracies(ExactMetric):
    """A metric that is a dictionary of accuracies."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: Any = None
    ) -> Any:
        """Draw the accuracies by name, or how each develops.

        Args:
            val: a result of ``compute`` or ``forward``, or several in order; default: that of now.
            ax: axes of matplotlib to draw into; default: a new figure.

        Returns:
            The figure and the axes.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return plot_measures(self.compute() if val is None else val, ax)


class GroupAccuracy(_Accuracies):
    """Accuracy of all samples and of groups of classes: :func:`~etflayers.metrics.group_accuracy`.

    Args:
        num_classes: K.
        groups: class indices by name, as from :func:`~etflayers.metrics.groups_from_counts`.
        average: ``"macro"``: each class counts once; ``"micro"``: each sample.
        ignore_index: target of the samples to leave out.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
        InvalidArgumentError: groups out of range or called "all", an unknown average.

    Reference:
        Liu, Miao, Zhan, Wang, Gong, Yu (2019), arXiv 1904.05160.

    >>> metric = GroupAccuracy(3, {"many": torch.tensor([0]), "few": torch.tensor([1, 2])})
    >>> metric.update(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]))
    >>> metric.update(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    >>> metric.compute()
    {'all': tensor(0.5000, dtype=torch.float64), 'many': tensor(1., dtype=torch.float64),
     'few': tensor(0.2500, dtype=torch.float64)}
    """

    correct: Tensor
    total: Tensor

    def __init__(
        self,
        num_classes: int,
        groups: Mapping[str, Tensor],
        *,
        average: Average = "macro",
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_size("num_classes", num_classes)
        require_named_groups(groups, num_classes)
        require_average(average)
        self.num_classes = num_classes
        self.groups = {name: classes.detach().clone() for name, classes in groups.items()}
        self.average: Average = average
        self.ignore_index = ignore_index
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch: logits ``(B, K)`` or classes ``(B,)``, and targets ``(B,)``."""
        correct, total = class_hits(predictions, targets, self.num_classes, self.ignore_index)
        self.correct += correct
        self.total += total

    def compute(self) -> dict[str, Tensor]:
        """The accuracies of all samples seen, float64 scalars by name; a group without samples has none."""
        return grouped(self.correct, self.total, self.groups, self.average)


class SessionAccuracy(_Accuracies):
    """Accuracies of a model whose classes come in sessions: :func:`~etflayers.metrics.session_measures`.

    After each session t = 0, 1, ... test the model on all classes that it has been taught, and give every
    batch with the number of the session.

    Args:
        num_classes: K, of all sessions together.
        num_sessions: at least 1, with the base session, which is number 0.
        base_classes: the classes of the base session: how many, if they are the first ones, or their indices.
        ignore_index: target of the samples to leave out.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
        InvalidArgumentError: arguments that do not fit.

    Reference:
        Zhang, Song, Lin, Zheng, Pan, Xu (2021), arXiv 2104.03047; Oh, Yun (2022), arXiv 2206.10596.

    >>> metric = SessionAccuracy(num_classes=3, num_sessions=2, base_classes=2)
    >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), session=0)
    >>> metric.update(torch.tensor([0, 0, 2, 0]), torch.tensor([0, 1, 2, 2]), session=1)
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'accuracy': 0.5, 'accuracy_base': 0.5, 'accuracy_novel': 0.5, 'accuracy_harmonic': 0.5,
     'accuracy_average': 0.75, 'accuracy_drop': 0.5}
    """

    correct: Tensor
    total: Tensor

    def __init__(
        self,
        num_classes: int,
        num_sessions: int,
        base_classes: int | Tensor,
        *,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_size("num_classes", num_classes)
        require_size("num_sessions", num_sessions)
        if not isinstance(base_classes, Tensor):
            require_size("base_classes", base_classes)
            require(
                base_classes <= num_classes,
                f"base_classes must be at most num_classes = {num_classes}, got {base_classes}",
            )
            base_classes = torch.arange(base_classes)
        require_class_indices(base_classes, "base_classes")
        require_groups({"base_classes": base_classes}, num_classes)
        self.num_classes = num_classes
        self.num_sessions = num_sessions
        self.ignore_index = ignore_index
        # One column of ones for the base classes, one for the others.
        base = torch.zeros(num_classes, dtype=torch.int64).index_fill(0, base_classes.long().cpu(), 1)
        self.membership = torch.stack((base, 1 - base), -1)
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(num_sessions, 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor, session: int) -> None:
        """Add a batch of the test after a session.

        Args:
            predictions: logits ``(B, K)``, or classes ``(B,)``. Logits of classes that are still to come are
                minus infinity, or lower than all others.
            targets: ``(B,)``.
            session: in [0, num_sessions).

        Raises:
            InvalidArgumentError: shapes or dtypes that do not fit, targets or a session out of range.
            NonFiniteError: NaN or plus infinity in logits.
        """
        require_size("session", session, at_least=0)
        require(
            session < self.num_sessions,
            f"session must be in [0, num_sessions) = [0, {self.num_sessions}), got {session}",
        )
        hits = class_hits(predictions, targets, self.num_classes, self.ignore_index)
        for state, found in zip((self.correct, self.total), hits, strict=True):
            counts = found.unsqueeze(-1) * self.membership.to(found.device)
            state[session] += counts.sum(0).to(state.device)

    def compute(self) -> dict[str, Tensor]:
        """The accuracies after the last session that was tested, float64 scalars by name."""
        return session_measures(self.correct, self.total)

    def by_session(self) -> Tensor:
        """The accuracy after each session, ``(sessions,)`` float64, up to the last one that was tested.

        Raises:
            InvalidArgumentError: a session before the last one has not been tested.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            correct, total = self.correct.sum(-1).double(), self.total.sum(-1).double()
        require(bool((total > 0).any()), "no sample has been seen: call update first")
        sessions = int((total > 0).nonzero().max()) + 1
        missing = (total[:sessions] == 0).nonzero().flatten().tolist()
        require(not missing, f"the sessions {missing} have no sample: call update for each session")
        return correct[:sessions] / total[:sessions]
