"""What a study can be asked for, beyond what decides the numbers of a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from comparison.settings import HeadName, Settings
from etflayers.checks import require


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """Train classifier heads with several seeds and measure how they collapse.

    All heads get the same backbone at the start, the same batches in the same order and the same learning
    rates.
    """

    free_on_resume: ClassVar[frozenset[str]] = Settings.free_on_resume | {"devices", "tensorboard", "wandb"}

    head: tuple[HeadName, ...] = ("standard", "fixed", "nearest", "nearest-detached", "learned")
    """Heads to train. linear: nn.Linear; standard: a learned weight with rows of length 1, without a bias;
    fixed, nearest, learned: the ETF heads of this library; nearest-detached: nearest, without the gradient
    through the frame."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training of each head for each seed."""
    epochs: int = 20
    """Passes over the training set."""
    devices: int = 1
    """Processes that share every batch, each on a device of its own: CUDA with nccl, the CPU with gloo."""
    tensorboard: bool = False
    """Write event files for TensorBoard into OUT/tensorboard."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Log to Weights & Biases; offline into OUT/wandb, to be sent later with `wandb sync`."""

    def check(self) -> None:
        super().check()
        require(self.devices >= 1, f"--devices must be at least 1, got {self.devices}")
        require(
            self.batch_size % self.devices == 0,
            f"--batch-size {self.batch_size} must be a multiple of --devices {self.devices}: every device "
            "takes an equal share",
        )
        require(
            self.torch_device.type == "cpu" or self.devices <= torch.cuda.device_count(),
            f"--devices {self.devices}: PyTorch finds {torch.cuda.device_count()} CUDA devices here",
        )

    @property
    def folder(self) -> Path:
        return self.out or Path("runs/study")
