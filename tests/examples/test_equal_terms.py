"""Heads are compared on equal terms, and what is measured is what the names say."""

from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from etflayers import capture_features
from etflayers.geometry import is_stiefel
from lab.classifiers import Trainer
from lab.data import ImageData, load
from lab.data.sampling import shifted
from lab.evaluation import measure
from lab.heads import head_of
from lab.losses import make_optimizers, set_learning_rate
from lab.models import GreyAsRGB, make_classifier
from lab.settings import Settings

HEADS = ("linear", "fixed", "nearest", "learned")
SETTINGS = Settings(data="digits", shift=1, flip=True, epochs=2)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load(SETTINGS)


@pytest.fixture(scope="module")
def trainers(digits: ImageData) -> dict[str, Trainer]:
    pytest.importorskip("geoopt")
    return {head: Trainer(head, 5, SETTINGS, digits) for head in HEADS}


def test_all_heads_start_from_the_same_backbone(trainers: dict[str, Trainer]) -> None:
    backbones = [
        {name: value for name, value in trainer.model.state_dict().items() if name.startswith("layers")}
        for trainer in trainers.values()
    ]
    for other in backbones[1:]:
        assert other.keys() == backbones[0].keys()
        assert all(torch.equal(value, backbones[0][name]) for name, value in other.items())


def test_all_heads_see_the_same_batches_and_epochs_differ(trainers: dict[str, Trainer]) -> None:
    streams = []
    for trainer in trainers.values():
        torch.rand(len(streams))  # what else is drawn does not matter
        streams.append(list(trainer.batches()))
    for other in streams[1:]:
        for (images, targets), (first_images, first_targets) in zip(other, streams[0], strict=True):
            assert torch.equal(images, first_images)
            assert torch.equal(targets, first_targets)
    trainer = trainers["linear"]
    trainer.step = trainer.steps_per_epoch
    assert not torch.equal(next(trainer.batches())[1], streams[0][0][1])
    trainer.step = 0


def test_batches_of_a_continued_epoch_are_those_still_to_come(trainers: dict[str, Trainer]) -> None:
    trainer = trainers["fixed"]
    everything = list(trainer.batches())
    trainer.step = 5
    rest = list(trainer.batches())
    trainer.step = 0
    assert len(rest) == len(everything) - 5
    assert all(torch.equal(x, y) for x, y in zip(rest[0], everything[5], strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_parameter_has_one_optimizer_and_the_rotation_stays_on_the_manifold(
    digits: ImageData, optimizer: str
) -> None:
    pytest.importorskip("geoopt")
    trainer = Trainer("learned", 0, Settings(data="digits", optimizer=optimizer), digits)
    trained = [
        parameter
        for part in trainer.optimizers
        for group in part.param_groups
        for parameter in group["params"]
    ]
    assert sorted(map(id, trained)) == sorted(map(id, trainer.model.parameters()))
    rotation = head_of(trainer.model).rotation
    start = rotation.detach().clone()
    for images, targets in trainer.batches():
        trainer.update(images, targets)
    assert is_stiefel(rotation.detach()).ok
    assert (rotation.detach() - start).norm() > 0.01


def test_backbones_get_the_same_optimizer(trainers: dict[str, Trainer]) -> None:
    plain = [make_optimizers(trainer.model, SETTINGS)[0] for trainer in trainers.values()]
    options = [
        {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
        for optimizer in plain
    ]
    assert all(other == options[0] for other in options[1:])


def test_learning_rate_warms_up_and_decays_to_zero(trainers: dict[str, Trainer]) -> None:
    optimizers = trainers["learned"].optimizers
    settings = Settings(lr=0.5)
    rates = [set_learning_rate(optimizers, settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert rates.index(max(rates)) == 9
    assert max(rates) == pytest.approx(0.5)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0)
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {rates[-1]}


def test_evaluation_measures_all_images_in_eval_mode(digits: ImageData) -> None:
    model = make_classifier("linear", SETTINGS, digits, 0)
    measures = measure(model, nn.CrossEntropyLoss(), digits.train, digits)
    assert model.training
    model.eval()
    with torch.no_grad(), capture_features(model, head_of(model)) as features:
        logits = model(digits.normalized(digits.train.images))
    targets = digits.train.targets
    means = torch.stack([features[0][targets == label].double().mean(0) for label in range(10)])
    torch.testing.assert_close(measures.statistics.means, means, rtol=1e-5, atol=1e-6)
    assert measures.row["loss"] == pytest.approx(
        float(nn.functional.cross_entropy(logits, targets)), rel=1e-5
    )
    assert measures.row["accuracy"] == pytest.approx(float((logits.argmax(1) == targets).double().mean()))
    distances = torch.cdist(features[0].double(), means)
    mismatch = float((logits.argmax(1) != distances.argmin(1)).double().mean())
    assert measures.row["nc4_disagreement"] == pytest.approx(mismatch)
    assert len(measures.margins) == len(targets)
    rest = measure(model, nn.CrossEntropyLoss(), digits.test, digits, centers=measures.statistics)
    with torch.no_grad(), capture_features(model.eval(), head_of(model)) as features:
        logits = model(digits.normalized(digits.test.images))
    mismatch = float((logits.argmax(1) != torch.cdist(features[0].double(), means).argmin(1)).double().mean())
    assert rest.row["nc4_disagreement"] == pytest.approx(mismatch)


def test_network_without_class_means_loses_its_metrics_and_not_the_run(digits: ImageData) -> None:
    model = make_classifier("fixed", SETTINGS, digits, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.warns(UserWarning, match="the collapse metrics do not exist"):
        measures = measure(model, nn.CrossEntropyLoss(), digits.train, digits)
    assert measures.row.keys() == {"loss", "accuracy"}
    assert measures.row["loss"] == pytest.approx(math.log(10))


def test_shift_moves_images_and_fills_with_black() -> None:
    images = torch.arange(1, 19, dtype=torch.uint8).view(2, 1, 3, 3)
    moved = shifted(images, torch.tensor([[1, 0], [0, -2]]))
    assert moved[0, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert moved[1, 0].tolist() == [[12, 0, 0], [15, 0, 0], [18, 0, 0]]


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_models_of_other_packages(monkeypatch: pytest.MonkeyPatch, digits: ImageData, package: str) -> None:
    """Their models keep their code: the head goes in, with a projection where another width is asked for."""

    def small(channels: int, num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, 20, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(20, num_classes),
        )

    module = ModuleType(package)
    module.list_models = lambda: ["tiny"]
    module.get_model = lambda name, weights, num_classes: small(3, num_classes)
    module.create_model = lambda name, num_classes, in_chans: small(in_chans, num_classes)
    monkeypatch.setitem(sys.modules, package, module)
    if package == "torchvision":
        monkeypatch.setitem(sys.modules, "torchvision.models", module)
    settings = Settings(data="digits", model=f"{package}:tiny", feature_dim=12)
    trainer = Trainer("nearest", 0, settings, digits)
    head = head_of(trainer.model)
    assert head.in_features == 12
    assert any(isinstance(part, GreyAsRGB) for part in trainer.model.modules()) == (package == "torchvision")
    before = head.weight.clone()
    trainer.update(*next(trainer.batches()))
    assert not torch.equal(head.weight, before)
    with pytest.raises(ValueError, match="no 'huge'"):
        make_classifier("linear", Settings(data="digits", model=f"{package}:huge"), digits, 0)
