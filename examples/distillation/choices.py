"""What the study of learned images can vary: the networks that are trained on them, and what they tell."""

from __future__ import annotations

from dataclasses import dataclass

from distillation.common import NetworkSettings
from etflayers.checks import require
from lab.networks import WITH_HIDDEN_UNITS
from lab.options import Free, Share
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
class JudgingSettings(TraineeSettings):
    """What finished images are tried on besides the networks that they are learned for."""

    other_weights: Free[tuple[WeightsName, ...]] = ()
    """Initializations of networks that are trained on them besides, which the images have not been learned
    for, with the learned rates and with one that is chosen."""

    def check(self) -> None:
        super().check()
        require(
            self.weights not in self.other_weights,
            f"--other-weights must be others than --weights {self.weights}",
        )
