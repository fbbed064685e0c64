"""What the study of kernel inducing points can vary."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from distillation.common import DistillationSettings, StartName
from etflayers.checks import require
from etflayers.distill.lessons import UpdateRule
from lab.networks import NetworkName
from lab.options import Count, Distinct, Flag, Free, Natural, NotNegative, Positive

KernelName = Literal["ntk", "nngp", "conv-ntk", "conv-nngp", "rbf", "linear", "features"]
TANGENTS, CONVOLUTIONAL = ("ntk", "conv-ntk"), ("conv-ntk", "conv-nngp")
# The kernels that an option has a meaning for, where it has none for some.
MEANT_FOR: dict[str, tuple[str, ...]] = {
    "depth": ("ntk", "nngp", *CONVOLUTIONAL),
    "pool_after": CONVOLUTIONAL,
    "readout": CONVOLUTIONAL,
    "parametrization": TANGENTS,
    "kernel_width": TANGENTS,
    "bias_variance": ("ntk", "nngp", *CONVOLUTIONAL, "linear", "features"),
    "bandwidth": ("rbf",),
    "feature_network": ("features",),
    "feature_width": ("features",),
    "feature_pool": ("features",),
    "feature_max_age": ("features",),
    "feature_steps": ("features",),
    "feature_rate": ("features",),
}


@dataclass(frozen=True, kw_only=True)
class KernelSettings(DistillationSettings):
    """Learn images and labels in closed form: the support of a kernel regression on real images."""

    default_out: ClassVar[str] = "runs/distill-kernel"
    small: ClassVar[dict[str, Any]] = {"data": "digits", "per_class": (1, 10), "networks": ("mlp",)}
    small |= {"outer_steps": 60, "outer_batch": 200, "draws": 2, "evaluations": 2, "training_steps": 100}
    small |= {"rate_grid": (1e-3,)}

    kernel: KernelName = "ntk"
    """ntk, nngp: of a ReLU network of infinite width, all of it trained or its last layer; conv-ntk,
    conv-nngp: of a convolutional one of infinitely many channels; rbf: a Gaussian; linear: inner products,
    that is linear regression; features: inner products of the features of a finite network, another one in
    each step, of a pool whose networks train on the images while these are learned. It is judged by networks
    alone."""
    depth: Count = 1
    """Hidden layers of `--kernel ntk` and `nngp`, 3x3 convolutions of `conv-ntk` and `conv-nngp`."""
    pool_after: tuple[Count, ...] = ()
    """Convolutions, counted from 1, behind which 2x2 pixels are averaged. For images of p pixels that makes
    the kernel p times as expensive, and so does the next option."""
    readout: Literal["flatten", "average"] = "flatten"
    """What the last layer of a convolutional kernel sees: all pixels, or their average."""
    parametrization: Literal["ntk", "standard"] = "ntk"
    """Of `--kernel ntk` and `conv-ntk`; standard: weights are trained as PyTorch draws them, so that a layer
    counts by the number of its inputs."""
    kernel_width: Count | None = None
    """Hidden units or channels of the network that `--parametrization standard` stands for (default: 1024
    units, 128 channels)."""
    bias_variance: NotNegative = 0.01
    """Of the biases of all kernels but `--kernel rbf`."""
    bandwidth: Positive = 0.5
    """Of `--kernel rbf`, in units of the root of the number of pixels."""
    feature_network: Literal["lenet", "alexnet", "convnet", "mlp"] = "convnet"
    """Network of `--kernel features`; its features are what its last layer sees."""
    feature_width: Count | None = None
    """Its channels or hidden units (default: 32 channels of the convnet, 64 of the alexnet, 128 units of the
    mlp)."""
    feature_pool: Count = 10
    """Networks in the pool."""
    feature_max_age: Count = 100
    """Steps of training after which a network is replaced by a new one."""
    feature_steps: Count = 1
    """Steps that a network trains on all images as they are after an update, before it is put back: on the
    squared error to their labels."""
    feature_rate: Positive = 3e-4
    """Adam's learning rate in these steps; every network keeps the averages of its Adam."""
    ridge: NotNegative = 1e-6
    """Relative to the mean of the diagonal of the kernel of the support."""

    per_class: Free[Distinct[Count]] = (1, 10, 50)
    """Images of each class; one set is learned for each number."""
    start: StartName = "kmeans"
    """What the images start from: noise, random real images, centers of k-means or class means."""
    labels: Literal["fixed", "learned", "solved"] = "learned"
    """fixed: centered one-hot vectors; learned: by Adam, from these; solved: in closed form, for each batch
    while images are learned and in the end for all training images."""
    zca: NotNegative | None = None
    """Whiten the pixels (ZCA, fitted on the training images) with this ridge, relative to their mean
    variance; published: 0.1. Default: no whitening."""
    shift: Natural = 0
    """Augmentation: shift each real image by up to this many pixels each way."""
    rotation: NotNegative = 0.0
    """Augmentation: turn each real image by up to this many degrees each way."""
    flip: Flag = False
    """Augmentation: mirror every second real image, at random."""
    outer_steps: Count = 500
    """Updates of the images."""
    outer_batch: Count = 500
    """Real images in the loss of each."""
    image_rate: Positive = 0.05
    """Adam's learning rate for images, with a cosine decay to 0."""
    label_rate: Positive = 0.02
    """Adam's learning rate for labels, likewise."""

    draws: Free[Count] = 5
    """Sets of random real images among the baselines."""
    networks: Free[tuple[NetworkName, ...]] = ("mlp", "lenet")
    """Finite networks that are trained on the learned set, on the squared error to its labels, and on as many
    random real images and k-means centers."""
    optimizers: Free[Distinct[Literal["adam", "sgd"]]] = ("adam",)
    """How they are trained; sgd: with momentum 0.9 and the penalty of `--l2`, as published."""
    evaluations: Free[Count] = 3
    """Networks of each kind for each set."""
    training_steps: Free[Count] = 300
    """Steps of their training."""
    training_batch: Free[Count] = 100
    """Images in a step; all, if there are no more."""
    rate_grid: Free[Distinct[Positive]] = (3e-4, 1e-3, 3e-3)
    """Adam's learning rates for them: the best on a part of the training images is taken, for each set."""
    sgd_rates: Free[Distinct[Positive]] = (1e-3, 1e-2, 3e-2)
    """SGD's, likewise."""
    l2: Free[NotNegative] = 5e-4
    """Weight decay of SGD: `l2 |w|^2 / 2` is added to the loss."""

    def check(self) -> None:
        super().check()
        require(
            self.labels != "solved" or self.outer_batch >= 10 * max(self.per_class),
            f"--labels solved fits labels to each batch: --outer-batch {self.outer_batch} must be at least "
            f"ten times --per-class {max(self.per_class)}",
        )
        self._check_that_options_have_a_meaning()
        require(
            max(self.pool_after, default=1) <= self.depth
            and len(set(self.pool_after)) == len(self.pool_after),
            f"--pool-after must name convolutions from 1 to --depth {self.depth}, none twice, "
            f"got {self.pool_after}",
        )
        require(
            self.parametrization == "standard" or self.kernel_width is None,
            "--kernel-width has a meaning for --parametrization standard only",
        )
        require(
            self.feature_width is None or self.feature_network != "lenet",
            "--feature-width has no meaning for --feature-network lenet, whose layers have fixed widths",
        )
        require(
            self.closed_form or self.labels != "solved",
            "--labels solved solves for the labels of one kernel, and --kernel features is another one in "
            "each step: take --labels learned or fixed",
        )
        require(
            self.closed_form or bool(self.networks),
            "--kernel features is judged by finite networks alone: name at least one in --networks",
        )

    def _check_that_options_have_a_meaning(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, kernels in MEANT_FOR.items():
            named = " and ".join([", ".join(kernels[:-1]), kernels[-1]] if kernels[1:] else kernels)
            require(
                self.kernel in kernels or getattr(self, name) == defaults[name],
                f"--{name.replace('_', '-')} is of --kernel {named}, not of {self.kernel}",
            )

    def training_rule(self, optimizer: str) -> tuple[str | UpdateRule, tuple[float, ...]]:
        """The update rule of finite networks, and the learning rates to choose from."""
        if optimizer == "adam":
            return "adam", self.rate_grid
        return partial(torch.optim.SGD, momentum=0.9, weight_decay=self.l2), self.sgd_rates

    @property
    def closed_form(self) -> bool:
        """Whether there is one kernel, by which regression on any set can be judged and labels solved."""
        return self.kernel != "features"

    @property
    def sees_all_pairs_of_pixels(self) -> bool:
        """Whether the kernel is made of all pairs of pixels, and not of pairs of one place."""
        return bool(self.pool_after) or self.readout == "average"
