"""The outer loop: a set is learned step by step, in a checkpoint that it can go on from."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comparison import checkpoints
from etflayers.distill import DistilledSet

Row = dict[str, Any]


@dataclass(frozen=True)
class Learned:
    """A finished run: the set, every outer step, and the seconds they took."""

    distilled: DistilledSet
    history: list[Row]
    seconds: float


class OuterRun(ABC):
    """Everything that changes from one outer step to the next.

    Args:
        distilled: the set before it is learned.
        groups: of its parameters, each with the learning rate of Adam at the start, which falls to 0 as a
            cosine.
        steps: how many outer steps there will be.
        generator: of all that is random.
    """

    def __init__(
        self, distilled: DistilledSet, groups: list[dict[str, Any]], steps: int, generator: torch.Generator
    ) -> None:
        self.distilled = distilled
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.steps = steps
        self.generator = generator
        self.step = 0
        self.seconds = 0.0
        self.history: list[Row] = []

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "distilled": self.distilled.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state` returned."""
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.distilled.load_state_dict(state["distilled"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())

    def advance(self) -> Row:
        """One outer step and its row of the history."""
        started = time.perf_counter()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.optimizer.zero_grad()
        row = self.update()
        self.step += 1
        self.seconds += time.perf_counter() - started
        self.history.append(row)
        return row

    @abstractmethod
    def update(self) -> Row:
        """Find the gradients and take a step of the optimizer."""

    def finish(
        self,
        checkpoint: Path | None,
        fingerprint: dict[str, Any],
        *,
        resume: bool,
        every: int,
        device: torch.device,
        progress: Callable[[int, Row], None],
    ) -> Learned:
        """Take all outer steps, or with ``resume`` those after the checkpoint; write it ``every`` so many.

        Raises:
            InvalidArgumentError: a checkpoint of a run with another fingerprint.
        """
        if checkpoint is not None:
            if resume and checkpoint.exists():
                self.load(checkpoints.load(checkpoint, fingerprint, device))
            else:
                checkpoint.unlink(missing_ok=True)
        while self.step < self.steps:
            row = self.advance()
            if checkpoint is not None and (self.step == self.steps or self.step % every == 0):
                checkpoints.save(checkpoint, {"fingerprint": fingerprint, **self.state()})
            progress(self.step, row)
        return Learned(self.distilled, self.history, self.seconds)
