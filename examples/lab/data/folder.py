"""Images of a user: a folder with a subfolder for each class, or two such folders, for training and test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from etflayers.checks import require, require_module
from etflayers.errors import InvalidArgumentError
from lab.data.images import ImageData, Split, with_test_share

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


def load_folder(root: Path, side: int) -> ImageData:
    """The images of ``root/CLASS``, or of ``root/train/CLASS`` and ``root/test/CLASS``, resized."""
    require(
        root.is_dir(),
        f"--data-dir {root} is not a folder: give the one that holds a subfolder for each class",
    )
    if not ((root / "train").is_dir() and (root / "test").is_dir()):
        both, class_names = _read_classes(root, side)
        return with_test_share(root.name, both.images, both.targets, class_names)
    train, class_names = _read_classes(root / "train", side)
    test, test_names = _read_classes(root / "test", side, channels=train.images.shape[1])
    require(
        test_names == class_names,
        f"{root}: the classes in test, {list(test_names)}, must be those in train, {list(class_names)}",
    )
    return ImageData.of(root.name, train, test, class_names)


def _read_classes(root: Path, side: int, channels: int | None = None) -> tuple[Split, tuple[str, ...]]:
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    require(
        len(folders) >= 2,
        f"{root} holds {len(folders)} subfolder(s): it needs one for each class, and two classes or more",
    )
    pictures, targets = [], []
    for label, folder in enumerate(folders):
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        require(bool(paths), f"{folder} holds no image: expected files such as {', '.join(SUFFIXES[:4])}")
        pictures += [_read_image(path, side) for path in paths]
        targets += [label] * len(paths)
    if channels is None:
        channels = 1 if all(picture.ndim == 2 for picture in pictures) else 3
    images = torch.stack([_with_channels(picture, channels) for picture in pictures])
    return Split(images, torch.tensor(targets)), tuple(folder.name for folder in folders)


def _read_image(path: Path, side: int) -> Tensor:
    """Pixels ``(side, side)`` of a grey image, ``(side, side, 3)`` of a colored one."""
    pillow = require_module("PIL.Image", extra="examples")
    try:
        with pillow.open(path) as picture:
            grey = picture.mode in ("1", "L", "LA")
            resized = picture.convert("L" if grey else "RGB").resize((side, side), pillow.Resampling.BILINEAR)
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read as an image: remove it or replace it") from error
    return torch.from_numpy(np.array(resized))


def _with_channels(picture: Tensor, channels: int) -> Tensor:
    if picture.ndim == 2:
        return picture.expand(channels, -1, -1)
    if channels == 3:
        return picture.permute(2, 0, 1)
    return picture.float().mean(-1).round().to(torch.uint8).unsqueeze(0)
