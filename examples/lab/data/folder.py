"""Images of a user: a folder with a subfolder for each class, or two such folders, for training and test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etflayers.checks import require, require_module
from etflayers.errors import InvalidArgumentError
from lab.data.images import ImageData, Split, with_test_share
from lab.progress import note

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


# Pillow's modes of pixels that have, or can be given, one byte for a color: grey levels, and colors.
GREY = ("1", "L", "LA")
COLORED = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
WHITE_16 = 2**16 - 1
LISTED = 20  # bad images that are named


def load_folder(root: Path, side: int, *, skip_bad: bool = False) -> ImageData:
    """The images of ``root/CLASS``, or of ``root/train/CLASS`` and ``root/test/CLASS``, resized.

    Raises:
        InvalidArgumentError: a folder that holds something else, or with the name of each image that cannot
            be read, unless these are to be left out.
    """
    require(
        root.is_dir(),
        f"--data-dir {root} is not a folder: give the one that holds a subfolder for each class",
    )
    own_split = (root / "train").is_dir() and (root / "test").is_dir()
    bad: list[str] = []
    parts = [_read_classes(root / part, side, bad) for part in (("train", "test") if own_split else ("",))]
    listed = "\n".join([*bad[:LISTED], *([f"and {len(bad) - LISTED} more"] if len(bad) > LISTED else [])])
    require(skip_bad or not bad, f"{listed}\nremove or replace what cannot be read, or add --skip-bad")
    if bad:
        note(f"left out {len(bad)} image(s):\n{listed}")
    # One color for all images, or three.
    channels = 1 if all(picture.ndim == 2 for picture, _ in parts[0][0]) else 3
    train, *test = (_stacked(pictures, channels) for pictures, _ in parts)
    class_names = parts[0][1]
    if not test:
        return with_test_share(root.name, train.images, train.targets, class_names)
    require(
        parts[1][1] == class_names,
        f"{root}: the classes in test, {list(parts[1][1])}, must be those in train, {list(class_names)}",
    )
    return ImageData.of(root.name, train, *test, class_names)


def _read_classes(root: Path, side: int, bad: list[str]) -> tuple[list[tuple[Tensor, int]], tuple[str, ...]]:
    """Every image with the number of its class, and the names of these; ``bad`` gets what is none."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    require(
        len(folders) >= 2,
        f"{root} holds {len(folders)} subfolder(s): it needs one for each class, and two classes or more",
    )
    found = []
    for label, folder in enumerate(folders):
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        require(bool(paths), f"{folder} holds no image: expected files such as {', '.join(SUFFIXES[:4])}")
        before = len(bad)
        for path in paths:
            try:
                found.append((_read_image(path, side), label))
            except InvalidArgumentError as error:
                bad.append(str(error))
        require(
            len(bad) < before + len(paths),
            "\n".join([*bad[before:][:LISTED], f"{folder} holds no other image: replace them"]),
        )
    return found, tuple(folder.name for folder in folders)


def _stacked(pictures: list[tuple[Tensor, int]], channels: int) -> Split:
    images = torch.stack([_with_channels(picture, channels) for picture, _ in pictures])
    return Split(images, torch.tensor([label for _, label in pictures]))


def _read_image(path: Path, side: int) -> Tensor:
    """Pixels ``(side, side)`` of a grey image, ``(side, side, 3)`` of a colored one, as bytes."""
    pillow = require_module("PIL.Image", extra="examples")
    try:
        with pillow.open(path) as picture:
            mode, file_format = picture.mode, picture.format
            # 16 bits of grey are I;16 or, from some formats, I, which in others has no known white.
            deep = mode.startswith("I;16") or (mode == "I" and file_format in ("PNG", "PPM"))
            if deep:
                picture = picture.convert("I").convert("F")  # which no conversion clips
            elif mode in GREY + COLORED:
                picture = _opaque(picture).convert("L" if mode in GREY else "RGB")
            resized = np.array(picture.resize((side, side), pillow.Resampling.BILINEAR))
    except Exception as error:  # decoders raise what they please
        raise InvalidArgumentError(f"{path} cannot be read as an image: {error}") from error
    require(
        deep or mode in GREY + COLORED,
        f"{path} cannot be read as an image: what is white is not known of Pillow's mode {mode!r}, save "
        "it with 8 or 16 bits",
    )
    return torch.from_numpy((resized * (255 / WHITE_16)).round().astype(np.uint8) if deep else resized)


def _opaque(picture: Any) -> Any:
    """On white where it is transparent, as people see it: what color a transparent pixel has is chance."""
    if not picture.has_transparency_data:
        return picture
    pillow = require_module("PIL.Image", extra="examples")
    picture = picture.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", picture.size, "white"), picture)


def _with_channels(picture: Tensor, channels: int) -> Tensor:
    if picture.ndim == 2:
        return picture.expand(channels, -1, -1)
    if channels == 3:
        return picture.permute(2, 0, 1)
    return picture.float().mean(-1).round().to(torch.uint8).unsqueeze(0)
