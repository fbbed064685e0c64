"""The data of the lab by name: a training set and a test set in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from etflayers.checks import require
from lab.data.fashion import load_fashion
from lab.data.folder import load_folder
from lab.data.glyphs import load_glyphs
from lab.data.images import ImageData, Split
from lab.data.packages import load_digits, load_mnist5k, load_torchvision

if TYPE_CHECKING:
    from lab.settings import DataSettings

__all__ = ["ImageData", "Split", "load", "load_inputs"]

DEFAULT_SIDE = 32  # of images that could have any


def load(settings: DataSettings) -> ImageData:
    """The data that the settings name, as bytes, with as many classes and training images as they leave.

    Raises:
        InvalidArgumentError: a folder that does not exist or does not hold at least two classes of images.
        MissingDependencyError: the package that brings the data is not installed.
    """
    return _subset(settings).resized(settings.image_size)


def load_inputs(settings: DataSettings) -> ImageData:
    """The same as networks take them, of the size and on the device of the settings."""
    return _subset(settings).as_inputs().resized(settings.image_size).to(settings.torch_device)


def _subset(settings: DataSettings) -> ImageData:
    whole = _load(settings)
    count = whole.num_classes if settings.classes is None else settings.classes
    require(count <= whole.num_classes, f"--classes {count}: {whole.name} has {whole.num_classes} classes")
    train = whole.train.where(whole.train.targets < count)
    kept = settings.kept_images(train.targets, count)
    if kept is None and count == whole.num_classes:
        return whole
    train = train if kept is None else train.where(kept)
    test, validation = (part and part.where(part.targets < count) for part in (whole.test, whole.validation))
    return ImageData.of(whole.name, train, test, whole.class_names[:count], validation)


def _load(settings: DataSettings) -> ImageData:
    name, root, side = settings.data, settings.data_dir or Path("data"), settings.image_size or DEFAULT_SIDE
    if name == "mnist5k":
        return load_mnist5k()
    if name == "digits":
        return load_digits()
    if name == "fashion":
        return load_fashion(settings.data_dir)
    if name == "glyphs":
        return load_glyphs(root, side)
    if name == "folder":
        return load_folder(root, side, skip_bad=settings.skip_bad)
    return load_torchvision(name, root)
