"""Ordinary training on a learned set, against the loop that it is learned by, and its judgment by hand."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etflayers import distill
from etflayers.distill import DistilledSet, Lesson, best_rate, evaluate, judged, teach
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
