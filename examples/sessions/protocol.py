"""Which classes come when, with which images, and on what is tested."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.data import class_subset
from lab.data import ImageData, Split, load
from lab.data.images import joined
from lab.data.sampling import affine_maps, transformed
from lab.options import Count, Distinct, Free, NotNegative, Positive, at_least
from lab.settings import DataName, DataSettings

Simple = Literal[
    "fine-tuned",
    "linear",
    "cosine",
    "cosine-class-mean",
    "class-mean",
    "projector-linear",
    "projector-class-mean",
]
Framed = Literal["etf", "etf-class-mean", "etf-transit", "etf-grown", "etf-ce", "etf-ce-class-mean"]
Method = Literal[Simple, Framed, "joint"]
SIMPLE: tuple[Method, ...] = get_args(Simple)
FRAMED: tuple[Method, ...] = get_args(Framed)
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, kw_only=True)
class IncrementalSettings(DataSettings):
    """What decides the numbers; the same for every method."""

    default_out = "runs/incremental"

    data: DataName = "glyphs"
    """Which images: glyphs are the data of this study; for the others see examples/train_heads.py."""
    more_data: DataName | None = None
    """Other images whose classes come beside those of --data, of the same size: `--data fashion --more-data
    mnist5k` has twenty classes. As many test images of each class are kept as the smallest has."""
    per_class: Count | None = None
    """Take this many training images of each class at most, the validation images of it included."""
    classes: Annotated[int, at_least(2)] = 100
    """All classes that ever come; the seed says in which order."""
    base_classes: Count = 60
    """Classes of the base session, with all of their training images."""
    new_classes: Count = 5
    """Classes that come in each later session."""
    shots: Free[Distinct[Count]] = (1, 5)
    """Training images of each class that comes later: the sessions are run once with each number."""
    views: Count = 1
    """Distorted copies that are made of each of these images: the one image itself is not seen."""
    methods: Free[Distinct[Method]] = METHODS
    """What is compared: see docs/evidence/incremental.md."""
    affine: NotNegative = 0.2
    """Turn, stretch, shear and move each image by up to about this, those of the test too."""
    noise: NotNegative = 0.25
    """Deviation of the noise that is added to each pixel, as a share of the range from black to white."""
    copies: Count = 5
    """Distorted copies of each image that is tested, and of each base image in a class mean."""
    epochs: Count = 40
    """Passes over the training images in the base session."""
    batch_size: Count = 32
    """Images in a step of the base session; the remainder of an epoch is dropped."""
    lr: Free[Distinct[Positive]] = (3e-3, 1e-2)
    """Peak learning rates of AdamW in the base session, after a linear warm-up and before a cosine:
    validation chooses one for each head and seed."""
    weight_decay: NotNegative = 5e-4
    """Decay of all parameters in the base session."""
    features: Annotated[int, at_least(2)] = 128
    """Number of features d behind the projector."""
    scale: Positive = 16.0
    """Scale of the logits where features have length 1 and the loss is the cross-entropy."""
    session_lr: Distinct[Positive] = (1e-4, 1e-3, 1e-2)
    """Peak learning rates of Adam in the later sessions: validation chooses one for each method and seed."""
    session_steps: Distinct[Count] = (10, 40)
    """Steps in each of the later sessions: chosen together with the learning rate."""
    threads: Count = 1
    """CPU threads."""

    def check(self) -> None:
        super().check()
        require(self.batch_size >= 2, "--batch-size must be at least 2: batch normalization needs two images")
        later = self.classes - self.base_classes
        require(
            later > 0 and later % self.new_classes == 0,
            f"--classes {self.classes} must be --base-classes {self.base_classes} and one or more sessions of"
            f" --new-classes {self.new_classes}",
        )
        require(
            self.features >= self.classes - 1,
            f"--features must be at least --classes - 1 = {self.classes - 1}, the least for a simplex ETF, "
            f"got {self.features}",
        )

    def kept_images(self, targets: Tensor, num_classes: int) -> Tensor | None:
        if self.per_class is None:
            return None
        return class_subset(targets, torch.bincount(targets, minlength=num_classes).clamp(max=self.per_class))

    def base_fingerprint(self) -> dict[str, Any]:
        """What decides the numbers of a base session: nothing that is only asked for later."""
        later = ("views", "new_classes", "session_lr", "session_steps")
        return {name: value for name, value in self.fingerprint().items() if name not in later}

    @property
    def seen(self) -> tuple[int, ...]:
        """How many classes have come with each session, the base session first."""
        return tuple(range(self.base_classes, self.classes + 1, self.new_classes))


@dataclass(frozen=True)
class Episode:
    """The data of one seed: classes are numbered as they come.

    Attributes:
        train: all training images, as they were drawn; every step distorts those of the base classes anew.
        shots: the few images of the later classes, distorted, as inputs: nobody sees them otherwise.
        validation: distorted once, as inputs, of all classes.
        test: the same of the test set.
    """

    data: ImageData
    train: Split
    shots: Split
    validation: Split
    test: Split


def load_classes(settings: IncrementalSettings) -> ImageData:
    """The images of the settings, of one or of two data sets."""
    if settings.more_data is None:
        return load(settings)
    parts = [replace(settings, data=name, classes=None) for name in (settings.data, settings.more_data)]
    whole = joined(*map(load, parts))
    require(
        whole.num_classes == settings.classes,
        f"--classes {settings.classes}: {whole.name} have {whole.num_classes} classes, and all of them come",
    )
    return whole


def make_episode(seed: int, shots: int, settings: IncrementalSettings, data: ImageData) -> Episode:
    """Number the classes and draw the shots by the seed; what is tested is distorted alike for all seeds."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randperm(data.num_classes, generator=generator)
    train, validation = (_renumbered(part, number) for part in data.held_out())
    later = train.where(train.targets >= settings.base_classes)
    later = later.where(torch.randperm(len(later), generator=generator).to(later.targets.device))
    chosen = [torch.nonzero(later.targets == label)[:shots, 0] for label in later.targets.unique()]
    few = later.where(torch.cat(chosen).repeat_interleave(settings.views))
    require(
        len(few) == settings.views * shots * (data.num_classes - settings.base_classes),
        f"--shots {shots}: some class of {data.name} has fewer training images",
    )
    return Episode(
        data,
        train,
        Split(distorted(few.images, settings, data, generator), few.targets),
        _copies(validation, settings, data, 0),
        _copies(_renumbered(data.test, number), settings, data, 1),
    )


def _renumbered(split: Split, number: Tensor) -> Split:
    return Split(split.images, number.to(split.targets.device)[split.targets])


def _copies(split: Split, settings: IncrementalSettings, data: ImageData, stream: int) -> Split:
    images = split.images.repeat_interleave(settings.copies, 0)
    generator = torch.Generator().manual_seed(stream)
    inputs = distorted(images, settings, data, generator)
    return Split(inputs, split.targets.repeat_interleave(settings.copies))


def distorted(
    images: Tensor, settings: IncrementalSettings, data: ImageData, generator: torch.Generator
) -> Tensor:
    """Bytes seen through a random map and with noise on every pixel, as inputs of a network."""
    maps = affine_maps(len(images), settings.affine, generator).to(images.device)
    noise = 255 * settings.noise * torch.randn(images.shape, generator=generator)
    seen = transformed(images, maps).float() + noise.to(images.device)
    return data.normalized(seen.round().clamp(0, 255).to(torch.uint8))
