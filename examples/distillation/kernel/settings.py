"""What the study of kernel inducing points can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import tyro

from distillation.settings import DistillationSettings, NetworkName, StartName
from etflayers.checks import require


@dataclass(frozen=True, kw_only=True)
class KernelSettings(DistillationSettings):
    """Learn images and labels in closed form: the support of a kernel regression on real images."""

    free_on_resume: ClassVar[frozenset[str]] = DistillationSettings.free_on_resume | {
        "per_class",
        "quick",
        "draws",
        "networks",
        "evaluations",
        "training_steps",
        "training_batch",
        "rate_grid",
    }

    kernel: Literal["ntk", "nngp", "rbf", "linear"] = "ntk"
    """ntk, nngp: of a ReLU network of infinite width, all of it trained or its last layer; rbf: a Gaussian;
    linear: inner products, that is linear regression."""
    depth: int = 1
    """Hidden layers of `--kernel ntk` and `nngp`."""
    bias_variance: float = 0.01
    """Of the biases of `--kernel ntk`, `nngp` and `linear`."""
    bandwidth: float = 0.5
    """Of `--kernel rbf`, in units of the root of the number of pixels."""
    ridge: float = 1e-6
    """Relative to the mean of the diagonal of the kernel of the support."""

    per_class: tuple[int, ...] = (1, 10, 50)
    """Images of each class; one set is learned for each number."""
    start: StartName = "kmeans"
    """What the images start from: noise, random real images, centers of k-means or class means."""
    labels: Literal["fixed", "learned", "solved"] = "learned"
    """fixed: centered one-hot vectors; learned: by Adam, from these; solved: in closed form, for each batch
    while images are learned and in the end for all training images."""
    shift: int = 0
    """Augmentation: shift each real image by up to this many pixels each way."""
    outer_steps: int = 500
    """Updates of the images."""
    outer_batch: int = 500
    """Real images in the loss of each."""
    image_rate: float = 0.05
    """Adam's learning rate for images, with a cosine decay to 0."""
    label_rate: float = 0.02
    """Adam's learning rate for labels, likewise."""

    draws: int = 5
    """Sets of random real images among the baselines."""
    networks: tuple[NetworkName, ...] = ("mlp", "lenet")
    """Finite networks that are trained on the learned set, by Adam on the squared error to its labels, and on
    as many random real images and k-means centers."""
    evaluations: int = 3
    """Networks of each kind for each set."""
    training_steps: int = 300
    """Steps of their training."""
    training_batch: int = 100
    """Images in a step; all, if there are no more."""
    rate_grid: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Adam's learning rates for them: the best on a part of the training images is taken, for each set."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Under a minute: digits, 60 updates, 1 and 10 images of each class, a small mlp; all else as given."""

    @property
    def resolved(self) -> KernelSettings:
        """What is run: these settings, with those of `--quick`."""
        if not self.quick:
            return self
        return replace(
            self,
            data="digits",
            per_class=(1, 10),
            outer_steps=60,
            outer_batch=200,
            draws=2,
            networks=("mlp",),
            evaluations=2,
            training_steps=100,
            rate_grid=(1e-3,),
        )

    @property
    def study(self) -> str:
        return "kernel"

    def check(self) -> None:
        super().check()
        require(
            len(set(self.per_class)) == len(self.per_class) > 0,
            f"--per-class must name at least one number and none twice, got {self.per_class}",
        )
        require(min(self.per_class) >= 1, f"--per-class must be at least 1, got {self.per_class}")
        self._require_at_least(1, "depth", "outer_steps", "outer_batch", "draws", "evaluations")
        self._require_at_least(1, "training_steps", "training_batch")
        require(self.shift >= 0, f"--shift must not be negative, got {self.shift}")
        for name in ("bandwidth", "image_rate", "label_rate"):
            value = getattr(self, name)
            require(
                0 < value < math.inf, f"--{name.replace('_', '-')} must be a positive number, got {value}"
            )
        for name in ("bias_variance", "ridge"):
            value = getattr(self, name)
            require(
                0 <= value < math.inf, f"--{name.replace('_', '-')} must be a finite number >= 0, got {value}"
            )
        require(
            len(self.rate_grid) > 0 and all(0 < rate < math.inf for rate in self.rate_grid),
            f"--rate-grid must name positive numbers, got {self.rate_grid}",
        )
        require(
            self.labels != "solved" or self.outer_batch >= 10 * max(self.per_class),
            f"--labels solved fits labels to each batch: --outer-batch {self.outer_batch} must be at least "
            f"ten times --per-class {max(self.per_class)}",
        )
