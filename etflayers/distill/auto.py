"""The faster adjoint of the inner loop that fits into memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from etflayers.checks import require, require_size
from etflayers.distill.adjoints import InnerAdjoint, KeptGraph, StepAdjoint, Trained
from etflayers.distill.objective import Buffers
from etflayers.distill.peak_memory import PeakMemory, extrapolated
from etflayers.distill.problem import Controls, InnerProblem

__all__ = ["AutoAdjoint"]


@dataclass(frozen=True)
class AutoAdjoint:
    """Keep the graph of all steps where it is small enough, and re-derive the steps where it is not.

    :class:`KeptGraph` runs each step once and :class:`StepAdjoint` twice, so that the first is faster as long
    as there is memory for it. How much it takes is found from runs of two and of three steps, once for each
    kind of model and optimizer and for each size. The limit is a number of bytes, and not what happens to be
    free, so that a run that is continued chooses as it did before: the two agree to rounding only.

    Args:
        memory: bytes that the graph of all steps may take.
        rederived: what is used where it takes more.

    Raises:
        InvalidArgumentError: ``memory`` is no integer >= 1, or ``rederived`` no :class:`StepAdjoint`.

    Reference:
        Maclaurin, Duvenaud, Adams (2015), arXiv 1502.03492; Chen, Xu, Zhang, Guestrin (2016), arXiv
        1604.06174.

    >>> from etflayers.distill import UnrolledInnerLoop
    >>> loop = UnrolledInnerLoop(torch.nn.Linear(2, 2), adjoint=AutoAdjoint(memory=2**20), epochs=5)
    >>> images, labels = torch.randn(1, 4, 2, requires_grad=True), torch.tensor([[0, 0, 1, 1]])
    >>> loop(images, labels, lr=0.1).params["weight"].sum().backward()
    >>> loop.adjoint.choices
    [KeptGraph()]
    """

    memory: int = 2**30
    rederived: StepAdjoint = field(default_factory=StepAdjoint)
    _fits: dict[tuple[object, ...], bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_size("memory", self.memory)
        require(
            isinstance(self.rederived, StepAdjoint),
            f"rederived must be a StepAdjoint, got {type(self.rederived).__name__}",
        )

    @property
    def kept(self) -> KeptGraph:
        """What is used where it fits."""
        return KeptGraph()

    @property
    def choices(self) -> list[InnerAdjoint]:
        """What has been chosen, for each kind of model and sizes in the order in which they came."""
        return [self.kept if fits else self.rederived for fits in self._fits.values()]

    def fits(self, size: int) -> bool:
        """Whether a graph of so many bytes is kept."""
        return size <= self.memory

    def held(self, steps: int) -> int:
        """An upper bound: the graphs of all steps."""
        return steps

    def __call__(
        self, problem: InnerProblem, theta: Tensor, buffers: Buffers, controls: Controls, window: range
    ) -> Trained:
        """See :class:`InnerAdjoint`."""
        adjoint = self._chosen(problem, theta, buffers, controls, window)
        return adjoint(problem, theta, buffers, controls, window)

    def _chosen(
        self, problem: InnerProblem, theta: Tensor, buffers: Buffers, controls: Controls, window: range
    ) -> InnerAdjoint:
        if not window:
            return self.kept  # of nothing
        kinds = tuple(type(part).__qualname__ for part in (problem.objective.model, problem.optimizer))
        sizes = tuple((value.shape, value.dtype, value.requires_grad) for value in (theta, *controls))
        key = (kinds, problem.objective.copies, len(window), sizes)
        if key not in self._fits:

            def peak(steps: int) -> int:
                return _peak(problem, theta, buffers, controls, steps)

            self._fits[key] = self.fits(extrapolated(peak, len(window), len(window)))
        return self.kept if self._fits[key] else self.rederived


def _peak(problem: InnerProblem, theta: Tensor, buffers: Buffers, controls: Controls, steps: int) -> int:
    """Peak bytes of a kept graph of the first steps, and of the way back through it."""
    with PeakMemory() as memory:
        leaves = [value.detach().requires_grad_(value.requires_grad) for value in (theta, *controls)]
        start, *given = leaves
        trained = KeptGraph()(problem, start, buffers, tuple(given), range(steps))
        variables = [value for value in leaves if value.requires_grad]
        if trained.theta.requires_grad:
            torch.autograd.grad(trained.theta.square().sum(), variables, allow_unused=True)
    return int(memory.peak)
