"""What the study of learned images can vary: the networks that are trained on them, and what they tell."""

from __future__ import annotations

from dataclasses import dataclass

from distillation.common import NetworkSettings, cosine
from etflayers.checks import require
from lab.networks import WITH_HIDDEN_UNITS
from lab.options import Count, Free, Share
from lab.schedules import Schedule
from lab.weights import WeightsName


@dataclass(frozen=True, kw_only=True)
class TraineeSettings(NetworkSettings):
    """How the networks are made and trained on the images."""

    dropout: Share = 0.0
    """Share of the units of each hidden dense layer that is dropped, anew in each inner step; of lenet,
    alexnet and mlp. Networks that are judged are trained with it, too."""
    weights: WeightsName = "xavier-normal"
    """Where the weights of the networks start. normal, uniform: of deviation 0.05 in every layer; default:
    as PyTorch makes them, with biases; with the others biases are zero."""

    def check(self) -> None:
        super().check()
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

    def check(self) -> None:
        super().check()
        require(
            self.weights not in self.other_weights,
            f"--other-weights must be others than --weights {self.weights}",
        )
        for name, values in {"other": self.other_epochs, "baseline": self.baseline_epochs}.items():
            require(len(set(values)) == len(values), f"--{name}-epochs must name none twice, got {values}")
