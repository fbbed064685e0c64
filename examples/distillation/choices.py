"""What the study of learned images can vary: the networks that are trained on them."""

from __future__ import annotations

from dataclasses import dataclass

from distillation.common import NetworkSettings
from etflayers.checks import require
from lab.networks import WITH_HIDDEN_UNITS
from lab.options import Share


@dataclass(frozen=True, kw_only=True)
class TraineeSettings(NetworkSettings):
    """How the networks are made and trained on the images."""

    dropout: Share = 0.0
    """Share of the units of each hidden dense layer that is dropped, anew in each inner step; of lenet,
    alexnet and mlp. Networks that are judged are trained with it, too."""

    def check(self) -> None:
        super().check()
        require(
            self.dropout == 0 or self.network in WITH_HIDDEN_UNITS,
            f"--dropout drops hidden units of dense layers, and --network {self.network} has none: take "
            f"--network {', '.join(WITH_HIDDEN_UNITS[:-1])} or {WITH_HIDDEN_UNITS[-1]}",
        )
