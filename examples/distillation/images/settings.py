"""What the study of images can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import tyro

from comparison.settings import DataName
from distillation.settings import DistilHeadName, DistillationSettings, NetworkName, NormName, StartName
from etflayers.checks import require

# The learning rate that the inner steps start with, where the command line gives none.
RATES = {"sgd": 0.05, "momentum": 0.01, "adam": 0.003}


@dataclass(frozen=True, kw_only=True)
class ImagesSettings(DistillationSettings):
    """Learn images, their labels and learning rates by differentiating through the training on them."""

    free_on_resume: ClassVar[frozenset[str]] = DistillationSettings.free_on_resume | {
        "quick",
        "evaluations",
        "other_networks",
        "draws",
        "baselines",
    }

    network: NetworkName = "lenet"
    """lenet: that of the paper; convnet: three blocks of convolution, norm, ReLU and average pooling; mlp:
    one hidden layer; linear."""
    width: int | None = None
    """Channels of the convnet (default: 32), hidden units of the mlp (default: 128)."""
    norm: NormName = "instance"
    """Normalization in the convnet. batch: with averages over all steps, for the evaluation."""
    head: DistilHeadName = "linear"
    """linear: nn.Linear; standard: a learned weight with rows of length 1, without a bias; fixed, nearest:
    the ETF heads of this library."""
    initialization: Literal["fixed", "random", "pool", "online", "pretrained"] = "fixed"
    """Where the networks start that the images train. fixed: one network, known beforehand; random: a new one
    each time; pool: one of POOL known ones; online: one of POOL networks that train on the images while these
    are learned, each for at most MAX_AGE rounds; pretrained: one of POOL networks trained on SOURCE."""
    pool: int = 8
    """Networks in the pool of `--initialization pool`, `online` and `pretrained`."""
    max_age: int = 10
    """Rounds through the images after which the online pool replaces a network by a new one."""
    source: DataName | None = None
    """Data on which `--initialization pretrained` has trained its networks (default: those of --data)."""
    source_epochs: int = 10
    """Passes over them."""

    per_class: int = 1
    """Images of each class."""
    labels: Literal["hard", "soft"] = "hard"
    """soft: labels are learned too, and start one-hot."""
    start: StartName = "means"
    """What the images start from: noise, random real images, centers of k-means, or class means (of random
    parts of a class, if it has several images)."""
    steps: int = 1
    """Batches into which the images are split; a step is taken on each in turn."""
    epochs: int = 30
    """Passes over the batches: training takes STEPS times EPOCHS steps, each with its own learning rate."""
    optimizer: Literal["sgd", "momentum", "adam"] = "momentum"
    """The rule of the inner steps; momentum: 0.9."""
    rate: float | None = None
    """Learning rate of every inner step at the start (default: 0.05 sgd, 0.01 momentum, 0.003 adam)."""

    outer: Literal["classify", "misclassify"] = "classify"
    """What the images are learned for. misclassify: that a trained network takes images of class ATTACKED for
    class TARGET, and nothing else for anything else."""
    attacked: int = 0
    """Class that `--outer misclassify` attacks."""
    target: int = 1
    """Class for which it is to be taken."""
    outer_steps: int = 200
    """Updates of the images."""
    outer_batch: int = 512
    """Real images in the outer loss."""
    networks: int = 1
    """Networks that each update averages over."""
    adjoint: Literal["steps", "kept"] = "steps"
    """How the hypergradient flows. steps: training steps are derived again going back, which takes little
    memory; kept: their graph is kept, which takes less time where it is small."""
    together: bool = True
    """Train the networks of an update side by side, by vmap, where there are several; not with
    `--initialization online`."""
    image_rate: float = 0.02
    """Adam's learning rate for images, with a cosine decay to 0."""
    label_rate: float = 0.02
    """Adam's learning rate for soft labels, likewise."""
    log_rate: float = 0.02
    """Adam's learning rate for the logarithms of the inner rates, likewise."""
    clip: float = 2.0
    """Hypergradients longer than this times their running length are shortened to it."""
    window: Literal["full", "last", "random", "moving"] = "full"
    """Inner steps through which the hypergradient flows: all, the last WINDOW_LENGTH, that many before a
    random end of training, or that many at a place that moves from the first steps to the last."""
    window_length: int | None = None
    """Steps in the window (default: half of them)."""

    evaluations: int = 20
    """Fresh networks that are trained on the images when these are finished."""
    other_networks: tuple[NetworkName, ...] = ()
    """Architectures that are trained on them besides, which the images have not been learned for."""
    baselines: bool = True
    """Also train on random real images, centers of k-means and average images: as many, for as many steps."""
    draws: int = 5
    """Sets of random real images."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Under a minute: digits, a small mlp, 10 passes, 60 long updates, 4 networks; all else as given."""

    @property
    def resolved(self) -> ImagesSettings:
        """What is run: these settings, with those of `--quick`."""
        if not self.quick:
            return self
        return replace(
            self,
            data="digits",
            network="mlp",
            width=32,
            epochs=10,
            outer_steps=60,
            outer_batch=128,
            evaluations=4,
            draws=2,
            rate={"sgd": 0.5, "momentum": 0.1, "adam": 0.01}[self.optimizer],
            image_rate=0.1,
        )

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
        self._require_at_least(
            1,
            "per_class",
            "steps",
            "epochs",
            "outer_steps",
            "outer_batch",
            "networks",
            "pool",
            "max_age",
            "source_epochs",
            "evaluations",
            "draws",
        )
        for name in ("image_rate", "label_rate", "log_rate", "first_rate", "clip"):
            value = getattr(self, name)
            require(
                0 < value < float("inf"),
                f"--{name.replace('first_', '').replace('_', '-')} must be a positive number, got {value}",
            )
        require(self.width is None or self.width >= 1, f"--width must be at least 1, got {self.width}")
        require(
            1 <= self.window_steps <= self.inner_steps,
            f"--window-length must lie in [1, {self.inner_steps}], the number of inner steps, got "
            f"{self.window_length}",
        )
        require(
            self.source is None or self.initialization == "pretrained",
            "--source is the data of pretrained networks: add --initialization pretrained",
        )
        require(
            not self.other_networks or self.initialization != "pretrained",
            "--other-networks are trained from scratch: leave them out with --initialization pretrained",
        )
        require(
            self.network not in self.other_networks,
            f"--other-networks must be others than --network {self.network}",
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
            self.initialization != "online" or self.window in ("full", "last"),
            "--initialization online trains every network to the end of a round: take --window full or last",
        )

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"rate": self.first_rate, "window_length": self.window_steps}

    def evaluation(self) -> dict[str, Any]:
        """What decides how a finished set is judged, as JSON values."""
        return {
            "evaluations": self.evaluations,
            "other_networks": list(self.other_networks),
            "draws": self.draws,
            "baselines": self.baselines,
        }
