"""The outer loop: images, labels and learning rates are learned, in a checkpoint that it can go on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from distillation.data import RealData
from distillation.images.outer import Measures, OuterObjective
from distillation.images.settings import ImagesSettings
from distillation.images.starts import Starts, main_factory
from distillation.networks import seeded
from distillation.outer_loop import Learned, OuterRun, Row
from distillation.settings import StartName
from etflayers.distill import (
    SGD,
    Adam,
    DistilledSet,
    InitialState,
    InnerSolution,
    KeptGraph,
    OnlinePool,
    RunningNormClip,
    StepAdjoint,
    kmeans_centers,
    last_window,
    moving_window,
    partial_means,
    random_samples,
    random_window,
    stack_states,
    unrolled_inner_loop,
)
from etflayers.distill.optimizers import InnerOptimizer
from etflayers.errors import NonFiniteError

REPRESENTATIVES = {"real": random_samples, "kmeans": kmeans_centers, "means": partial_means}
MOMENTUM = 0.9


def inner_optimizer(settings: ImagesSettings) -> InnerOptimizer:
    """The rule of the inner steps."""
    if settings.optimizer == "adam":
        return Adam()
    return SGD(momentum=MOMENTUM if settings.optimizer == "momentum" else 0.0)


def inner_loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, of a model that is given the labels too: the nearest-ETF head learns from them."""
    return F.cross_entropy(model(images, labels), labels)


def first_set(settings: ImagesSettings, data: RealData, start: StartName, seed: int) -> DistilledSet:
    """The set before it is learned."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {
        "count": settings.per_class,
        "labels": "hard" if settings.labels == "hard" else "one-hot",
        "num_classes": data.num_classes,
        "rates": torch.full((settings.inner_steps,), settings.first_rate),
        "generator": generator,
        **data.normalization,
    }
    if start == "noise":
        return DistilledSet.from_noise(data.shape, **options).to(data.train.inputs.device)
    train = data.train
    return DistilledSet.from_data(
        train.inputs, train.targets, representatives=REPRESENTATIVES[start], **options
    ).to(train.inputs.device)


def learn(
    settings: ImagesSettings,
    seed: int,
    data: RealData,
    starts: Starts,
    objective: OuterObjective,
    checkpoint: Path | None = None,
    progress: Callable[[int, Row], None] = lambda step, row: None,
) -> Learned:
    """Learn a set, or go on with learning it.

    Args:
        settings: of everything.
        seed: of everything random.
        data: real images; only the training set is looked at.
        starts: where the networks start.
        objective: what the images are learned for.
        checkpoint: where to keep the state; with ``settings.resume`` also where to go on from.
        progress: told the steps done and the newest row of the history after each.

    Raises:
        InvalidArgumentError: arguments that do not fit, or a checkpoint of a run with other settings.
        NonFiniteError: the inner or the outer training has diverged.
    """
    return _Run(settings, seed, data, starts, objective).finish(
        checkpoint,
        {**settings.fingerprint(), "seed": seed},
        resume=settings.resume,
        every=settings.checkpoint_every,
        device=settings.torch_device,
        progress=progress,
    )


class _Run(OuterRun):
    """Hypergradients through unrolled training."""

    def __init__(
        self,
        settings: ImagesSettings,
        seed: int,
        data: RealData,
        starts: Starts,
        objective: OuterObjective,
    ) -> None:
        self.settings = settings
        self.data = data
        self.source = starts.source
        self.objective = objective
        self.rule = inner_optimizer(settings)
        # Two networks of one kind: steps are re-derived in the mode they were taken in, training, while the
        # outer loss sees the trained network as its user would.
        factory = main_factory(settings, data)
        self.trainee, self.judge = seeded(factory, seed).train(), seeded(factory, seed).eval()
        distilled = first_set(settings, data, settings.start, seed)
        groups: list[dict[str, Any]] = [
            {"params": [distilled.inputs], "lr": settings.image_rate},
            {"params": [distilled.log_rates], "lr": settings.log_rate},
        ]
        if isinstance(distilled.labels, nn.Parameter):
            groups.append({"params": [distilled.labels], "lr": settings.label_rate})
        self.clip = RunningNormClip(factor=settings.clip)
        super().__init__(distilled, groups, settings.outer_steps, torch.Generator().manual_seed(seed))

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        pool = self.source.state_dict() if isinstance(self.source, OnlinePool) else None
        return {**super().state(), "clip": self.clip.state_dict(), "pool": pool}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state` returned."""
        super().load(state)
        self.clip.load_state_dict(state["clip"])
        if isinstance(self.source, OnlinePool):
            self.source.load_state_dict(state["pool"])

    def update(self) -> Row:
        """The mean hypergradient over some networks, clipped, and a step of Adam."""
        settings = self.settings
        row: Row = {"step": self.step, "loss": 0.0}
        together = settings.together and settings.networks > 1 and not isinstance(self.source, OnlinePool)
        # One by one, the graph of a network is gone before that of the next is made.
        for count in (settings.networks,) if together else (1,) * settings.networks:
            losses = []
            for state in self._trained(count):
                loss, measures = self._outer(state)
                losses.append(loss / settings.networks)
                for name, value in measures.items():
                    row[name] = row.get(name, 0.0) + value / settings.networks
            total = torch.stack(losses).sum()
            total.backward()
            row["loss"] += total.item()
        if not math.isfinite(row["loss"]):
            raise NonFiniteError(
                f"the outer loss of step {self.step} is {row['loss']}: take a smaller --rate, --image-rate "
                "or --log-rate, or a --window"
            )
        row["gradient_norm"] = float(self.clip(self.distilled.parameters()))
        self.optimizer.step()
        row["mean_rate"] = self.distilled.rates.mean().item()
        return row

    def _outer(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Measures]:
        inputs, targets = self.data.train.batch(self.settings.outer_batch, self.generator)
        logits = functional_call(self.judge, dict(state), (inputs,))
        return self.objective.loss(logits, targets), self.objective.measures(logits.detach(), targets)

    def _trained(self, count: int) -> list[dict[str, Tensor]]:
        """Parameters and buffers of some networks after training."""
        starts = [self.source(self.generator) for _ in range(count)]
        if count > 1:
            together = self._train(stack_states(starts), count).state
            return [{name: value[index] for name, value in together.items()} for index in range(count)]
        trained = self._train(starts[0])
        if isinstance(self.source, OnlinePool):
            state = InitialState(trained.params, trained.buffers)
            self.source.put_back(state, steps=self.settings.inner_steps)
        return [trained.state]

    def _train(self, start: InitialState, together: int | None = None) -> InnerSolution:
        settings = self.settings
        inputs, labels = self.distilled.batches(settings.steps)
        return unrolled_inner_loop(
            self.trainee,
            start.params,
            inputs,
            labels,
            lr=self.distilled.rates,
            epochs=settings.epochs,
            loss=inner_loss,
            optimizer=self.rule,
            adjoint=StepAdjoint() if settings.adjoint == "steps" else KeptGraph(),
            window=self._window(),
            buffers=start.buffers,
            generator=self.generator,
            initializations=together,
        )

    def _window(self) -> range | None:
        settings = self.settings
        length, steps = settings.window_steps, settings.inner_steps
        if settings.window == "full":
            return None
        if settings.window == "last":
            return last_window(length, steps)
        if settings.window == "random":
            return random_window(length, steps, generator=self.generator)
        return moving_window(length, steps, progress=self.step / max(1, settings.outer_steps - 1))
