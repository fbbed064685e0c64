"""What the study of collapse on distilled data can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from distillation.settings import DistilHeadName, DistillationSettings, NetworkName, NormName
from etflayers.checks import require


@dataclass(frozen=True, kw_only=True)
class CollapseSettings(DistillationSettings):
    """Train networks with different heads on distilled and on real images, and measure how far they collapse.

    All trainings take the same steps, at the same rates. Finished ones are kept for `--resume`.
    """

    free_on_resume: ClassVar[frozenset[str]] = DistillationSettings.free_on_resume | {
        "quick",
        "heads",
        "sets",
        "per_class",
        "kernel_steps",
    }

    sets: tuple[Path, ...] = ()
    """Files of distilled sets, as the other studies write them (default: a kernel set is learned first)."""
    per_class: int = 10
    """Without `--sets`: images of each class in the kernel set."""
    kernel_steps: int = 200
    """Without `--sets`: updates of the kernel set."""
    heads: tuple[DistilHeadName, ...] = ("standard", "fixed", "nearest")
    """standard: a learned weight with rows of length 1, without a bias; fixed, nearest: the ETF heads of this
    library; linear: nn.Linear."""
    network: NetworkName = "lenet"
    """lenet; convnet: three blocks of convolution, norm, ReLU and average pooling; mlp: one hidden layer."""
    width: int | None = None
    """Channels of the convnet (default: 32), hidden units of the mlp (default: 128)."""
    norm: NormName = "instance"
    """Normalization in the convnet."""
    normalize: bool = True
    """Whether the standard and the ETF heads divide features by their length."""
    scale: float = 5.0
    """Scale of their logits. The frame of the fixed head is rotated at random."""

    steps: int = 500
    """Training steps."""
    batch_size: int = 50
    """Images in a step; all, if there are no more."""
    lr: float = 0.02
    """Learning rate at the start; it falls to 0 as a cosine."""
    momentum: float = 0.9
    """Nesterov's."""
    weight_decay: float = 1e-3
    """Of all parameters."""
    spacing: float = 3.0
    """Ratio of successive steps that are measured."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Under a minute: digits, a small mlp, 100 steps; all else as given."""

    @property
    def resolved(self) -> CollapseSettings:
        """What is run: these settings, with those of `--quick`."""
        if not self.quick:
            return self
        return replace(self, data="digits", network="mlp", width=32, steps=100, spacing=4.0, kernel_steps=30)

    @property
    def study(self) -> str:
        return "collapse"

    def check(self) -> None:
        super().check()
        require(
            len(set(self.heads)) == len(self.heads) > 0,
            f"--heads must name different heads, got {self.heads}",
        )
        stems = [path.stem for path in self.sets]
        require(len(set(stems)) == len(stems), f"--sets must be files of different names, got {stems}")
        for path in self.sets:
            require(path.is_file(), f"--sets {path}: there is no such file")
        self._require_at_least(1, "per_class", "kernel_steps", "steps", "batch_size")
        require(self.width is None or self.width >= 1, f"--width must be at least 1, got {self.width}")
        require(0 < self.lr < math.inf, f"--lr must be a positive number, got {self.lr}")
        require(0 <= self.momentum < 1, f"--momentum must lie in [0, 1), got {self.momentum}")
        require(
            0 <= self.weight_decay < math.inf,
            f"--weight-decay must be a finite number >= 0, got {self.weight_decay}",
        )
        require(0 < self.scale < math.inf, f"--scale must be a positive number, got {self.scale}")
        require(self.spacing > 1, f"--spacing must be greater than 1, got {self.spacing}")

    def measured_steps(self) -> list[int]:
        """0, 1, then a geometric sequence, and the last step."""
        steps = [0, 1]
        while steps[-1] < self.steps:
            steps.append(min(self.steps, max(steps[-1] + 1, int(steps[-1] * self.spacing))))
        return steps
