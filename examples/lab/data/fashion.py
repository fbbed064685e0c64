"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747): 70,000 images of clothes, ten classes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.errors import InvalidArgumentError, MissingDependencyError
from lab.data.images import ImageData, Split
from lab.data.packages import load_torchvision

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts the files
CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")


def load_fashion(root: Path | None) -> ImageData:
    """All of it: from the files in ``root``, from those of Debian's package, or through torchvision.

    Raises:
        InvalidArgumentError: a file that is not what its name says.
        MissingDependencyError: none of the three is there.
    """
    for folder in (root, DEBIAN):
        if folder is not None and (folder / "train-images-idx3-ubyte.gz").exists():
            return ImageData.of("fashion", _read(folder, "train"), _read(folder, "t10k"), CLASSES)
    try:
        return load_torchvision("fashion-mnist", root or Path("data"))
    except MissingDependencyError as error:
        raise MissingDependencyError(
            "--data fashion is in none of three places: install Debian's package (apt install "
            "dataset-fashion-mnist), or give the folder with its four files *-ubyte.gz by --data-dir, or "
            "install torchvision"
        ) from error


def _read(folder: Path, part: str) -> Split:
    images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    targets = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    require(len(images) == len(targets), f"{folder}: {len(images)} images, {len(targets)} labels of {part}")
    require(
        int(targets.max()) < len(CLASSES), f"{folder}: the labels of {part} must lie in [0, {len(CLASSES)})"
    )
    return Split(images.unsqueeze(1), targets.long())


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """Bytes in the format IDX: 0, 0, 8 (bytes), the number of dimensions, each size in 4 bytes, then data."""
    try:
        content, head = gzip.decompress(path.read_bytes()), 4 + 4 * dimensions
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidArgumentError(f"{path} is damaged ({error}): fetch it again") from error
    sizes = np.frombuffer(content[4:head], ">u4").tolist()
    require(
        content[:4] == bytes((0, 0, 8, dimensions)) and len(content) == head + math.prod(sizes),
        f"{path} is no IDX file of bytes with {dimensions} dimension(s): fetch it again",
    )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=head).reshape(sizes).copy())
