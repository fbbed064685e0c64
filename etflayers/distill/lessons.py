"""Ordinary training on a learned set: what its user does with it, by PyTorch's own optimizers.

The same steps as those of the unrolled loop that a set is learned by, without a graph through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from etflayers.checks import require
from etflayers.distill.distilled_set import DistilledSet
from etflayers.distill.objective import InnerLoss, cross_entropy

__all__ = ["UPDATE_RULES", "Lesson", "UpdateRule", "teach"]

Network = TypeVar("Network", bound=nn.Module)
UpdateRule = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
UPDATE_RULES: dict[str, UpdateRule] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
}


@dataclass(frozen=True)
class Lesson:
    r"""A training: samples, the batches they come in, and the learning rate and rule of each step.

    Args:
        inputs: ``(n, ...)``.
        labels: class indices ``(n,)`` or soft labels ``(n, K)``.
        batches: ``(S, B)``, the numbers of the samples of each batch; they are gone through in turn.
        rates: ``(T,)``, the learning rate of each of T steps.
        optimizer: a name in ``UPDATE_RULES`` (``"sgd"``, ``"momentum"`` of 0.9 or ``"adam"``), or a function
            that makes an optimizer of parameters.

    Raises:
        InvalidArgumentError: another optimizer, or shapes that do not fit.

    >>> rates = torch.full((6,), 0.1)
    >>> distilled = DistilledSet.from_noise((4,), 2, per_class=3, rates=rates)
    >>> lesson = Lesson.of(distilled, steps=3, optimizer="sgd")
    >>> lesson.batches.tolist(), lesson.steps
    ([[0, 1], [2, 3], [4, 5]], 6)
    """

    inputs: Tensor
    labels: Tensor
    batches: Tensor
    rates: Tensor
    optimizer: str | UpdateRule

    def __post_init__(self) -> None:
        require(
            callable(self.optimizer) or self.optimizer in UPDATE_RULES,
            f"optimizer must be one of {', '.join(UPDATE_RULES)}, or a function such as torch.optim.SGD, got "
            f"{self.optimizer!r}",
        )
        require(
            len(self.inputs) == len(self.labels) and self.batches.ndim == 2 and self.rates.ndim == 1,
            "inputs and labels must be as many, batches have shape (S, B) and rates (T,), got "
            f"{[tuple(x.shape) for x in (self.inputs, self.labels, self.batches, self.rates)]}",
        )

    @classmethod
    def of(cls, distilled: DistilledSet, steps: int, optimizer: str | UpdateRule) -> Lesson:
        """The training that a set with rates was learned for.

        Args:
            distilled: the set; its tensors are taken without their graph.
            steps: S, the number of batches, as in :meth:`DistilledSet.batches`.
            optimizer: the rule.

        Returns:
            The lesson, of as many steps as there are rates.

        Raises:
            InvalidArgumentError: the inputs cannot be split equally, or the set has no rates.
        """
        inputs, _ = distilled.batches(steps)
        numbers = torch.arange(len(distilled.inputs), device=inputs.device).view(inputs.shape[:2])
        labels, rates = distilled.labels.detach(), distilled.rates.detach()
        return cls(distilled.inputs.detach(), labels, numbers, rates, optimizer)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.rates)

    def scaled(self, rate: float) -> Lesson:
        """The same with all rates times a number."""
        return replace(self, rates=self.rates * rate)

    def in_other_epochs(self, epochs: int) -> Lesson:
        r"""The same for another number of passes over the batches.

        The rate of batch s in epoch e is the learned one, ``rates[e S + s]``, for the E epochs that there
        are rates for, and that of the last of these, ``rates[(E - 1) S + s]``, after them.

        Args:
            epochs: at least 1.

        Returns:
            The lesson, of ``epochs`` S steps.

        Raises:
            InvalidArgumentError: a number below 1, or rates that are not those of whole epochs.

        >>> distilled = DistilledSet.from_noise(
        ...     (4,), 2, per_class=2, rates=torch.tensor([4.0, 3.0, 2.0, 1.0])
        ... )
        >>> lesson = Lesson.of(distilled, steps=2, optimizer="sgd")
        >>> lesson.in_other_epochs(3).rates.round(), lesson.in_other_epochs(1).rates.round()
        (tensor([4., 3., 2., 1., 2., 1.]), tensor([4., 3.]))
        """
        require(isinstance(epochs, int) and epochs >= 1, f"epochs must be an integer >= 1, got {epochs!r}")
        steps = len(self.batches)
        require(
            self.steps >= steps and self.steps % steps == 0,
            f"rates must be those of whole epochs of {steps} batches, got {self.steps} rates: make the "
            "lesson with as many rates as it has batches, or a multiple of that",
        )
        learned = self.rates.view(-1, steps)
        numbers = torch.arange(epochs, device=learned.device).clamp(max=len(learned) - 1)
        return replace(self, rates=learned[numbers].flatten())

    def in_other_order(self, generator: torch.Generator | None = None) -> Lesson:
        """The same batches in random order, with the rates of the places they come to."""
        order = torch.randperm(len(self.batches), generator=generator).to(self.batches.device)
        return replace(self, batches=self.batches[order])

    def in_other_batches(self, generator: torch.Generator | None = None) -> Lesson:
        """The same samples in random batches, which need not be balanced."""
        order = torch.randperm(self.batches.numel(), generator=generator).to(self.batches.device)
        return replace(self, batches=self.batches.flatten()[order].view_as(self.batches))


def teach(
    network: Network,
    lesson: Lesson,
    *,
    loss: InnerLoss = cross_entropy,
    after_step: Callable[[int], Any] = lambda steps: None,
) -> Network:
    """Train a network, in training mode, and return it.

    Args:
        network: changed in place.
        lesson: what it is trained on, and how.
        loss: of the network, inputs and labels of a batch.
        after_step: called after each step with the number of those done.

    Returns:
        The network.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959.

    >>> distilled = DistilledSet.from_noise((4,), 2, per_class=1, labels="one-hot", rates=torch.ones(20))
    >>> network = teach(nn.Linear(4, 2), Lesson.of(distilled, steps=1, optimizer="sgd"))
    >>> network(distilled.inputs).argmax(-1)
    tensor([0, 1])
    """
    network.train()
    rule = lesson.optimizer if callable(lesson.optimizer) else UPDATE_RULES[lesson.optimizer]
    optimizer = rule(network.parameters())
    for step, rate in enumerate(lesson.rates.tolist()):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        batch = lesson.batches[step % len(lesson.batches)]
        value = loss(network, lesson.inputs[batch], lesson.labels[batch])
        torch.autograd.backward(value)
        optimizer.step()
        after_step(step + 1)
    return network
