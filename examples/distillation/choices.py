"""What the study of learned images can vary: the networks that are trained on them, and what they tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distillation.common import NetworkSettings, cosine, inner_loss
from etflayers.checks import require
from etflayers.distill import SiameseAugmentation
from etflayers.distill.objective import InnerLoss
from lab.networks import WITH_HIDDEN_UNITS
from lab.options import Count, Free, Positive, Share
from lab.schedules import Schedule
from lab.weights import WeightsName

FamilyName = Literal["shift", "scale", "rotate", "brightness", "cutout"]


@dataclass(frozen=True, kw_only=True)
class TraineeSettings(NetworkSettings):
    """How the networks are made and trained on the images."""

    dropout: Share = 0.0
    """Share of the units of each hidden dense layer that is dropped, anew in each inner step; of lenet,
    alexnet and mlp. Networks that are judged are trained with it, too."""
    weights: WeightsName = "xavier-normal"
    """Where the weights of the networks start. normal, uniform: of deviation 0.05 in every layer; default:
    as PyTorch makes them, with biases; with the others biases are zero."""
    augment: tuple[FamilyName, ...] = ()
    """Kinds of differentiable siamese augmentation (Zhao, Bilen 2021): one of them is drawn in each inner
    step, for each outer batch and in each step of the trainings that are judged, the same for all images of
    the batch."""
    augment_strength: Positive = 1.0
    """Factor to the published strengths of `--augment`: shifts by an eighth, scales up to 1.2, turns by 15
    degrees, brightness by half a deviation, a cutout of half the side."""

    @property
    def augmentation(self) -> SiameseAugmentation | None:
        """What changes the images of a step, if anything does."""
        return SiameseAugmentation.of(*self.augment, strength=self.augment_strength) if self.augment else None

    @property
    def trainee_loss(self) -> InnerLoss:
        """Of a step of training, augmented by a change that is drawn on the stream of the step."""
        augmentation = self.augmentation
        if augmentation is None:
            return inner_loss

        def augmented_loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return inner_loss(model, augmentation(images), labels)

        return augmented_loss

    def check(self) -> None:
        super().check()
        require(
            len(set(self.augment)) == len(self.augment),
            f"--augment must name none twice, got {self.augment}",
        )
        _ = self.augmentation  # strengths that cannot be
        require(
            self.dropout == 0 or self.network in WITH_HIDDEN_UNITS,
            f"--dropout drops hidden units of dense layers, and --network {self.network} has none: take "
            f"--network {', '.join(WITH_HIDDEN_UNITS[:-1])} or {WITH_HIDDEN_UNITS[-1]}",
        )


@dataclass(frozen=True, kw_only=True)
class OuterSettings(TraineeSettings):
    """How the images are learned: Adam beyond its rates."""

    outer_betas: tuple[Share, Share] = (0.9, 0.999)
    """Adam's decay rates of the running mean and square of hypergradients."""
    outer_schedule: Schedule = "cosine"
    """How Adam's rates change. cosine: down to 0; step: by half every OUTER_HALVING updates; constant."""
    outer_halving: Count | None = None
    """With `--outer-schedule step`: updates after which the rates are halved (default: a tenth of them)."""

    def check(self) -> None:
        super().check()
        require(
            self.outer_halving is None or self.outer_schedule == "step",
            "--outer-halving says when rates are halved: add --outer-schedule step",
        )

    def outer_factor(self, step: int, steps: int) -> float:
        """What Adam's rates are multiplied by in a step of so many, counted from 0."""
        if self.outer_schedule == "cosine":
            return cosine(step, steps)
        every = max(1, steps // 10) if self.outer_halving is None else self.outer_halving
        return float(0.5 ** (step // every)) if self.outer_schedule == "step" else 1.0


@dataclass(frozen=True, kw_only=True)
class JudgingSettings(OuterSettings):
    """What finished images are tried on besides the networks that they are learned for."""

    other_weights: Free[tuple[WeightsName, ...]] = ()
    """Initializations of networks that are trained on them besides, which the images have not been learned
    for, with the learned rates and with one that is chosen."""
    other_epochs: Free[tuple[Count, ...]] = ()
    """Numbers of epochs for which networks are trained on them besides: with the rates of the epochs that
    were learned, and after these with those of the last one again."""
    baseline_epochs: Free[tuple[Count, ...]] = ()
    """Numbers of epochs of which each baseline is also given the best, together with its rate."""
    ranking: Free[bool] = False
    """Also find what the set recovers of all real images with hard labels, and what it improves over random
    ones (Li et al. 2025): networks are trained on all real images for this."""
    ranking_epochs: Free[Count] = 10
    """Passes over all real images."""

    def check(self) -> None:
        super().check()
        require(
            self.weights not in self.other_weights,
            f"--other-weights must be others than --weights {self.weights}",
        )
        for name, values in {"other": self.other_epochs, "baseline": self.baseline_epochs}.items():
            require(len(set(values)) == len(values), f"--{name}-epochs must name none twice, got {values}")
