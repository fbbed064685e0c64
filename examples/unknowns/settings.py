"""What the study of unknown inputs can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from torch import Tensor

from etflayers.checks import require
from lab.options import Count, Distinct, Free, NotNegative, Positive, at_least
from lab.settings import DataName, DataSettings, at_most

Head = Literal["linear", "fixed", "nearest", "code"]
Variant = Literal["plain", "entropy", "projector", "both"]
ENTROPIC, PROJECTED = ("entropy", "both"), ("projector", "both")
KNOWN = {"fashion": 8, "glyphs": 62}  # of 10 and of 2103: of the latter letters and digits


@dataclass(frozen=True, kw_only=True)
class UnknownSettings(DataSettings):
    """What decides the numbers; the same for every network."""

    default_out = "runs/unknown"

    data: DataName = "fashion"
    """What the networks learn: fashion and glyphs are the data of this study; for the others see
    examples/train_heads.py."""
    known: Annotated[int, at_least(2)] | None = None
    """Train on this many classes, the first ones; the others are held out (default: 8 of fashion, the 62
    letters and digits of glyphs, else all)."""
    per_class: Count | None = None
    """Train on this many images of each class at most."""
    trained: Free[Path | None] = None
    """Train nothing: take the networks, and the data, that examples/collapse_study.py has left in this
    folder."""
    heads: Free[Distinct[Head]] = ("linear", "fixed", "nearest", "code")
    """linear: nn.Linear; fixed, nearest: simplex ETFs; code: orthogonal words (an orthoplex), as the best
    code for so few classes is the simplex. All but the linear head read directions."""
    variants: Free[Distinct[Variant]] = ("plain", "entropy", "projector", "both")
    """plain: the head reads the encoder; entropy: with EntropyRegularizer of the encoder's features;
    projector: with ETFProjector between encoder and head; both: with both."""
    penalty: NotNegative = 0.05
    """Weight of the entropy regularizer in the loss."""
    features: Count = 64
    """Number of features d; a simplex ETF of K classes needs K - 1."""
    width: Positive = 1.0
    """Factor to the channels of the network, 16, 32 and 64: with fewer of the last than features these lie in
    a subspace, and their covariance has no inverse."""
    scale: Positive = 10.0
    """Scale of the logits of all heads but the linear one."""
    epochs: Count = 30
    """Passes over the training set."""
    batch_size: Count = 128
    """Images in a step; the remainder of an epoch is dropped."""
    lr: Positive = 2e-3
    """Peak learning rate of AdamW, after a linear warm-up and before a cosine."""
    weight_decay: NotNegative = 0.05
    """Decay of all parameters."""
    affine: NotNegative | None = None
    """Turn, stretch, shear and move each training image by up to about this (default: 0.1 for glyphs, which
    have few images, else 0)."""
    unknown_images: Count = 1000
    """Images of each kind of unknown input, at most."""
    probe_images: Count = 1000
    """Training images of each task to which features are transferred, at most."""
    probe_strengths: Distinct[Positive] = (0.01, 0.1, 1.0)
    """Inverse regularization C of the linear probe: a validation set chooses."""
    threads: Count = 1
    """CPU threads."""

    def check(self) -> None:
        super().check()
        require(self.batch_size >= 2, "--batch-size must be at least 2: batch normalization needs two images")
        require(
            self.trained is None or (self.trained / "run.json").exists(),
            f"--trained {self.trained} has no run.json: take a folder of examples/collapse_study.py",
        )

    @property
    def known_classes(self) -> int | None:
        return KNOWN.get(self.data) if self.known is None else self.known

    @property
    def affine_size(self) -> float:
        return (0.1 if self.data == "glyphs" else 0.0) if self.affine is None else self.affine

    def kept_images(self, targets: Tensor, num_classes: int) -> Tensor | None:
        return at_most(self.per_class, targets, num_classes)
