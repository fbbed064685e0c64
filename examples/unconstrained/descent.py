"""One run: gradient descent on the features, measured on the way, in a checkpoint that it can go on from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comparison import checkpoints
from etflayers.errors import NonFiniteError
from etflayers.metrics import class_statistics, collapse_measures, cosine_margins, read_classifier
from unconstrained.model import UnconstrainedFeatures, make_optimizers, objective
from unconstrained.settings import HeadName, Settings

Row = dict[str, Any]


class RunKey(NamedTuple):
    """What tells one run from another."""

    classes: int
    head: HeadName
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"K{self.classes}-{self.head}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Run:
    """A finished run: what was measured, and the seconds that the steps took, without measuring."""

    key: RunKey
    history: list[Row]
    seconds: float

    def steps_to(self, distance: float) -> int | None:
        """The first measured step at which the class means are this near to an ETF, if there is one."""
        return next((row["step"] for row in self.history if row["etf_distance"] <= distance), None)


def descend(
    key: RunKey,
    settings: Settings,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> Run:
    """Do the run, or the rest of it.

    Args:
        key: classes, head, learning rate, seed.
        settings: the rest.
        checkpoint: where to keep the state; with ``settings.resume`` also where to go on from.
        progress: told the step at every measurement.

    Raises:
        InvalidArgumentError: arguments that do not fit, or a checkpoint of a run with other settings.
        NonFiniteError: the descent has diverged.
    """
    model = UnconstrainedFeatures(key.head, key.classes, key.seed, settings)
    optimizers = make_optimizers(model, key.lr, settings)
    fingerprint = {**settings.fingerprint(), **key._asdict()}
    history: list[Row] = []
    first, before = 0, 0.0
    if checkpoint is not None and settings.resume and checkpoint.exists():
        state = checkpoints.load(checkpoint, fingerprint, torch.device("cpu"))
        first, before, history = state["step"], state["seconds"], state["history"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    started = time.perf_counter()

    def save(step: int) -> float:
        """Write the state before the given step, and return the seconds so far."""
        seconds = before + time.perf_counter() - started
        if checkpoint is not None:
            state = {
                "fingerprint": fingerprint,
                "step": step,
                "seconds": seconds,
                "history": history,
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            checkpoints.save(checkpoint, state)
        return seconds

    measured = set(settings.measured_steps())
    # The checkpoint of a finished run holds the step after its last: there is nothing left to do.
    for step in range(first, settings.steps + 1):
        if step > first and step % settings.checkpoint_every == 0:
            save(step)
        logits = model()
        loss = objective(model, logits, settings)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"{key.name} has diverged at step {step}: take a lower --lr")
        if step in measured:
            paused = time.perf_counter()
            history.append(measure(model, step, loss, logits))
            progress(step)
            started += time.perf_counter() - paused
        if step == settings.steps:
            break
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    seconds = before if first > settings.steps else save(settings.steps + 1)
    return Run(key, history, seconds)


@torch.no_grad()
def measure(model: UnconstrainedFeatures, step: int, loss: Tensor, logits: Tensor) -> Row:
    """The state after ``step`` steps, with the frame that the head took for it."""
    targets, inputs, classifier = model.targets, model.inputs, read_classifier(model.head)
    num_classes = logits.shape[-1]
    measures = collapse_measures(class_statistics(inputs, targets, num_classes), classifier)
    row: Row = {
        "step": step,
        "loss": loss.item(),
        "accuracy": (logits.argmax(-1) == targets).double().mean().item(),
        "etf_distance": measures["nc2_etf_distance_means"].item(),
        "margin": cosine_margins(inputs, targets, classifier.weight).double().mean().item(),
    }
    return row | {name: value.item() for name, value in measures.items()}
