"""What a network knows, what it does not, and the tasks to which its features are transferred."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.errors import MissingDependencyError
from lab.data import ImageData, Split, load
from lab.settings import DataSettings

LETTERS = 62  # the classes of glyphs that are ASCII's letters and digits
OTHERS = {"mnist5k": None, "digits": None, "fashion": None, "glyphs": LETTERS}
SCRIPTS = ("greek", "cyrillic")
# In all of these are digits: to one that has learned some of them, the others are not unknown. And what is
# turned may be known: an N is a Z.
WRITTEN = ("mnist5k", "digits", "glyphs", "mnist")


class Task(NamedTuple):
    """Other classes, to be told apart from the features that a network has already."""

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class World:
    """Everything that is shown to the networks.

    Attributes:
        known: the data that they learn, and on whose test set they are asked.
        unknown: images ``(N, C, H, W)`` by kind, as bytes of the same size.
        tasks: by name.
        absent: data that are not there, and why.
    """

    known: ImageData
    unknown: dict[str, Tensor]
    tasks: dict[str, Task]
    absent: dict[str, str]

    @property
    def fingerprint(self) -> dict[str, Any]:
        shown = {name: [len(images), int(images.sum())] for name, images in self.unknown.items()}
        return {**self.known.fingerprint, "unknown": shown, "tasks": list(self.tasks)}


def make_world(
    whole: ImageData, known: int | None, images: int, probe_images: int, settings: DataSettings
) -> World:
    """Divide the classes of ``whole`` into known and unknown ones, and load all other data in its size.

    Nothing here depends on the seed of a run.

    Args:
        whole: all classes.
        known: how many of them are learned, the first ones; ``None``: all.
        images: of each kind of unknown input, at most.
        probe_images: to train on in each task, at most.
        settings: give the folders of data.

    Raises:
        InvalidArgumentError: more known classes than there are; images with colors, which the others lack.
    """
    require(whole.shape[0] == 1, f"--data {whole.name} has colors, and all that is unknown here is grey")
    count = whole.num_classes if known is None else known
    require(count <= whole.num_classes, f"--known {count}: {whole.name} has {whole.num_classes} classes")
    data = whole  # as it is, if all are known: trained networks expect the mean and deviation that it has
    if count < whole.num_classes:
        part = _classes(whole, lambda targets: targets < count)
        data = ImageData.of(whole.name, part.train, part.test, whole.class_names[:count], part.validation)
    others, absent = _other_data(whole, settings)
    unknown = {
        name: other.test.images for name, other in others.items() if not {whole.name, name} <= set(WRITTEN)
    }
    unknown |= _held_out(whole, count)
    if whole.name not in WRITTEN:
        unknown["rotated"] = data.test.images.rot90(1, (2, 3))
    generator = torch.Generator().manual_seed(0)
    unknown["noise"] = torch.randint(256, (images, *data.shape), generator=generator, dtype=torch.uint8)
    unknown = {name: pictures[_some(len(pictures), images)] for name, pictures in unknown.items()}
    tasks = {name: _task(other, probe_images) for name, other in others.items()}
    return World(data, unknown, tasks, absent)


def _other_data(whole: ImageData, settings: DataSettings) -> tuple[dict[str, ImageData], dict[str, str]]:
    """All other data in the size of these, and why some are not there."""
    side, folder = whole.shape[-1], settings.data_dir if settings.data != "folder" else None
    found, absent = {}, {}
    for name, classes in OTHERS.items():
        if name == whole.name:
            continue
        try:
            found[name] = load(DataSettings(data=name, classes=classes, image_size=side, data_dir=folder))
        except MissingDependencyError as error:
            absent[name] = str(error)
    require(bool(found), f"none of {', '.join(OTHERS)} is installed, and one is needed as unknown data")
    return found, absent


def _held_out(whole: ImageData, count: int) -> dict[str, Tensor]:
    """Test images of the classes that are not learned; of glyphs by their script."""
    if count == whole.num_classes:
        return {}
    if whole.name != "glyphs":
        return {"held-out": _classes(whole, lambda targets: targets >= count).test.images}
    scripts = [unicodedata.name(character, "?").split()[0].lower() for character in whole.class_names]
    found = {}
    for script in SCRIPTS:
        numbers = [number for number in range(count, whole.num_classes) if scripts[number] == script]
        wanted = torch.tensor(numbers)
        if numbers:
            found[script] = _classes(whole, lambda t, wanted=wanted: torch.isin(t, wanted)).test.images
    return found


def _classes(data: ImageData, wanted: Callable[[Tensor], Tensor]) -> ImageData:
    return data.mapped(lambda split: split.where(wanted(split.targets)))


def _some(count: int, most: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]


def _task(data: ImageData, most: int) -> Task:
    train, validation = data.held_out()
    parts = (part.where(_some(len(part), most)) for part in (train, validation, data.test))
    return Task(*parts)
