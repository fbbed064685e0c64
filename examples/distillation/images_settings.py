"""What is asked of images that are learned through the training on them, in the words of the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from distillation.choices import JudgingSettings
from distillation.common import DistilHeadName, StartName
from etflayers.checks import require
from lab.networks import NetworkName
from lab.options import Count, Free, Natural, Positive
from lab.ranks import require_devices
from lab.settings import DataName

# The learning rate that the inner steps start with, where the command line gives none.
RATES = {"sgd": 0.05, "momentum": 0.01, "adam": 0.003}


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
    start: StartName = "kmeans"
    """What the images start from: noise, random real images, centers of k-means, or class means (of random
    parts of a class, if it has several images). With one image of each class its mean is its center."""
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
    curves: Free[Natural] = 5
    """So many of the networks that are trained in one way are judged after some of their steps, too, for the
    figure of accuracy by step. 0: none; then there is neither that figure nor the accuracy before training,
    and with many test images most of the time of judging is saved."""
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
