"""Collapse on distilled data: what is trained on, what is measured and of which images, files and resume."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from distillation import collapse as module
from distillation.collapse import (
    CollapseSettings,
    TrainingSet,
    collapse_study,
    make_network,
    train_and_measure,
    training_sets,
)
from distillation.collapse_figures import several_sizes, sizes_figure
from distillation.common import inner_loss
from etflayers.distill import DistilledSet, teach
from etflayers.errors import InvalidArgumentError, NonFiniteError
from lab.data import ImageData, load_inputs
from lab.results import Results

SMALL: dict[str, Any] = {"data": "digits", "network": "mlp", "width": 16, "steps": 6, "batch_size": 40}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_inputs(CollapseSettings(data="digits"))


def some_set(data: ImageData, count: int = 2, **options: Any) -> DistilledSet:
    generator = torch.Generator().manual_seed(0)
    return DistilledSet.from_data(
        data.train.images, data.train.targets, per_class=count, generator=generator, **options
    )


def test_measures_are_of_the_right_images(digits: ImageData) -> None:
    """At the first step, from the features of the untrained network and the definitions in numpy."""
    settings = CollapseSettings(**SMALL)
    training = TrainingSet.of("few", some_set(digits, count=3))
    row = train_and_measure(training, "standard", 5, digits, replace(settings, steps=1))[0]
    network = make_network("standard", 5, digits, settings).eval()

    def features(inputs: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return F.normalize(network.body(inputs), dim=-1).double().numpy()

    means = {}
    images = {
        "own": (training.inputs, training.labels),
        "train": (digits.train.images, digits.train.targets),
        "test": (digits.test.images, digits.test.targets),
    }
    for part, (inputs, targets) in images.items():
        h, y = features(inputs), targets.numpy()
        means[part] = np.stack([h[y == k].mean(0) for k in range(10)])
        within = h - means[part][y]
        between = means[part] - means[part].mean(0)
        ratio = np.trace(within.T @ within / len(h) @ np.linalg.pinv(between.T @ between / 10)) / 10
        assert row[f"{part}_nc1_trace"] == pytest.approx(ratio, rel=1e-3)  # features are float32
        with torch.no_grad():
            chosen = network(inputs).argmax(-1).numpy()
        assert row[f"{part}_accuracy"] == pytest.approx((chosen == y).mean(), rel=1e-6)
    distances = ((features(digits.test.images)[:, None] - means["train"]) ** 2).sum(-1)
    with torch.no_grad():
        chosen = network(digits.test.images).argmax(-1).numpy()
    assert row["test_nc4_disagreement"] == pytest.approx((chosen != distances.argmin(1)).mean(), abs=3e-3)


def test_heads_share_a_body(digits: ImageData) -> None:
    bodies = [
        make_network(head, 3, digits, CollapseSettings(**SMALL)).body
        for head in ("fixed", "nearest", "linear")
    ]
    for body in bodies[1:]:
        for name, value in body.state_dict().items():
            assert torch.equal(value, bodies[0].state_dict()[name])


def test_training_on_few_images_collapses_there(digits: ImageData) -> None:
    """All ten classes fitted, and the features of each closer together than at the start by a factor."""
    settings = CollapseSettings(**{**SMALL, "width": 64, "steps": 150, "lr": 0.05, "spacing": 150.0})
    training = TrainingSet.of("few", some_set(digits, count=4))
    first, *_, last = train_and_measure(training, "nearest", 0, digits, settings)
    assert last["own_accuracy"] == 1
    assert last["own_nc1_trace"] < 0.2 * first["own_nc1_trace"]
    assert last["own_nc1_trace"] < 0.5 * last["test_nc1_trace"]


def test_labels_are_probabilities_or_classes(digits: ImageData) -> None:
    hot = TrainingSet.of("soft", some_set(digits, labels="one-hot"))
    assert hot.labels.shape == (20, 10)
    centered = TrainingSet.of("regression", some_set(digits, labels="centered"))
    assert torch.equal(centered.labels, torch.arange(10).repeat(2))
    assert torch.equal(hot.classes, centered.classes)


def test_own_steps_are_those_of_the_set(digits: ImageData) -> None:
    made = some_set(digits, rates=torch.tensor([0.3, 0.1, 0.2, 0.1]))
    assert len(TrainingSet.both("set", made)) == 1  # nothing says in which batches
    made.metadata = {"settings": {"steps": 2, "optimizer": "sgd"}}
    plain, training = TrainingSet.both("set", made)
    assert plain.lesson is None
    assert training.lesson is not None
    settings = CollapseSettings(**SMALL)
    rows = train_and_measure(training, "linear", 1, digits, settings)
    assert [row["step"] for row in rows] == [0, 4]
    network = make_network("linear", 1, digits, settings)
    teach(network, training.lesson, loss=inner_loss).eval()
    with torch.no_grad():
        right = network(digits.test.images).argmax(-1) == digits.test.targets
    assert rows[-1]["test_accuracy"] == pytest.approx(right.double().mean().item(), rel=1e-6)


def test_outputs_and_resume(tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.safetensors"
    some_set(
        digits, rates=torch.full((2,), 0.1), metadata={"settings": {"steps": 1, "optimizer": "adam"}}
    ).save(path)
    settings = CollapseSettings(
        **{**SMALL, "steps": 2}, sets=(path,), heads=("nearest",), out=tmp_path / "out"
    )
    rows = collapse_study(settings, Console(quiet=True))
    names = ["all real images", "mine", "mine, own steps", "20 random real images"]
    assert list(dict.fromkeys(row["set"] for row in rows)) == names
    assert len(rows) == 3 * len(settings.measured_steps()) + 2
    with (tmp_path / "out" / "collapse.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["train_nc3_distance"]) for row in written] == [
        row["train_nc3_distance"] for row in rows
    ]
    for name in ("real-images", "own-images"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    again = replace(settings, resume=True)
    with monkeypatch.context() as patched:
        patched.setattr(
            module, "train_and_measure", lambda *_: pytest.fail("a finished training is done again")
        )
        assert collapse_study(again, Console(quiet=True)) == rows
    some_set(digits, count=2, labels="one-hot").save(path)
    with pytest.raises(InvalidArgumentError, match="images of the set was"):
        collapse_study(again, Console(quiet=True))


def test_the_figure_of_sizes_shows_the_summary() -> None:
    def row(name: str, images: int, accuracy: float, head: str = "fixed") -> dict[str, Any]:
        measures = {"test_accuracy": accuracy, "train_nc1_trace": 1 / images, "train_nc1_trace_std": None}
        return {"set": name, "images": images, "head": head, **measures}

    sets = {"all real images": (4000, 0.9), "kernel-1": (10, 0.5), "kernel-10": (100, 0.7)}
    sets |= {"10 random real images": (10, 0.4), "100 random real images": (100, 0.6)}
    summary = [row(name, *values) for name, values in sets.items()]
    assert several_sizes(summary)
    assert not several_sizes(summary[:4])
    figure = sizes_figure(list(reversed(summary)), "digits")
    accuracy, nc1, *_ = figure.axes
    shown = {box.get_label(): box.lines[0] for box in accuracy.containers}
    assert list(shown) == ["random real images", "kernel"]
    assert shown["kernel"].get_xydata().tolist() == [[10, 0.5], [100, 0.7]]
    assert shown["random real images"].get_xydata().tolist() == [[10, 0.4], [100, 0.6]]
    assert nc1.containers[1].lines[0].get_ydata().tolist() == [0.1, 0.01]
    hidden = [{**each, "set": each["set"].replace("kernel", "_mine")} for each in summary]
    labels = [box.get_label() for box in sizes_figure(hidden, "digits").axes[0].containers]
    assert labels == [" _mine", "random real images"]  # matplotlib shows none that begins with _
    across = [line for line in accuracy.lines if line.get_label() == "all real images"]
    assert [line.get_ydata()[0] for line in across] == [0.9]


def test_without_sets_a_kernel_set_is_learned(tmp_path: Path, digits: ImageData) -> None:
    settings = CollapseSettings(**SMALL, per_class=1, kernel_steps=2, out=tmp_path)
    sets = training_sets(settings, 0, digits, Results(tmp_path, Console(quiet=True)))
    assert [training.name for training in sets] == [
        "all real images",
        "10 kernel images",
        "10 random real images",
    ]
    loaded = DistilledSet.load(tmp_path / "kernel-1-a-class-seed0.safetensors")
    assert torch.equal(sets[1].inputs, loaded.inputs.detach())


def test_set_that_does_not_fit_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    DistilledSet.from_noise((1, 4, 4), 10, per_class=1).save(path)
    with pytest.raises(InvalidArgumentError, match=r"10 classes of images \(1, 4, 4\)"):
        collapse_study(CollapseSettings(**SMALL, sets=(path,), out=tmp_path), Console(quiet=True))


def test_divergence_says_where(digits: ImageData) -> None:
    settings = CollapseSettings(**{**SMALL, "lr": 1e6, "normalize": False})
    with pytest.raises(NonFiniteError, match=r"few, standard head: .*overflow"):
        train_and_measure(TrainingSet.of("few", some_set(digits)), "standard", 0, digits, settings)
