"""Images, labels and learning rates that are learned by differentiating through the training on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from distillation.common import OuterRun, first_set
from distillation.images_settings import ImagesSettings
from distillation.objective import Objective
from distillation.penalty import within_between
from distillation.starts import VALIDATION_SEEDS, Starts, main_factory
from distillation.validation import Validation
from distillation.view import View
from etflayers import distill
from etflayers.checks import require
from etflayers.distill.evaluation import Measures
from etflayers.errors import NonFiniteError
from lab.data import ImageData
from lab.data.sampling import random_shifts, shifted
from lab.files import Row
from lab.networks import own_stream, seeded
from lab.ranks import gathered, rank, share, world_size

ADJOINTS = {"auto": distill.AutoAdjoint, "steps": distill.StepAdjoint, "kept": distill.KeptGraph}


class Unrolled(OuterRun):
    """A set learned by hypergradients through unrolled training.

    Several ranks draw the same networks and batches and each trains its share of them: the mean over ranks of
    their hypergradients is that of one process that trains all side by side. Dropout and augmentation of the
    steps are others.

    Args:
        settings: of everything.
        seed: of everything random.
        data: real images; only the training set is looked at.
        starts: where the networks start.
        objective: what the images are learned for.

    Raises:
        InvalidArgumentError: batches too small for the collapse of real images.
    """

    def __init__(
        self, settings: ImagesSettings, seed: int, data: ImageData, starts: Starts, objective: Objective
    ) -> None:
        require(
            settings.collapse_weight == 0
            or settings.collapse_of == "learned"
            or settings.outer_batch >= 2 * data.num_classes,
            "--collapse-of real needs several images of a class in a batch: --outer-batch of at least "
            f"{2 * data.num_classes}, got {settings.outer_batch}",
        )
        self.source, self.objective, self.headline = starts.source, objective, objective.headline
        if settings.validate_every:
            train, held = data.held_out()
            data = replace(data, train=train, validation=held)
        self.view = View(data)
        # Two networks of one kind: steps are re-derived in the mode they were taken in, training, while the
        # outer loss sees the trained network as its user would.
        factory = main_factory(settings, data)
        trainee, self.judge = seeded(factory, seed).train(), seeded(factory, seed).eval()
        self.clip = distill.RunningNormClip(factor=settings.clip)
        momentum = 0.9 if settings.optimizer == "momentum" else 0.0
        rule = distill.Adam() if settings.optimizer == "adam" else distill.SGD(momentum=momentum)
        adjoint = ADJOINTS[settings.adjoint]()
        options: dict[str, Any] = {"optimizer": rule, "adjoint": adjoint, "epochs": settings.epochs}
        self.loop = distill.UnrolledInnerLoop(trainee, loss=settings.trainee_loss, **options)
        rates = {"inputs": settings.image_rate, "log_rates": settings.log_rate, "labels": settings.label_rate}
        parts = {"pool": self.source} if isinstance(self.source, distill.OnlinePool) else {}
        generator, distilled = torch.Generator().manual_seed(seed), set_before(settings, data, seed)

        every, patience = settings.validate_every, settings.patience
        validation = Validation(partial(self._score, starts), every, patience)
        super().__init__(
            settings, seed, data, distilled, generator, rates, validation=validation, clip=self.clip, **parts
        )
        for group in self.optimizer.param_groups:
            group["betas"] = settings.outer_betas

    def factor(self) -> float:
        return self.settings.outer_factor(self.step, self.total)

    def _score(self, starts: Starts) -> float:
        """What networks trained on the set make of the validation images; the first rank's answer counts."""
        return gathered(self._look(starts) if rank() == 0 else 0.0)[0]

    def _look(self, starts: Starts) -> float:
        _, held = self.data.held_out()
        lesson = distill.Lesson.of(self.distilled, self.settings.steps, self.settings.optimizer)
        how: dict[str, Any] = {"count": starts.looks, "judge": self.objective.judge}
        how["loss"] = self.settings.trainee_loss
        with own_stream(VALIDATION_SEEDS + self.seed):
            curves = distill.evaluate([lesson], starts.watched, held.images, held.targets, **how)
        return fmean(curve[-1][1][self.headline] for curve in curves)

    def update(self) -> Row:
        """The mean hypergradient over some networks, clipped, and a step of Adam."""
        row: Row = {"step": self.step, **self.hypergradient()}
        return row | self.descend()

    def hypergradient(self) -> Row:
        """Add up the gradients of the networks of this rank; what all ranks have seen."""
        settings = self.settings
        own, row = settings.networks // world_size(), {"loss": 0.0}
        together = settings.together and not isinstance(self.source, distill.OnlinePool)
        # One by one, the graph of a network is gone before that of the next is made.
        for count in (own,) if together else (1,) * own:
            losses = []
            for state, batch in self._trained(count):
                loss, measures = self._outer(state, *batch)
                losses.append(loss / own)
                for name, value in measures.items():
                    row[name] = row.get(name, 0.0) + value / own
            total = torch.stack(losses).sum()
            total.backward()
            row["loss"] += total.item()
        rows = gathered(row)
        row = {name: fmean(each[name] for each in rows) for name in row}
        if not math.isfinite(row["loss"]):
            raise NonFiniteError(
                f"the outer loss of step {self.step} is {row['loss']}: take a smaller --rate, --image-rate "
                "or --log-rate, or a --window"
            )
        return row

    def descend(self) -> Row:
        """A step of Adam along the mean of the gradients over ranks, clipped."""
        learned = list(self.distilled.parameters())
        distill.average_gradients(learned)
        length = float(self.clip(learned))
        self.optimizer.step()
        return {"gradient_norm": length, "mean_rate": self.distilled.rates.mean().item()}

    def _outer(self, state: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> tuple[Tensor, Measures]:
        logits = functional_call(self.judge, dict(state), (inputs,))
        loss, measures = self.objective.loss(logits, targets), self.objective.judge(logits.detach(), targets)
        if weight := self.settings.collapse_weight:
            of = self.settings.collapse_of
            if of == "learned":
                inputs, targets = (part.flatten(0, 1) for part in self.distilled.batches(1))
            quotient = self._collapse(state, inputs, targets)
            loss, measures = loss + weight * quotient.log(), {**measures, f"{of}_nc1": quotient.item()}
        return loss, measures

    def _collapse(self, state: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        """NC1 of images in the trained network."""
        classes = labels if labels.ndim == 1 else labels.argmax(1)
        body = self.judge.get_submodule("body")
        own = {name: state[f"body.{name}"] for name in body.state_dict()}
        features = functional_call(body, own, (inputs,))
        return within_between(features, classes, self.data.num_classes)

    def _trained(self, count: int) -> Iterator[tuple[dict[str, Tensor], tuple[Tensor, Tensor]]]:
        """Parameters and buffers of some networks after training, and real images to judge each by.

        All ranks draw for all, so that they go on alike; the r-th of R takes every R-th.
        """
        every = count * world_size()
        starts = share([self.source(self.generator) for _ in range(every)])
        trained = self._train(distill.stack_states(starts) if count > 1 else starts[0], count)
        if isinstance(self.source, distill.OnlinePool):
            aged = distill.InitialState(trained.params, trained.buffers)
            self.source.put_back(aged, steps=self.settings.inner_steps)
        state = trained.state
        for number in range(every):
            batch = self._real_batch()
            index, owner = divmod(number, world_size())
            if owner == rank():
                yield ({n: v[index] for n, v in state.items()} if count > 1 else state), batch

    def _real_batch(self) -> tuple[Tensor, Tensor]:
        inputs, targets = self.data.train.batch(self.settings.outer_batch, self.generator)
        if most := self.settings.shift:
            shifts = random_shifts(len(inputs), most, self.generator).to(inputs.device)
            inputs = self.view.changed(inputs, [partial(shifted, shifts=shifts)])
        if (augmentation := self.settings.augmentation) is not None:
            inputs = augmentation(inputs, self.generator)
        return inputs, targets

    def _train(self, start: distill.InitialState, count: int) -> distill.InnerSolution:
        inputs, labels = self.distilled.batches(self.settings.steps)
        return self.loop(
            inputs,
            labels,
            lr=self.distilled.rates,
            params=start.params,
            buffers=start.buffers,
            window=self._window(),
            generator=self.generator,
            initializations=count if count > 1 else None,
        )

    def _window(self) -> range | None:
        length, steps, name = self.settings.window_steps, self.settings.inner_steps, self.settings.window
        if name == "random":
            return distill.random_window(length, steps, generator=self.generator)
        if name == "moving":
            return distill.moving_window(length, steps, progress=self.step / max(1, self.total - 1))
        return None if name == "full" else distill.last_window(length, steps)


def set_before(settings: ImagesSettings, data: ImageData, seed: int) -> distill.DistilledSet:
    """The set before it is learned."""
    labels = "hard" if settings.labels == "hard" else "one-hot"
    rates = torch.full((settings.inner_steps,), settings.first_rate)
    generator = torch.Generator().manual_seed(seed)
    return first_set(settings.start, settings.per_class, data, generator, labels=labels, rates=rates)
