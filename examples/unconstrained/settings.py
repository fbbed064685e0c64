"""Everything that the experiment can be asked for, and the checks that need no computation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etflayers.checks import require

HeadName = Literal["standard", "fixed", "nearest", "nearest-detached", "learned"]

# What may change between a run and its continuation: none of these has a say in the numbers of a run.
_FREE_ON_RESUME = {
    "classes",
    "heads",
    "seeds",
    "lr",
    "lr_grid",
    "out",
    "resume",
    "checkpoint_every",
    "sweep",
    "theory",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Gradient descent on free features with each head, and the steps until they are a simplex ETF.

    One seed gives all heads the same features at the start. Descent is full-batch: what differs between runs
    is the head, the learning rate and the seed, nothing else.
    """

    classes: tuple[int, ...] = (10, 100)
    """Numbers of classes K; one comparison for each."""
    heads: tuple[HeadName, ...] = ("standard", "fixed", "nearest", "nearest-detached", "learned")
    """standard: a learned weight with rows of length 1; fixed, nearest, learned: the ETF heads of this
    library; nearest-detached: nearest, without the gradient through the frame."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One run of each head for each seed."""
    steps: int = 1000
    """Steps of gradient descent."""
    per_class: int = 10
    """Features of each class, n."""
    features: int | Literal["K"] = "K"
    """Number of features d >= K - 1; K: as many as classes."""

    loss: Literal["ce", "mse"] = "ce"
    """ce: cross-entropy; mse: half the squared distance of the logits to the one-hot target."""
    scale: float | None = None
    """Scale of the logits of all heads (default: 5 with cross-entropy, 0.5 with mse)."""
    normalize: bool = True
    """Whether all heads divide features by their length."""
    momentum: float | Literal["2/(t+1)"] | None = 0.1
    """Momentum of the class means of the nearest head; None: cumulative."""
    center: bool = True
    """Whether the nearest head subtracts the mean of the class means."""
    proximity: float = 1e-3
    """Weight of the proximal term of the nearest head."""

    lr: float = 0.03
    """Learning rate common to all heads, in units in which each sample counts once."""
    lr_grid: tuple[float, ...] = ()
    """Also repeat the comparison with the rate of this grid that serves each head best: that with which, for
    the first seed, it is first at distance 0.01 or, if it never is, nearest to an ETF at the end."""
    classifier_rate: float = 1.0
    """Learning rate of the learned weight and of the learned rotation, over that of the features."""
    sgd_momentum: float = 0.0
    """Heavy-ball momentum of the descent."""
    feature_decay: float = 0.0
    """lambda_H of the term lambda_H / 2 |H|^2 in the objective."""
    weight_decay: float = 0.0
    """lambda_W of the term lambda_W / 2 |W|^2, for the learned weight."""

    spacing: float = 1.05
    """Ratio of successive steps that are measured (each of the first is): also the precision of the
    reported steps."""
    sweep: bool = False
    """Instead: change the options of the nearest head one at a time and report the steps it takes."""
    theory: bool = False
    """Instead: check the landscape of the regularized model in float64 against convex optimization."""
    out: Path = Path("runs/ufm")
    """Folder for tables, figures and checkpoints."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    resume: bool = False
    """Continue from the checkpoints in the output folder to the numbers of an unbroken run."""

    def check(self) -> None:
        """Raise :class:`~etflayers.errors.InvalidArgumentError` for what cannot be run."""
        for name in ("classes", "heads", "seeds"):
            values = getattr(self, name)
            require(
                len(set(values)) == len(values) > 0,
                f"--{name} must name at least one and none twice, got {values}",
            )
        require(min(self.classes) >= 2, f"--classes must be at least 2, got {self.classes}")
        require(
            all(0 <= seed < 2**31 for seed in self.seeds), f"--seeds must lie in [0, 2**31), got {self.seeds}"
        )
        for name in ("steps", "per_class", "checkpoint_every"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        widest = max(self.classes)
        require(
            self.features == "K" or self.features >= widest - 1,
            f"--features {self.features} is too small for {widest} classes: a simplex ETF needs at least "
            f"K - 1 = {widest - 1}",
        )
        for lr in (self.lr, *self.lr_grid):
            require(0 < lr < float("inf"), f"--lr and --lr-grid must be positive, got {lr}")
        require(
            0 <= self.classifier_rate < float("inf"),
            f"--classifier-rate must be a finite number >= 0, got {self.classifier_rate}",
        )
        require(0 <= self.sgd_momentum < 1, f"--sgd-momentum must lie in [0, 1), got {self.sgd_momentum}")
        for name in ("feature_decay", "weight_decay"):
            value = getattr(self, name)
            require(
                0 <= value < float("inf"),
                f"--{name.replace('_', '-')} must be a finite number >= 0, got {value}",
            )
        require(self.spacing > 1, f"--spacing must be greater than 1, got {self.spacing}")
        require(not (self.sweep and self.theory), "--sweep and --theory are two experiments: ask for one")

    @property
    def logit_scale(self) -> float:
        """With features of length 1 the largest logit is the scale.

        One-hot targets are met, but for their mean, with a scale of (K-1)/K. Above it, MSE is least where
        features of length 1 leave the span of the frame to get a smaller logit.
        """
        if self.scale is not None:
            return self.scale
        return 5.0 if self.loss == "ce" else 0.5

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
        """What decides the numbers of a run, as JSON values: a continuation must agree with it."""
        plain = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _FREE_ON_RESUME
        }
        return plain | {"scale": self.logit_scale}
