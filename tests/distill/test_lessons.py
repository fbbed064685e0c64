"""Ordinary training on a learned set, against the loop that it is learned by, and its judgment by hand."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etflayers import distill
from etflayers.distill import (
    DistilledSet,
    Lesson,
    accuracy_by_class,
    best_lessons,
    best_rate,
    evaluate,
    judged,
    teach,
)
from etflayers.errors import InvalidArgumentError

RULES: dict[str, Any] = {
    "sgd": distill.SGD(),
    "momentum": distill.SGD(momentum=0.9),
    "adam": distill.Adam(),
}


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def some_set(labels: Any = "one-hot", rate: float = 0.05) -> DistilledSet:
    generator = torch.Generator().manual_seed(0)
    rates = rate * torch.linspace(0.5, 2, 8)
    return DistilledSet.from_noise((5,), 3, per_class=4, labels=labels, rates=rates, generator=generator)


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("labels", ["hard", "one-hot"])
def test_lesson_is_the_training_that_the_set_is_learned_by(optimizer: str, labels: str) -> None:
    """PyTorch's own optimizers come to the same network as the unrolled loop, in float64."""
    distilled, student = some_set(labels).double(), network(1).double()
    inputs, targets = distilled.batches(4)
    trained = distill.unrolled_inner_loop(
        student,
        {name: value.detach().clone() for name, value in student.named_parameters()},
        inputs,
        targets,
        lr=distilled.rates,
        epochs=2,
        optimizer=RULES[optimizer],
    )
    done: list[int] = []
    taught = teach(student, Lesson.of(distilled, 4, optimizer), after_step=done.append)
    assert done == list(range(1, 9))
    for name, value in taught.named_parameters():
        torch.testing.assert_close(value, trained.params[name], rtol=1e-10, atol=1e-12)


def test_shuffled_lesson_keeps_samples_and_rates() -> None:
    lesson = Lesson.of(some_set("hard"), 4, "sgd")
    generator = torch.Generator().manual_seed(0)
    order, mixture = lesson.in_other_order(generator), lesson.in_other_batches(generator)
    for shuffled in (order, mixture):
        assert sorted(shuffled.batches.flatten().tolist()) == list(range(12))
        assert not torch.equal(shuffled.batches, lesson.batches)
        assert (shuffled.rates, shuffled.inputs) == (lesson.rates, lesson.inputs)
    batches = {tuple(batch) for batch in lesson.batches.tolist()}
    assert {tuple(batch) for batch in order.batches.tolist()} == batches
    assert {tuple(batch) for batch in mixture.batches.tolist()} != batches
    torch.testing.assert_close(lesson.scaled(3.0).rates, 3 * lesson.rates)


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_lesson_of_other_epochs_repeats_the_last_one(epochs: int) -> None:
    """The rate of every step, by hand."""
    lesson = Lesson.of(some_set("hard"), 4, "sgd")
    other = lesson.in_other_epochs(epochs)
    expected = [
        lesson.rates[4 * min(epoch, 1) + batch].item() for epoch in range(epochs) for batch in range(4)
    ]
    assert other.rates.tolist() == expected
    assert (other.inputs, other.labels, other.batches) == (lesson.inputs, lesson.labels, lesson.batches)


def test_epochs_that_are_none_are_explained() -> None:
    lesson = Lesson.of(some_set("hard"), 4, "sgd")
    with pytest.raises(InvalidArgumentError, match="epochs must be an integer >= 1, got 0"):
        lesson.in_other_epochs(0)
    for count in (3, 6):
        with pytest.raises(InvalidArgumentError, match=f"whole epochs of 4 batches, got {count} rates"):
            Lesson(**{**vars(lesson), "rates": torch.ones(count)}).in_other_epochs(2)


def test_best_lessons_are_found_by_training_on_each() -> None:
    """The largest of the mean accuracies; what gives NaN is never chosen, and equals go to the first."""
    inputs, targets = samples()
    lesson = Lesson.of(some_set("hard"), 4, "sgd")
    factors = (0.0, -1.0, 3.0, 3.0)
    candidates = [[lesson.scaled(factor), lesson.in_other_epochs(3).scaled(factor)] for factor in factors]
    scores = []
    for lessons in candidates:
        taught = [teach(network(index), lessons[index % 2]) for index in range(3)]
        scores.append(fmean(judged(each, inputs, targets)["accuracy"] for each in taught))
    assert len(set(scores)) > 1
    assert best_lessons(candidates, network, inputs, targets) == scores.index(max(scores))

    def broken(outputs: Tensor, classes: Tensor) -> dict[str, float]:
        return {"accuracy": float("nan")}

    assert best_lessons(candidates, network, inputs, targets, judge=broken) == 0
    with pytest.raises(InvalidArgumentError, match=r"at least one, each of at least one lesson, got \[0\]"):
        best_lessons([[]], network, inputs, targets)


def test_accuracy_by_class_is_the_diagonal_of_the_confusion_matrix() -> None:
    inputs, targets = samples()
    targets = targets.clamp(max=1)  # of the last class there is none
    outputs = network(0)(inputs)
    confusion = torch.zeros(3, 3)
    for row, column in zip(targets.tolist(), outputs.argmax(1).tolist(), strict=True):
        confusion[row, column] += 1
    shares = (confusion.diag() / confusion.sum(1)).tolist()
    assert list(accuracy_by_class(outputs, targets).values()) == pytest.approx(shares, nan_ok=True)
    assert math.isnan(shares[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "newton"}, "optimizer must be one of sgd, momentum, adam"),
        ({"labels": torch.zeros(3)}, "inputs and labels must be as many"),
        ({"batches": torch.arange(12)}, r"batches have shape \(S, B\)"),
        ({"rates": torch.tensor(0.1)}, r"rates \(T,\)"),
    ],
)
def test_bad_lessons_are_explained(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Lesson(**{**vars(Lesson.of(some_set(), 4, "sgd")), **change})


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator)


def test_networks_are_judged_in_eval_mode_and_left_as_they_were() -> None:
    inputs, targets = samples()
    student = nn.Sequential(nn.Dropout(0.9), network(0)).train()
    with torch.no_grad():
        right = (student[1](inputs).argmax(-1) == targets).double().mean()
    assert judged(student, inputs, targets, batch_size=7) == {"accuracy": right.item()}
    assert student.training


def test_best_rate_is_the_best_of_the_grid() -> None:
    """Each network takes its own lesson, and a rate at which a network is lost is never chosen."""
    inputs, targets = samples()
    lessons = [
        Lesson(inputs[part], targets[part], torch.arange(30)[None], torch.ones(20), "sgd")
        for part in (slice(30), slice(30, 60))
    ]
    rates = (1e-4, 0.5, 1e30)

    def score(rate: float) -> float:
        taught = (teach(network(index), lessons[index % 2].scaled(rate)) for index in range(3))
        return fmean(judged(student, inputs, targets)["accuracy"] for student in taught)

    assert score(0.5) > score(1e-4) + 0.1
    assert best_rate(lessons, network, inputs, targets, rates=rates) == 0.5

    def judge(logits: Tensor, targets: Tensor) -> dict[str, float]:
        return {"size": float("nan") if not logits.isfinite().all() else -float(logits.norm()), "other": 9.0}

    assert best_rate(lessons, network, inputs, targets, rates=(1e30, 0.5, 1e-4), judge=judge) == 1e-4


def test_evaluation_takes_each_lesson_and_each_network() -> None:
    """At rate 0 networks stay those that come in; the curve of a watched one ends where training does."""
    inputs, targets = samples()
    lesson = Lesson.of(some_set("hard", rate=2.0), 4, "sgd")
    lessons = [lesson.scaled(0.0), lesson]
    curves = evaluate(lessons, network, inputs, targets, count=4, watched=3, points=4)
    assert [[steps for steps, _ in curve] for curve in curves] == [[0, 2, 4, 6, 8]] * 3 + [[8]]
    for index, curve in enumerate(curves):
        assert curve[-1][1] == judged(teach(network(index), lessons[index % 2]), inputs, targets)
        if index < 3:
            assert curve[0][1] == judged(network(index), inputs, targets)
            assert (curve[0][1] == curve[-1][1]) == (index % 2 == 0)
