"""The study of classes that come in sessions: its protocol, learners and files, and that it continues."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError
from incremental import Study, main
from lab.data import ImageData, Split, load
from lab.data.images import joined
from lab.files import Row
from sessions import learners
from sessions.base import BaseKey, BaseRun, Network
from sessions.learners import (
    BASES,
    KINDS,
    Budget,
    Learner,
    NearestMean,
    Sight,
    hits,
    sights,
)
from sessions.protocol import METHODS, IncrementalSettings, load_classes, make_episode

CLASSES, BASE, NEW = 10, 6, 2
SIZES = {"classes": CLASSES, "base_classes": BASE, "new_classes": NEW, "features": 12, "image_size": 8}
SMALL = ["--classes", "10", "--base-classes", "6", "--new-classes", "2", "--features", "12"]
SMALL += ["--image-size", "8", "--epochs", "2", "--batch-size", "8", "--copies", "1"]
SMALL += ["--session-lr", "0.01", "0.001", "--session-steps", "3", "--lr", "0.003", "0.01"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the glyphs are drawn once."""
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(scope="module")
def settings(data_dir: Path) -> IncrementalSettings:
    return IncrementalSettings(**SIZES, epochs=2, copies=2, data_dir=data_dir)


@pytest.fixture(scope="module")
def data(settings: IncrementalSettings) -> ImageData:
    return load(settings)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_all_methods_from_the_command_line(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--out", str(tmp_path), "--data-dir", str(data_dir)]) == 0
    runs, summary = rows_of(tmp_path / "runs.csv"), rows_of(tmp_path / "summary.csv")
    assert [(row["shots"], row["method"]) for row in summary] == list(product("15", METHODS))
    assert len(runs) == 2 * 3 * len(METHODS)
    for row in runs:
        base, novel = float(row["accuracy_base"]), row["accuracy_novel"]
        assert (novel == "") == (row["session"] == "0")
        if novel:  # every class has as many images, so that all is the mean over the classes
            later = (int(row["classes"]) - BASE) / int(row["classes"])
            assert float(row["accuracy"]) == pytest.approx((1 - later) * base + later * float(novel))
    for row in summary:
        mine = [run for run in runs if (run["shots"], run["method"]) == (row["shots"], row["method"])]
        right = [float(run["accuracy"]) for run in mine]
        assert float(row["accuracy_average"]) == pytest.approx(sum(right) / 3)
        assert float(row["accuracy_drop"]) == pytest.approx(right[0] - right[-1])
        assert float(row["forgetting"]) == pytest.approx(right[0] - float(mine[-1]["accuracy_base"]))
        assert float(row["nc1_cdnv"]) > 0 < float(row["nc2_etf_distance"])
    for shots in (1, 5):
        assert (tmp_path / f"sessions-{shots}-shot.png").stat().st_size > 10_000
    assert "Test accuracy" in capsys.readouterr().out
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert report.count("<table>") == 2 + 2
    assert report.count("<img") == 2


def test_an_episode_gives_later_classes_few_images_of_training_faces_alone(
    settings: IncrementalSettings, data: ImageData
) -> None:
    episode, other = (make_episode(seed, 1, settings, data) for seed in (3, 4))
    assert episode.shots.targets.bincount().tolist() == [0] * BASE + [1] * (CLASSES - BASE)
    assert episode.test.targets.bincount().tolist() == [2 * settings.copies] * CLASSES
    # The same images are tested for every seed, under other numbers.
    assert torch.equal(episode.test.images, other.test.images)
    assert not torch.equal(episode.test.targets, other.test.targets)
    for part in (episode.train, episode.validation, episode.test):
        assert sorted(part.targets.unique().tolist()) == list(range(CLASSES))
    five = make_episode(3, 5, settings, data)
    assert torch.equal(five.train.images, episode.train.images)
    assert five.shots.targets.bincount().tolist() == [0] * BASE + [5] * (CLASSES - BASE)


def test_bodies_of_a_seed_are_the_same(settings: IncrementalSettings, data: ImageData) -> None:
    episode = make_episode(0, 1, settings, data)
    names = dict.fromkeys(BASES.get(method, method) for method in METHODS)
    bodies = [BaseRun(BaseKey(name, 5, 1e-2), settings, episode).model.body for name in names]
    for body in bodies[1:]:
        for ours, theirs in zip(body.parameters(), bodies[0].parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_session_changes(method: str, settings: IncrementalSettings, data: ImageData) -> None:
    """A frozen body stays, what is trained moves, reserved directions stay, and travelers arrive."""
    episode = make_episode(0, 1, settings, data)
    base = BASES.get(method, method)
    torch.manual_seed(0)
    model = Network(base, settings, 1)
    sight = sights(model, episode, settings)
    kind = KINDS.get(method, Learner)
    learner = kind(model, base, settings, Budget(1e-2, 4))
    body, neck = (state(part) for part in (learner.model.body, learner.model.neck))
    frame = learner.model.head.frame.clone() if method in ("etf", "etf-ce", "etf-transit") else None
    learner.remember(sight[kind.sees].base)
    new = sight[kind.sees].shots.targets < BASE + NEW
    learner.learn(sight[kind.sees].shots.where(new), BASE + NEW)
    trained = method not in ("joint", *(name for name in METHODS if name.endswith("class-mean")))
    assert torch.equal(state(learner.model.body), body) == (method != "fine-tuned")
    if neck.numel() and method != "fine-tuned":
        assert torch.equal(state(learner.model.neck), neck) == (not trained)
    if frame is not None:
        torch.testing.assert_close(learner.model.head.frame, frame)
        assert learner.model.head.active_classes.tolist() == list(range(BASE + NEW))
    if method == "etf-grown":
        assert learner.model.head.num_classes == BASE + NEW
    assert torch.equal(state(model.body), body)  # the network of the base session is for all methods


def state(module: nn.Module) -> Tensor:
    return torch.cat([torch.empty(0), *(value.detach().flatten() for value in module.parameters())])


def test_the_nearest_mean_is_that_of_all_images_seen(settings: IncrementalSettings, data: ImageData) -> None:
    episode = make_episode(0, 1, settings, data)
    torch.manual_seed(0)
    model = Network("linear", settings, 1)
    sight = sights(model, episode, settings)["features"]
    learner = NearestMean(model, "linear", settings, Budget(0, 0))
    learner.remember(sight.base)
    learner.learn(sight.shots, CLASSES)
    whole = Split(*(torch.cat(parts) for parts in zip(*map(pair, (sight.base, sight.shots)), strict=True)))
    units = nn.functional.normalize(whole.images.double())
    means = torch.stack([units[whole.targets == k].mean(0) for k in range(CLASSES)])
    cosines = sight.test.images.double() @ nn.functional.normalize(means).mT
    right = cosines.argmax(-1) == sight.test.targets
    correct, total = hits(learner, sight.test, CLASSES, BASE)
    assert correct.tolist() == [int(right[sight.test.targets < BASE].sum()), int(right.sum() - correct[0])]
    assert total.tolist() == [2 * settings.copies * BASE, 2 * settings.copies * (CLASSES - BASE)]


def pair(split: Split) -> tuple[Tensor, Tensor]:
    return split.images, split.targets


def test_validation_chooses_the_budget_and_the_test_is_looked_at_once(
    settings: IncrementalSettings, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    episode = make_episode(0, 1, settings, data)
    looks: list[tuple[Budget, bool]] = []

    def made_up(
        learner: Learner, sight: Sight, held: Split, _: IncrementalSettings, *, collapse: bool = False
    ) -> list[Row]:
        assert collapse == (held is sight.test)
        looks.append((learner.budget, held is sight.test))
        good = 0.9 if learner.budget == Budget(1e-3, 40) else 0.5
        return [{"accuracy": 0.0, "accuracy_average": 1 - good if held is sight.test else good}]

    monkeypatch.setattr(learners, "sessions", made_up)
    torch.manual_seed(0)
    (row,) = learners.rows_of("etf", Network("etf", settings, 1), episode, settings)
    assert len(looks) == len(settings.session_lr) * len(settings.session_steps) + 1
    assert [look for look in looks if look[1]] == [(Budget(1e-3, 40), True)]
    assert (row["lr"], row["steps"], row["validation_accuracy_average"]) == (1e-3, 40, 0.9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"new_classes": 3}, "one or more sessions"),
        ({"features": 8}, "least for a simplex"),
        ({"batch_size": 1}, "two images"),
    ],
)
def test_settings_that_cannot_be_run(change: dict[str, int], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        IncrementalSettings(**SIZES | change).check()


def test_more_shots_than_images(settings: IncrementalSettings, data: ImageData) -> None:
    with pytest.raises(InvalidArgumentError, match="fewer training images"):
        make_episode(0, 9, settings, data)


def test_validation_chooses_the_learning_rate_of_the_base_session(
    settings: IncrementalSettings, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of nearly nothing leaves the network as it was, so that the other one is taken."""
    rates = {"lr": (1e-9, 1e-2), "epochs": 12, "batch_size": 8}
    two = replace(settings, **rates, out=settings.data_dir / "rates")
    study = Study(two, Console(quiet=True))
    best = study._best_base("linear", 0, make_episode(0, 1, two, data))
    assert best.key.lr == 1e-2
    logits = best.model.eval()(best.validation.images)[:, :BASE]
    right = (logits.argmax(-1) == best.validation.targets).double().mean()
    assert best.validation_accuracy() == pytest.approx(float(right))
    assert best.validation.targets.max() < BASE


def test_two_data_sets_give_their_classes_one_after_the_other() -> None:
    def made(name: str, classes: int, test: int, value: int) -> ImageData:
        targets = torch.arange(classes).repeat_interleave(10)
        tested = torch.arange(classes).repeat_interleave(test)
        parts = [Split(torch.full((len(part), 1, 4, 4), value).byte(), part) for part in (targets, tested)]
        return ImageData.of(name, *parts, tuple(f"{name}{k}" for k in range(classes)))

    whole = joined(made("a", 3, 7, 10), made("b", 2, 4, 20))
    assert whole.class_names == ("a0", "a1", "a2", "b0", "b1")
    assert whole.test.targets.bincount().tolist() == [4] * 5
    learned, held = whole.held_out()
    assert learned.targets.bincount().tolist() == [8] * 5
    assert held.targets.bincount().tolist() == [2] * 5
    for part in (learned, held, whole.test):
        assert torch.equal(part.images[:, 0, 0, 0] == 20, part.targets >= 3)
    with pytest.raises(InvalidArgumentError, match="--image-size"):
        joined(whole, whole.resized(8))


def test_two_data_sets_need_room_for_all_of_their_classes(settings: IncrementalSettings) -> None:
    both = replace(settings, data="digits", more_data="digits", classes=10)
    with pytest.raises(InvalidArgumentError, match="have 20 classes"):
        load_classes(both)
    assert load_classes(replace(both, classes=20, per_class=7)).train.targets.bincount().max() <= 7


@pytest.mark.slow
def test_a_killed_study_ends_at_the_same_numbers(
    tmp_path: Path, data_dir: Path, killed: Callable[[str, Sequence[str], Path, int], None]
) -> None:
    common = [*SMALL, "--methods", "linear", "etf", "etf-transit", "joint", "--checkpoint-every", "3"]
    common += ["--data-dir", str(data_dir)]
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    broken = [*common, "--resume", "--out", str(tmp_path / "broken")]
    killed("incremental", broken, tmp_path / "broken" / "checkpoints", 3)
    whole, again = (rows_of(tmp_path / name / "runs.csv") for name in ("whole", "broken"))
    assert whole == again
