"""The command: what it writes, and how it answers bad input."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from lab.results import Results
from train_heads import ComparisonSettings, main

HEADS = ("linear", "fixed", "nearest", "learned")
FIGURES = ("accuracy", "loss", "collapse", "cosines", "overview")
QUICK = ("--data", "digits", "--epochs", "1")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All heads, two seeds, three epochs on 8x8 digits."""
    pytest.importorskip("geoopt")
    folder = tmp_path_factory.mktemp("digits")
    seeds = ("--seeds", "0", "1")
    assert main(["--data", "digits", "--epochs", "3", *seeds, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the second that drawing takes where figures are not the point."""
    monkeypatch.setattr(Results, "figures", lambda self, makers: [])


@pytest.mark.parametrize("head", HEADS)
def test_every_epoch_is_written_twice(digits: Path, head: str) -> None:
    content = json.loads((digits / f"{head}-seed1.json").read_text())
    with (digits / f"{head}-seed1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in content["history"]] == [0, 1, 2, 3]
    numbers = [{name: float(value) for name, value in row.items() if value} for row in rows]
    assert numbers == content["history"]
    assert rows[-1].keys() - numbers[0].keys() == {"train_nc2_etf_drift_means"}
    assert content["settings"]["data"] == "digits"


@pytest.mark.parametrize("head", HEADS)
def test_training_learns_and_moves_towards_an_etf(digits: Path, head: str) -> None:
    first, *_, last = json.loads((digits / f"{head}-seed0.json").read_text())["history"]
    assert first["train_accuracy"] < 0.3
    assert last["train_accuracy"] > 0.9
    assert last["test_accuracy"] > 0.85
    assert last["train_loss"] < first["train_loss"]
    for name in ("train_nc1_trace", "train_nc2_etf_distance_means", "test_nc4_disagreement"):
        assert last[name] < first[name]
    assert last["test_margin_mean"] > first["test_margin_mean"]


def test_summary_has_one_row_for_each_head(digits: Path) -> None:
    rows = json.loads((digits / "summary.json").read_text())["heads"]
    assert [row["head"] for row in rows] == list(HEADS)
    for row in rows:
        accuracies = [
            json.loads((digits / f"{row['head']}-seed{seed}.json").read_text())["history"][-1][
                "test_accuracy"
            ]
            for seed in (0, 1)
        ]
        assert row["test_accuracy"] == pytest.approx(sum(accuracies) / 2)
        assert row["test_accuracy_std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
        assert 0 < row["head_ms"] < row["ms_per_step"]
        assert row["head_share"] == pytest.approx(row["head_ms"] / row["ms_per_step"])


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_pictures(digits: Path, name: str) -> None:
    with Image.open(digits / f"{name}.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert 600 <= picture.width <= 3000
        assert 400 <= picture.height <= 2000
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 50


def test_nothing_else_is_left_behind(digits: Path) -> None:
    runs = {f"{head}-seed{seed}" for head in HEADS for seed in (0, 1)}
    expected = {f"{run}.{kind}" for run in runs for kind in ("csv", "json")}
    expected |= {f"{name}.png" for name in FIGURES} | {
        "summary.csv",
        "summary.json",
        "run.json",
        "checkpoints",
    }
    assert {path.name for path in digits.iterdir()} == expected
    assert {path.name for path in (digits / "checkpoints").iterdir()} == {f"{run}.pt" for run in runs}


@pytest.mark.usefixtures("without_figures")
def test_as_many_features_as_classes_need_fewer_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--head", "fixed", "nearest", "--feature-dim", "K")
    assert main([*QUICK, *options, "--out", str(tmp_path)]) == 0
    with (tmp_path / "memory.csv").open() as file:
        default, fixed, nearest = csv.DictReader(file)
    assert (default["features"], fixed["features"], nearest["features"]) == ("64", "10", "10")
    for size in (fixed, nearest):
        for kind in ("parameters", "states", "activations"):
            assert int(size[kind]) < int(default[kind])
    # Both heads have no parameter. The frame of the canonical one is no tensor either.
    assert fixed["parameters"] == nearest["parameters"]
    assert int(fixed["states"]) < int(nearest["states"])
    assert "What the number of features saves" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ("--head", "fixed", "nearest", "learned", "--loss", "dr"),
        ("--optimizer", "adamw", "--normalize", "--shift", "1", "--flip"),
        pytest.param(("--amp", "bf16", "--momentum", "2/(t+1)", "--proximity", "0"), marks=pytest.mark.slow),
        pytest.param(
            ("--loss", "mse", "--feature-decay", "1e-4", "--batch-size", "16"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("--label-smoothing", "0.1", "--schedule", "step", "--width", "0.5", "--optimizer", "adam"),
            marks=pytest.mark.slow,
        ),
        ("--imbalance", "step", "--balanced", "--schedule", "constant", "--batch-size", "16"),
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.usefixtures("without_figures")
def test_options_train(tmp_path: Path, options: tuple[str, ...]) -> None:
    pytest.importorskip("geoopt")
    assert main([*QUICK, *options, "--out", str(tmp_path)]) == 0
    paths = list(tmp_path.glob("*-seed0.json"))
    assert paths
    for path in paths:
        first, last = json.loads(path.read_text())["history"]
        assert last["train_loss"] < first["train_loss"]
        assert last["test_accuracy"] > first["test_accuracy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--feature-dim", "8"), "at least K - 1 = 9"),
        (("--batch-size", "5000"), "more than the 1438 training images"),
        (("--scale", "0", "--head", "fixed"), "scale must be a finite number > 0"),
        (("--model", "timm:resnet18", "--depth", "2"), "leave out --width and --depth"),
        (("--model", "resnet19"), "resnet18"),
        (("--model", "torchvision:resnet18"), "comes with torchvision"),
        (("--model", "timm:resnet18"), "comes with timm"),
        (("--data", "cifar10"), "comes with torchvision"),
        (("--data", "folder", "--data-dir", "no/such/folder"), "no/such/folder is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_explained(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    for package in ("timm", "torchvision", "torchvision.datasets", "torchvision.models"):
        monkeypatch.setitem(sys.modules, package, None)  # as where they are not installed
    assert main([*QUICK, *options, "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("head", HEADS)
def test_divergence_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str) -> None:
    if head == "learned":
        pytest.importorskip("geoopt")
    assert main([*QUICK, "--head", head, "--lr", "1e30", "--out", str(tmp_path)]) == 1
    assert f"the {head} head diverged" in capsys.readouterr().err


def test_demo_writes_into_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it trains are the defaults, too long for here."""
    monkeypatch.chdir(tmp_path)
    assert main(["--demo", *QUICK, "--head", "linear"]) == 0
    assert (tmp_path / "runs" / "demo" / "overview.png").exists()
    defaults = ComparisonSettings(demo=True)
    assert (defaults.data, defaults.model, defaults.seeds, defaults.head) == ("mnist5k", "small", (0,), HEADS)


def test_runs_as_a_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = str(Path(__file__).parents[2] / "examples" / "train_heads.py")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    assert "--feature-dim" in capsys.readouterr().out
