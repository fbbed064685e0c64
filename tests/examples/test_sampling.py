"""Which images are trained on, in which order, and with which loss and decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from etflayers.errors import InvalidArgumentError
from lab.classifiers import Trainer
from lab.data import load
from lab.heads import head_of
from lab.losses import make_criterion, set_learning_rate, total_loss
from lab.settings import Settings

TARGETS = torch.arange(4).repeat(50)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"per_class": 20}, [20, 20, 20, 20]),
        ({"per_class": 1000}, [50, 50, 50, 50]),
        ({"imbalance": "step", "imbalance_ratio": 10}, [50, 50, 5, 5]),
        ({"imbalance": "exponential", "imbalance_ratio": 8}, [50, 25, 12, 6]),
        ({"imbalance": "exponential", "imbalance_ratio": 8, "per_class": 16}, [16, 8, 4, 2]),
        ({"imbalance": "step", "imbalance_ratio": 1e9}, [50, 50, 1, 1]),
    ],
)
def test_class_sizes(options: dict[str, object], sizes: list[int]) -> None:
    kept = Settings(**options).kept_images(TARGETS, 4)
    assert torch.bincount(TARGETS[kept]).tolist() == sizes
    assert len(kept.unique()) == len(kept)
    assert torch.equal(kept, Settings(**options, seeds=(7,)).kept_images(TARGETS, 4))


def test_training_set_alone_becomes_rare() -> None:
    whole, rare = load(Settings(data="digits")), load(Settings(data="digits", imbalance="step"))
    assert torch.equal(whole.test.images, rare.test.images)
    sizes = torch.bincount(rare.train.targets)
    assert sizes.tolist() == [int(sizes[0])] * 5 + [round(int(sizes[0]) / 10)] * 5
    pixels = rare.train.images.double()
    assert float(rare.mean) == pytest.approx(float(pixels.mean()), rel=1e-6)


def test_first_classes_alone() -> None:
    four = load(Settings(data="digits", classes=4, per_class=10))
    assert four.class_names == ("0", "1", "2", "3")
    assert torch.bincount(four.train.targets).tolist() == [10] * 4
    assert four.test.targets.unique().tolist() == [0, 1, 2, 3]
    with pytest.raises(InvalidArgumentError, match="--classes 11: digits has 10 classes"):
        load(Settings(data="digits", classes=11))


def test_balanced_epochs_hold_every_class_equally() -> None:
    settings = Settings(data="digits", imbalance="step", balanced=True, batch_size=20)
    trainer = Trainer("fixed", 0, settings, load(settings))
    for _, targets in trainer.batches():
        assert torch.bincount(targets, minlength=10).tolist() == [2] * 10


def test_feature_decay_is_half_the_mean_squared_length() -> None:
    logits, features = torch.randn(6, 3), torch.randn(6, 5)
    targets = torch.randint(3, (6,))
    with_decay, without = Settings(feature_decay=0.3), Settings()
    plain = total_loss(nn.CrossEntropyLoss(), logits, targets, features, without)
    decayed = total_loss(nn.CrossEntropyLoss(), logits, targets, features, with_decay)
    assert float(decayed - plain) == pytest.approx(
        0.15 * float(features.norm(dim=1).square().mean()), rel=1e-5
    )


def test_label_smoothing_reaches_the_loss() -> None:
    logits, targets = torch.tensor([[4.0, 0.0]]), torch.tensor([0])
    loss = make_criterion(Settings(label_smoothing=0.2))(logits, targets)
    assert float(loss) == pytest.approx(float(-(torch.log_softmax(logits, 1)[0] @ torch.tensor([0.9, 0.1]))))


def test_decay_of_classifier_and_bias_is_their_own() -> None:
    settings = Settings(data="digits", weight_decay=0.1, classifier_decay=0.2, bias_decay=0.0)
    trainer = Trainer("linear", 0, settings, load(settings))
    head = head_of(trainer.model)
    decays = {
        id(parameter): group["weight_decay"]
        for group in trainer.optimizers[0].param_groups
        for parameter in group["params"]
    }
    assert len(decays) == len(list(trainer.model.parameters()))
    assert decays.pop(id(head.weight)) == 0.2
    assert decays.pop(id(head.bias)) == 0.0
    assert set(decays.values()) == {0.1}


def test_feature_decay_shortens_the_features() -> None:
    lengths = []
    for decay in (0.0, 1.0):
        settings = Settings(data="digits", epochs=1, feature_decay=decay)
        trainer = Trainer("fixed", 0, settings, load(settings))
        for images, targets in trainer.batches():
            trainer.update(images, targets)
        trainer.record(epoch=1)
        lengths.append(float(trainer.snapshots["last_class_means"].norm()))
    assert lengths[1] < 0.7 * lengths[0]


def test_schedules_fall_as_they_say() -> None:
    rates = {
        schedule: [
            set_learning_rate([], Settings(lr=1.0, schedule=schedule), step, 100) for step in range(100)
        ]
        for schedule in ("cosine", "step", "constant")
    }
    assert rates["constant"][9:] == [1.0] * 91
    assert rates["step"][40] == 1.0
    assert rates["step"][60] == pytest.approx(0.1)
    assert rates["step"][90] == pytest.approx(0.01)
    assert rates["cosine"][-1] == pytest.approx(0)
    assert all(rate[:9] == rates["cosine"][:9] for rate in rates.values())
