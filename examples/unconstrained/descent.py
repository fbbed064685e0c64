"""Gradient descent on the unconstrained-features model, measured on its way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers import LearnedETFHead, UnitRowHead
from etflayers.checks import require, require_module
from etflayers.errors import NonFiniteError
from etflayers.functional import code_mse_loss
from etflayers.metrics import (
    class_statistics,
    classifier_inputs,
    collapse_measures,
    cosine_margins,
    read_classifier,
)
from etflayers.unconstrained import UnconstrainedFeatures
from lab.files import Row
from lab.heads import HeadName, HeadOptions, make_head
from lab.options import (
    Count,
    Distinct,
    Free,
    MoreThanOne,
    NotNegative,
    Options,
    Positive,
    Seed,
    Share,
    at_least,
)
from lab.settings import NearestSettings
from lab.training import Run


@dataclass(frozen=True, kw_only=True)
class Settings(NearestSettings, Options):
    """Gradient descent on free features with each head, and the steps until they are a simplex ETF.

    One seed gives all heads the same features at the start. Descent is full-batch: what differs between runs
    is the head, the learning rate and the seed, nothing else.
    """

    default_out: ClassVar[str] = "runs/ufm"

    classes: Free[Distinct[Annotated[int, at_least(2)]]] = (10, 100)
    """Numbers of classes K; one comparison for each."""
    heads: Free[Distinct[HeadName]] = ("standard", "fixed", "nearest", "nearest-detached", "learned")
    """standard: a learned weight with rows of length 1; fixed, nearest, learned: the ETF heads of this
    library; nearest-detached: nearest, without the gradient through the frame."""
    seeds: Free[Distinct[Seed]] = (0, 1, 2, 3, 4)
    """One run of each head for each seed."""
    device: Literal["cpu"] = "cpu"
    """These problems are too small for another."""
    steps: Count = 1000
    """Steps of gradient descent."""
    per_class: Count = 10
    """Features of each class, n."""
    features: int | Literal["K"] = "K"
    """Number of features d >= K - 1; K: as many as classes."""

    loss: Literal["ce", "mse"] = "ce"
    """ce: cross-entropy; mse: half the squared distance of the logits to the one-hot target."""
    scale: float | None = None
    """Scale of the logits of all heads (default: 5 with cross-entropy, 0.5 with mse)."""
    normalize: bool = True
    """Whether all heads divide features by their length."""
    lr: Free[Positive] = 0.03
    """Learning rate common to all heads, in units in which each sample counts once."""
    lr_grid: Free[tuple[Positive, ...]] = ()
    """Also repeat the comparison with the rate of this grid that serves each head best: that with which, for
    the first seed, it is first at distance 0.01 or, if it never is, nearest to an ETF at the end."""
    classifier_rate: NotNegative = 1.0
    """Learning rate of the learned weight and of the learned rotation, over that of the features."""
    sgd_momentum: Share = 0.0
    """Heavy-ball momentum of the descent."""
    feature_decay: NotNegative = 0.0
    """lambda_H of the term lambda_H / 2 |H|^2 in the objective."""
    weight_decay: NotNegative = 0.0
    """lambda_W of the term lambda_W / 2 |W|^2, for the learned weight."""

    spacing: MoreThanOne = 1.05
    """Ratio of successive steps that are measured (each of the first is): also the precision of the
    reported steps."""
    sweep: Free[bool] = False
    """Instead: change the options of the nearest head one at a time and report the steps it takes."""
    theory: Free[bool] = False
    """Instead: check the landscape of the regularized model in float64 against convex optimization."""
    checkpoint_every: Free[Count] = 500
    """Steps between checkpoints."""

    def check(self) -> None:
        super().check()
        widest = max(self.classes)
        require(
            self.features == "K" or self.features >= widest - 1,
            f"--features {self.features} is too small for {widest} classes: a simplex ETF needs at least "
            f"K - 1 = {widest - 1}",
        )
        require(not (self.sweep and self.theory), "--sweep and --theory are two experiments: ask for one")

    @property
    def head_options(self) -> HeadOptions:
        """With features of length 1 the largest logit is the scale.

        One-hot targets are met, but for their mean, with a scale of (K-1)/K. Above it, MSE is least where
        features of length 1 leave the span of the frame to get a smaller logit.
        """
        scale = 5.0 if self.loss == "ce" else 0.5
        return HeadOptions(
            scale=scale if self.scale is None else self.scale,
            normalize=self.normalize,
            rotation="haar",
            **self.values("momentum", "center", "proximity"),
        )

    def dim(self, num_classes: int) -> int:
        """The number of features d."""
        return num_classes if self.features == "K" else self.features

    def measured_steps(self) -> list[int]:
        """0, 1, 2, ... at first, then a geometric sequence, and the last step."""
        steps = [0]
        while steps[-1] < self.steps:
            steps.append(min(self.steps, max(steps[-1] + 1, int(steps[-1] * self.spacing))))
        return steps

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"scale": self.head_options.scale}


def make_model(name: HeadName, num_classes: int, seed: int, settings: Settings) -> UnconstrainedFeatures:
    """Free features with the head called ``name``: one seed gives all heads the same ones.

    What is random in a head is drawn from a stream of its own.
    """
    head = make_head(name, settings.dim(num_classes), num_classes, seed, settings.head_options)
    start = torch.Generator().manual_seed(seed)
    return UnconstrainedFeatures(head, settings.per_class, generator=start)


def objective(model: UnconstrainedFeatures, logits: Tensor, settings: Settings) -> Tensor:
    """Mean loss over the samples, plus ``decay / 2 |.|^2`` of the features and of the learned weight."""
    criterion = F.cross_entropy if settings.loss == "ce" else code_mse_loss
    loss: Tensor = criterion(logits, model.targets)
    if settings.feature_decay > 0:
        loss = loss + settings.feature_decay / 2 * model.features.square().sum()
    if settings.weight_decay > 0 and isinstance(model.head, UnitRowHead):
        loss = loss + settings.weight_decay / 2 * model.head.prototypes.square().sum()
    return loss


def make_optimizers(
    model: UnconstrainedFeatures, lr: float, settings: Settings
) -> list[torch.optim.Optimizer]:
    """Gradient descent in units in which each sample, and each class, counts once.

    In the mean over N samples the gradient of one feature is 1/N of that of its own loss, that of a row of
    the classifier about 1/K. The rates are multiplied by N and by K: they then mean the same for every size.
    """
    samples, momentum = len(model.targets), settings.sgd_momentum
    rate = lr * settings.classifier_rate * samples / settings.per_class
    optimizers: list[Any] = [torch.optim.SGD([model.features], lr=lr * samples, momentum=momentum)]
    if learned := list(model.head.parameters()):
        curved = isinstance(model.head, LearnedETFHead)
        kind = require_module("geoopt", extra="solvers").optim.RiemannianSGD if curved else torch.optim.SGD
        optimizers.append(kind(learned, lr=rate, momentum=momentum))
    return optimizers


class RunKey(NamedTuple):
    """What tells one run from another."""

    classes: int
    head: HeadName
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"K{self.classes}-{self.head}-lr{self.lr:g}-seed{self.seed}"


class Descent(Run):
    """One run, measured on the way. Its last step measures only."""

    def __init__(self, key: RunKey, settings: Settings) -> None:
        self.key, self.settings = key, settings
        self.model = make_model(key.head, key.classes, key.seed, settings)
        self.optimizers = make_optimizers(self.model, key.lr, settings)
        self.measured = set(settings.measured_steps())
        parts = {"model": self.model}
        parts |= {f"optimizer{number}": optimizer for number, optimizer in enumerate(self.optimizers)}
        super().__init__(parts, settings.fingerprint() | key._asdict(), settings.steps + 1)

    def advance(self) -> Row | None:
        with self.clock():
            logits = self.model()
            loss = objective(self.model, logits, self.settings)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"{self.key.name} has diverged at step {self.step}: take a lower --lr")
        row = measure(self.model, self.step, loss, logits) if self.step in self.measured else None
        if self.step < self.settings.steps:
            with self.clock():
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in self.optimizers:
                    optimizer.step()
        return row

    def steps_to(self, distance: float) -> float:
        """The first measured step at which the class means are this near to an ETF; infinite: never."""
        near = (row["step"] for row in self.history if row["etf_distance"] <= distance)
        return next(near, math.inf)


@torch.no_grad()
def measure(model: UnconstrainedFeatures, step: int, loss: Tensor, logits: Tensor) -> Row:
    """The state after ``step`` steps, with the frame that the head took for it."""
    targets, inputs = model.targets, classifier_inputs(model.head, model.features.detach())
    classifier = read_classifier(model.head)
    measures = collapse_measures(class_statistics(inputs, targets, logits.shape[-1]), classifier)
    row: Row = {
        "step": step,
        "loss": loss.item(),
        "accuracy": (logits.argmax(-1) == targets).double().mean().item(),
        "etf_distance": measures["nc2_etf_distance_means"].item(),
        "margin": cosine_margins(inputs, targets, classifier.weight).double().mean().item(),
    }
    return row | {name: value.item() for name, value in measures.items()}
