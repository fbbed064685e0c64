"""Runs that can be killed at any moment and continued to the same numbers."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etflayers.checks import require
from etflayers.errors import NonFiniteError
from lab import files
from lab.files import Row
from lab.ranks import gathered, rank

Progress = Callable[[int, int, "Row | None"], None]  # steps taken, steps in all, a new row of the history


def in_silence(step: int, total: int, row: Row | None) -> None:
    """The progress that nobody looks at."""


class Stream:
    """A generator as a part of a run's state."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["stream"].cpu())


class GlobalStreams:
    """The global generators, on which layers such as dropout draw, of every rank."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        streams = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            streams["cuda"] = torch.cuda.get_rng_state(self.device)
        return {"ranks": gathered(streams)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        streams = state["ranks"][rank()]
        torch.set_rng_state(streams["cpu"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(streams["cuda"].cpu(), self.device)


class Run(ABC):
    """Something that takes steps and notes what it sees in a history.

    Attributes:
        parts: everything that a step changes, by name, each with ``state_dict`` and ``load_state_dict``.
        fingerprint: what decides the numbers.
        total: how many steps there will be.
        step: how many have been taken.
        seconds: what they took, as far as a step counts them by :meth:`clock`.
        history: the rows.
    """

    device = torch.device("cpu")

    def __init__(self, parts: Mapping[str, Any], fingerprint: Mapping[str, Any], total: int) -> None:
        self.parts = dict(parts)
        self.fingerprint = dict(fingerprint)
        self.total = total
        self.step = 0
        self.seconds = 0.0
        self.history: list[Row] = []

    @abstractmethod
    def advance(self) -> Row | None:
        """Take the step of number ``step``, counted from 0, and return what there is to note of it."""

    def begin(self) -> Row | None:
        """What there is to note before the first step."""
        return None

    @property
    def over(self) -> bool:
        """Whether no step is left: all are taken, or one that stops by itself has seen enough."""
        return self.step == self.total

    def due(self, every: int) -> bool:
        """Whether the state is to be kept now."""
        return self.over or self.step % every == 0

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        own = {"step": self.step, "seconds": self.seconds, "history": self.history}
        return {"fingerprint": self.fingerprint, **own, **parts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state` returned."""
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def finish(
        self,
        checkpoint: Path | None = None,
        *,
        resume: bool = False,
        every: int = 100,
        progress: Progress = in_silence,
    ) -> None:
        """Take all steps, or with ``resume`` those after the checkpoint, which is written every so many.

        Raises:
            InvalidArgumentError: a checkpoint of a run with another fingerprint.
        """
        if checkpoint is not None and resume and checkpoint.exists():
            self.restore(files.load(checkpoint, self.fingerprint, self.device))
            progress(self.step, self.total, None)
        else:
            # What an earlier run left here is over: a kill before the first checkpoint must not revive it.
            if checkpoint is not None and rank() == 0:
                checkpoint.unlink(missing_ok=True)
            progress(0, self.total, self._note(self.begin()))
        while not self.over:
            row = self.advance()
            self.step += 1
            self._note(row)
            if checkpoint is not None and self.due(every):
                state = self.state()  # which all ranks gather
                if rank() == 0:
                    files.save(checkpoint, state)
            progress(self.step, self.total, row)

    def _note(self, row: Row | None) -> Row | None:
        if row is not None:
            self.history.append(row)
        return row

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the time inside the block."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


class EpochRun(Run):
    """A run whose steps are the batches of epochs; a continued one draws an epoch again and skips what was.

    Attributes:
        model: what is trained.
        steps_per_epoch: batches of one epoch.
    """

    model: nn.Module
    steps_per_epoch: int
    _to_come: Iterator[Any] | None = None

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """The batches of the current epoch that are still to come."""

    def shuffled(self, seed: int, count: int) -> tuple[Tensor, torch.Generator]:
        """Numbers of the samples in the order of the current epoch, and the generator after drawing them.

        Both come from the seed and the epoch alone, so that a continued run draws the same ones.
        """
        generator = torch.Generator().manual_seed((seed << 32) + self.step // self.steps_per_epoch)
        return torch.randperm(count, generator=generator), generator

    def batch_slices(self, size: int) -> Iterator[slice]:
        """Where in that order the batches of the current epoch are that are still to come."""
        done = self.step % self.steps_per_epoch
        for start in range(done * size, self.steps_per_epoch * size, size):
            yield slice(start, start + size)

    def next_batch(self) -> Any:
        """The batch of this step."""
        if self._to_come is None:
            self.model.train()
            self._to_come = self.batches()
        return next(self._to_come)

    def finished_epoch(self) -> int | None:
        """The number of the epoch that ends with this step, counted from 1, if one does."""
        epoch, left = divmod(self.step + 1, self.steps_per_epoch)
        if left:
            return None
        self._to_come = None
        return epoch


class LossRun(EpochRun):
    """An epoch run that notes the mean loss of each epoch.

    Attributes:
        losses: the sum of those of the current epoch.
    """

    losses = 0.0

    def mean_loss(self, name: str) -> float:
        """Of the epoch that ends with this step; the next one counts from zero.

        Raises:
            NonFiniteError: the training of this name has diverged.
        """
        mean, self.losses = self.losses / self.steps_per_epoch, 0.0
        if not math.isfinite(mean):
            raise NonFiniteError(f"training of {name} diverged: take a smaller --lr")
        return mean

    def state(self) -> dict[str, Any]:
        return super().state() | {"losses": self.losses}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.losses = state["losses"]


def steps_of_an_epoch(images: int, batch_size: int) -> int:
    """How many whole batches there are.

    Raises:
        InvalidArgumentError: not even one.
    """
    require(batch_size <= images, f"--batch-size {batch_size} is more than the {images} training images")
    return images // batch_size


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step of an optimizer against the gradient of a loss, with this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock shows work done and not work asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On CUDA choose deterministic kernels where there are any; the CPU's are deterministic as they are."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use this many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
