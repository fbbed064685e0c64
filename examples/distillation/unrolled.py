"""Images, labels and learning rates that are learned by differentiating through the training on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import fmean
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from distillation.choices import JudgingSettings
from distillation.common import DistilHeadName, OuterRun, StartName, first_set, inner_loss
from distillation.penalty import within_between
from distillation.validation import Validation
from etflayers import distill
from etflayers.checks import require
from etflayers.distill.evaluation import Measures, accuracy, accuracy_by_class
from etflayers.errors import NonFiniteError
from lab.data import ImageData
from lab.data.sampling import random_shifts, shifted
from lab.files import Row, kept
from lab.networks import Factory, NetworkName, make_factory, own_stream, seeded
from lab.options import Count, Free, Natural, Positive
from lab.ranks import gathered, rank, require_devices, share, world_size
from lab.settings import DataName

# The learning rate that the inner steps start with, where the command line gives none.
ADJOINTS = {"auto": distill.AutoAdjoint, "steps": distill.StepAdjoint, "kept": distill.KeptGraph}
RATES = {"sgd": 0.05, "momentum": 0.01, "adam": 0.003}
PRETRAINING_BATCH, PRETRAINING_RATE = 64, 1e-3
Fresh = Callable[[int], nn.Module]  # makes the i-th network
# Far from the seeds of the runs, and from each other: no network of one kind is ever one of another.
POOL_SEEDS, FRESH_SEEDS, VALIDATION_SEEDS = 10**6, 2 * 10**6, 3 * 10**6
VALIDATION_NETWORKS = 5  # that each look trains, where it is not one known network
MADE_WITH = ("head", "width", "norm", "dropout", "weights")  # what makes a network beside its name


@dataclass(frozen=True, kw_only=True)
class ImagesSettings(JudgingSettings):
    """Learn images, their labels and learning rates by differentiating through the training on them."""

    default_out: ClassVar[str] = "runs/distill-images"
    small: ClassVar[dict[str, Any]] = {"data": "digits", "network": "mlp", "width": 32, "epochs": 10}
    small |= {"outer_steps": 60, "outer_batch": 128, "evaluations": 4, "draws": 2, "image_rate": 0.1}

    head: DistilHeadName = "linear"
    """linear: nn.Linear; standard: a learned weight with rows of length 1, without a bias; fixed, nearest:
    the ETF heads of this library."""
    initialization: Literal["fixed", "random", "pool", "online", "pretrained"] = "fixed"
    """Where the networks start that the images train. fixed: one network, known beforehand; random: a new one
    each time; pool: one of POOL known ones; online: one of POOL networks that train on the images while these
    are learned, each for at most MAX_AGE rounds; pretrained: one of POOL networks trained on SOURCE."""
    pool: Count = 8
    """Networks in the pool of `--initialization pool`, `online` and `pretrained`."""
    max_age: Count = 10
    """Rounds through the images after which the online pool replaces a network by a new one."""
    source: DataName | None = None
    """Data on which `--initialization pretrained` has trained its networks (default: those of --data)."""
    source_epochs: Count = 10
    """Passes over them."""

    per_class: Count = 1
    """Images of each class."""
    labels: Literal["hard", "soft"] = "hard"
    """soft: labels are learned too, and start one-hot."""
    start: StartName = "means"
    """What the images start from: noise, random real images, centers of k-means, or class means (of random
    parts of a class, if it has several images)."""
    steps: Count = 1
    """Batches into which the images are split; a step is taken on each in turn."""
    epochs: Count = 30
    """Passes over the batches: training takes STEPS times EPOCHS steps, each with its own learning rate."""
    optimizer: Literal["sgd", "momentum", "adam"] = "momentum"
    """The rule of the inner steps; momentum: 0.9."""
    rate: Positive | None = None
    """Learning rate of every inner step at the start (default: 0.05 sgd, 0.01 momentum, 0.003 adam)."""

    outer: Literal["classify", "misclassify"] = "classify"
    """What the images are learned for. misclassify: that a trained network takes images of class ATTACKED for
    class TARGET, and nothing else for anything else."""
    attacked: int = 0
    """Class that `--outer misclassify` attacks."""
    target: int = 1
    """Class for which it is to be taken."""
    outer_steps: Count = 200
    """Updates of the images."""
    outer_batch: Count = 512
    """Real images in the outer loss."""
    shift: Natural = 0
    """Shift each of them by up to this many pixels each way, so that few real images go further."""
    collapse_weight: float = 0.0
    """Adds this times log NC1 in the trained network to the outer loss, NC1 as the variance within classes
    over that between them: positive, to have images collapse; negative, to keep them from it."""
    collapse_of: Literal["learned", "real"] = "learned"
    """Whose collapse `--collapse-weight` weighs: that of the learned images, or of the real ones in the outer
    loss."""
    networks: Count = 1
    """Networks that each update averages over."""
    devices: Count = 1
    """Processes that share the networks of each update, each on a device of its own: CUDA with nccl, the CPU
    with gloo."""
    adjoint: Literal["auto", "steps", "kept"] = "auto"
    """How the hypergradient flows. steps: training steps are derived again going back, which takes little
    memory; kept: their graph is kept, which takes less time; auto: it is kept where it is small enough."""
    together: bool = True
    """Train the networks of an update side by side, by vmap, where there are several; not with
    `--initialization online`."""
    image_rate: Positive = 0.02
    """Adam's learning rate for images, before `--outer-schedule`."""
    label_rate: Positive = 0.02
    """Adam's learning rate for soft labels, likewise."""
    log_rate: Positive = 0.02
    """Adam's learning rate for the logarithms of the inner rates, likewise."""
    clip: Positive = 2.0
    """Hypergradients longer than this times their running length are shortened to it."""
    window: Literal["full", "last", "random", "moving"] = "full"
    """Inner steps through which the hypergradient flows: all, the last WINDOW_LENGTH, that many before a
    random end of training, or that many at a place that moves from the first steps to the last."""
    window_length: int | None = None
    """Steps in the window (default: half of them)."""

    validate_every: Natural = 0
    """Outer steps from one look at a validation set to the next. It is a fifth of the training images, which
    are then not learned from; the set that was best there is kept. 0: all training images are learned from,
    and the last set is kept."""
    patience: Count | None = None
    """Looks without a better one after which learning stops (default: it takes all its steps)."""

    evaluations: Free[Count] = 20
    """Fresh networks that are trained on the images when these are finished."""
    other_networks: Free[tuple[NetworkName, ...]] = ()
    """Architectures that are trained on them besides, which the images have not been learned for."""
    baselines: Free[bool] = True
    """Also train on random real images, centers of k-means and average images: as many, for as many steps."""
    draws: Free[Count] = 5
    """Sets of random real images."""

    @property
    def resolved(self) -> ImagesSettings:
        rate = {"sgd": 0.5, "momentum": 0.1, "adam": 0.01}[self.optimizer]
        return replace(super().resolved, rate=self.rate or rate) if self.quick else self

    @property
    def inner_steps(self) -> int:
        return self.steps * self.epochs

    @property
    def first_rate(self) -> float:
        return RATES[self.optimizer] if self.rate is None else self.rate

    @property
    def window_steps(self) -> int:
        return max(1, self.inner_steps // 2) if self.window_length is None else self.window_length

    def check(self) -> None:
        super().check()
        require(
            1 <= self.window_steps <= self.inner_steps,
            f"--window-length must lie in [1, {self.inner_steps}], the number of inner steps, got "
            f"{self.window_length}",
        )
        require(
            self.patience is None or self.validate_every > 0,
            "--patience counts looks at a validation set: add --validate-every",
        )
        require(
            self.source is None or self.initialization == "pretrained",
            "--source is the data of pretrained networks: add --initialization pretrained",
        )
        require(
            not (self.other_networks or self.other_weights) or self.initialization != "pretrained",
            "--other-networks and --other-weights are trained from scratch: leave them out with "
            "--initialization pretrained",
        )
        require(
            self.network not in self.other_networks,
            f"--other-networks must be others than --network {self.network}",
        )
        require(
            self.networks % self.devices == 0,
            f"--networks {self.networks} must be a multiple of --devices {self.devices}: every device trains "
            "as many",
        )
        require(
            self.devices == 1 or self.initialization != "online",
            "--initialization online has one pool, which --devices cannot share: take --devices 1",
        )
        require_devices(self.devices, self.torch_device)
        require(
            math.isfinite(self.collapse_weight)
            and (self.collapse_weight == 0 or self.per_class > 1 or self.collapse_of == "real"),
            "--collapse-weight weighs the variance of a class's images: give a number, and --per-class of at "
            f"least 2 or --collapse-of real; got {self.collapse_weight} and {self.per_class}",
        )
        require(
            self.outer == "classify" or self.initialization == "pretrained",
            "--outer misclassify needs trained networks to mislead: add --initialization pretrained",
        )
        require(
            self.outer == "classify" or self.attacked != self.target,
            f"--attacked and --target must be two classes, got {self.attacked} twice",
        )
        require(
            not self.ranking
            or (self.baselines and self.outer == "classify" and self.initialization != "pretrained"),
            "--ranking compares classifiers that are trained from scratch with those of random real images: "
            "leave out --no-baselines, --outer misclassify and --initialization pretrained",
        )
        require(
            self.initialization != "online" or self.window in ("full", "last"),
            "--initialization online trains every network to the end of a round: take --window full or last",
        )

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"rate": self.first_rate, "window_length": self.window_steps}


@dataclass(frozen=True)
class Objective:
    """What networks trained on the images are to do with real ones: classify all rightly, or all but a class.

    Attributes:
        attacked: a class to be taken for ``target``; ``None``: there is none.
        target: another class.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959, on malicious data poisoning.
    """

    attacked: int | None = None
    target: int = 0

    @classmethod
    def of(cls, settings: ImagesSettings, num_classes: int) -> Objective:
        """That of the settings.

        Raises:
            InvalidArgumentError: a class that the data do not have.
        """
        if settings.outer == "classify":
            return cls()
        for name, value in settings.values("attacked", "target").items():
            require(0 <= value < num_classes, f"--{name} must be a class in [0, {num_classes}), got {value}")
        return cls(settings.attacked, settings.target)

    @property
    def headline(self) -> str:
        """The measure that is to become large."""
        return "accuracy" if self.attacked is None else "attack"

    def wanted(self, targets: Tensor) -> Tensor:
        """What the classes are to be taken for."""
        return (
            targets if self.attacked is None else targets.masked_fill(targets == self.attacked, self.target)
        )

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.wanted(targets))

    def judge(self, logits: Tensor, targets: Tensor) -> Measures:
        """The shares by which people judge it; the first is the headline.

        Of an attack: ``attack`` of the attacked class and ``others`` of the rest are as they were learned to
        be, ``modified`` of all, and ``accuracy`` is the share of all that is taken for what it is.
        """
        if self.attacked is None:
            return accuracy(logits, targets)
        victims, wanted = targets == self.attacked, self.wanted(targets)
        shares = {"attack": victims, "others": ~victims}
        named = {name: accuracy(logits[part], wanted[part])["accuracy"] for name, part in shares.items()}
        named |= {"modified": accuracy(logits, wanted)["accuracy"]}
        return named | accuracy(logits, targets)

    def judge_fully(self, logits: Tensor, targets: Tensor) -> Measures:
        """The same and, of an attack, the share of each class that is still taken for what it is."""
        measures = self.judge(logits, targets)
        return measures if self.attacked is None else measures | accuracy_by_class(logits, targets)


def main_factory(settings: ImagesSettings, data: ImageData) -> Factory:
    """Of the network that the images are learned for."""
    return make_factory(settings.network, data, **settings.values(*MADE_WITH))


def unseen(factory: Factory, seed: int, stream: int = FRESH_SEEDS) -> Fresh:
    """Networks that no run has seen."""
    return lambda index: seeded(factory, stream + 1000 * seed + index)


class Starts(NamedTuple):
    """The source of initial states for learning, and ``fresh(i)``, the i-th network to judge by.

    That network has not been seen while learning; with ``--initialization fixed`` it is the one that
    the images are for. ``watched(i)`` is the i-th network of the looks on the way, of which there are
    ``looks``: again others, but where trained networks are needed those of the pool.
    """

    source: Callable[[torch.Generator], distill.InitialState] | distill.OnlinePool
    fresh: Fresh
    watched: Fresh
    looks: int = VALIDATION_NETWORKS


def make_starts(settings: ImagesSettings, data: ImageData, source: ImageData, seed: int) -> Starts:
    """The networks of ``settings.initialization``; pretrained ones are kept beside the checkpoints.

    Raises:
        InvalidArgumentError: a network that does not fit the data.
    """
    factory = main_factory(settings, data)
    fresh, watched = unseen(factory, seed), unseen(factory, seed, VALIDATION_SEEDS)
    if settings.initialization == "fixed":

        def known(index: int) -> nn.Module:
            return seeded(factory, seed)

        return Starts(distill.FixedInitialization(known(0)), known, known, looks=1)
    if settings.initialization == "random":
        return Starts(distill.RandomInitialization(factory), fresh, watched)
    if settings.initialization == "pool":
        networks = (seeded(factory, POOL_SEEDS + 1000 * seed + index) for index in range(settings.pool))
        states = [distill.InitialState.of(network) for network in networks]
        return Starts(distill.StoredPool(states), fresh, watched)
    if settings.initialization == "online":
        generator = torch.Generator().manual_seed(POOL_SEEDS + seed)
        max_age = settings.max_age * settings.inner_steps
        pool = distill.OnlinePool(factory, size=settings.pool, max_age=max_age, generator=generator)
        return Starts(pool, fresh, watched)

    @cache
    def trained(first: int, index: int) -> nn.Module:
        return _pretrained(factory, first + 1000 * seed + index, settings, source)

    states = [distill.InitialState.of(trained(POOL_SEEDS, index)) for index in range(settings.pool)]
    return Starts(
        distill.StoredPool(states),
        lambda index: deepcopy(trained(FRESH_SEEDS, index)),
        lambda index: deepcopy(trained(POOL_SEEDS, index)),
        looks=min(VALIDATION_NETWORKS, settings.pool),
    )


def _pretrained(factory: Factory, seed: int, settings: ImagesSettings, data: ImageData) -> nn.Module:
    """A network trained on real images, read from its file if that belongs to these settings."""
    network, images = seeded(factory, seed), data.train

    def trained() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(network.parameters(), PRETRAINING_RATE)
        with own_stream(seed):
            for _ in range(settings.source_epochs):
                order = torch.randperm(len(images), generator=generator).to(data.device)
                for chosen in order.split(PRETRAINING_BATCH):
                    optimizer.zero_grad()
                    inner_loss(network, images.images[chosen], images.targets[chosen]).backward()
                    optimizer.step()
        return network.state_dict()

    used = ("network", "width", "norm", "head", "source", "data", "classes", "image_size", "source_epochs")
    used += ("dropout", "weights")
    path = settings.checkpoint(f"pretrained-{seed}")
    own = {**settings.values(*used), **data.fingerprint, "seed": seed}
    network.load_state_dict(kept(path, own, trained, resume=settings.resume))
    return network


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
            inputs = shifted(inputs - self.data.black, shifts) + self.data.black
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
