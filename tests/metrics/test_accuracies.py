"""Accuracies of groups and sessions against counting, and their torchmetrics shells."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.metrics import DESCRIPTIONS, GroupAccuracy, SessionAccuracy, group_accuracy, session_measures

K = 7
GROUPS = {"many": torch.tensor([0, 1]), "medium": torch.tensor([2, 5]), "few": torch.tensor([3, 4])}


def answers(seed: int = 0, samples: int = 200) -> tuple[Tensor, Tensor]:
    """Logits that are right now and then, and imbalanced targets; class 6 does not occur."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([100.0, 50, 20, 10, 5, 5, 0])
    targets = torch.multinomial(weights, samples, replacement=True, generator=generator)
    logits = torch.randn(samples, K, generator=generator)
    logits[torch.arange(samples), targets] += 1
    targets[::9] = -100
    return logits, targets


def counted(decisions: Tensor, targets: Tensor, classes: list[int], average: str) -> float:
    shares, hits, number = [], 0, 0
    for k in classes:
        members = [int(d) for d, t in zip(decisions, targets, strict=True) if int(t) == k]
        if members:
            shares.append(np.mean([d == k for d in members]))
            hits, number = hits + sum(d == k for d in members), number + len(members)
    return float(np.mean(shares)) if average == "macro" else hits / number


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_accuracies_of_groups_are_counted(average: Any) -> None:
    logits, targets = answers()
    for predictions in (logits, logits.argmax(-1)):
        found = group_accuracy(predictions, targets, K, GROUPS, average=average)
        assert list(found) == ["all", *GROUPS]
        for name, classes in {"all": list(range(K)), **GROUPS}.items():
            expected = counted(logits.argmax(-1), targets, [int(k) for k in classes], average)
            assert found[name].item() == pytest.approx(expected, abs=1e-14), name


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_that_of_all_samples_is_the_one_of_torchmetrics(average: Any) -> None:
    logits, targets = answers()
    theirs = MulticlassAccuracy(K - 1, average=average, ignore_index=-100)  # theirs counts empty classes
    expected = theirs(logits[:, :-1], targets)
    found = group_accuracy(logits[:, :-1], targets, K - 1, GROUPS, average=average)["all"]
    torch.testing.assert_close(found.float(), expected)


def test_a_group_without_samples_has_no_accuracy() -> None:
    logits, targets = answers()
    found = group_accuracy(logits, targets, K, {"unseen": torch.tensor([6]), **GROUPS})
    assert "unseen" not in found


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_batches_and_merged_parts_are_the_whole(average: Any) -> None:
    logits, targets = answers()
    expected = group_accuracy(logits, targets, K, GROUPS, average=average)
    metric = GroupAccuracy(K, GROUPS, average=average)
    for z, t in zip(logits.split(30), targets.split(30), strict=True):
        batch = metric(z, t)
        assert batch["all"] == group_accuracy(z, t, K, GROUPS, average=average)["all"]
    assert metric.compute() == expected
    parts = [GroupAccuracy(K, GROUPS, average=average) for _ in range(2)]
    parts[0].update(logits[:70], targets[:70])
    parts[1].update(logits[70:], targets[70:])
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == expected
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert twin.compute() == expected
    metric.reset()
    metric.update(logits[:1], targets[:1])  # which is ignored
    with pytest.raises(InvalidArgumentError, match="no sample has been seen"):
        metric.compute()


def sessions() -> list[tuple[Tensor, Tensor]]:
    """Tests after three sessions: 3 base classes, then 2 and 2 more."""
    return [
        (logits[(targets < limit)], targets[(targets < limit)])
        for limit, (logits, targets) in zip((3, 5, 7), (answers(seed) for seed in range(3)), strict=True)
    ]


def test_accuracies_of_sessions_are_counted() -> None:
    metric = SessionAccuracy(K, num_sessions=4, base_classes=3)
    history = []
    for number, (logits, targets) in enumerate(sessions()):
        for z, t in zip(logits.split(20), targets.split(20), strict=True):
            metric.update(z, t, session=number)
        valid = targets >= 0
        history.append(float((logits.argmax(-1) == targets)[valid].float().mean()))
    decisions, targets = logits.argmax(-1), targets
    base = counted(decisions, targets, [0, 1, 2], "micro")
    novel = counted(decisions, targets, [3, 4, 5, 6], "micro")
    expected = {
        "accuracy": history[-1],
        "accuracy_base": base,
        "accuracy_novel": novel,
        "accuracy_harmonic": 2 / (1 / base + 1 / novel),
        "accuracy_average": float(np.mean(history)),
        "accuracy_drop": history[0] - history[-1],
    }
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == pytest.approx(expected, abs=1e-7)
    assert set(found) <= set(DESCRIPTIONS)
    assert metric.by_session().tolist() == pytest.approx(history, abs=1e-7)
    given = SessionAccuracy(K, num_sessions=3, base_classes=torch.tensor([2, 0, 1]))
    for number, batch in enumerate(sessions()):
        given.update(*batch, session=number)
    assert given.compute() == metric.compute()


def test_a_perfect_learner_reaches_the_ideals() -> None:
    total = torch.tensor([[10, 0], [10, 4], [10, 8]])
    for name, value in session_measures(total, total).items():
        assert value.item() == DESCRIPTIONS[name].ideal


def test_what_does_not_exist_is_not_there() -> None:
    first = session_measures(torch.tensor([[7, 0], [0, 0]]), torch.tensor([[10, 0], [0, 0]]))
    assert set(first) == {"accuracy", "accuracy_base", "accuracy_average", "accuracy_drop"}
    gap = session_measures(torch.tensor([[0, 0], [5, 1]]), torch.tensor([[0, 0], [10, 2]]))
    assert set(gap) == {"accuracy", "accuracy_base", "accuracy_novel", "accuracy_harmonic"}
    nothing = session_measures(torch.tensor([[0, 0]]), torch.tensor([[10, 2]]))
    assert nothing["accuracy_harmonic"] == 0


def test_a_batch_of_a_later_session_has_measures_of_its_own() -> None:
    metric = SessionAccuracy(4, num_sessions=2, base_classes=2)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), session=0)
    batch = metric(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 2]), session=1)
    assert {name: value.item() for name, value in batch.items()} == pytest.approx(
        {"accuracy": 2 / 3, "accuracy_base": 1, "accuracy_novel": 0.5, "accuracy_harmonic": 2 / 3}
    )
    assert metric.compute()["accuracy_drop"].item() == pytest.approx(1 / 3)
    skipped = SessionAccuracy(4, num_sessions=3, base_classes=2)
    skipped.update(torch.tensor([0]), torch.tensor([0]), session=2)
    with pytest.raises(InvalidArgumentError, match=r"the sessions \[0, 1\] have no sample"):
        skipped.by_session()


def test_metrics_of_a_collection_are_updated_one_by_one() -> None:
    logits, targets = answers()
    collection = MetricCollection(
        {"one": GroupAccuracy(K, GROUPS), "two": GroupAccuracy(K, GROUPS, ignore_index=0)}
    )
    for z, t in zip(logits.split(50), targets.where(targets >= 0, 0).split(50), strict=True):
        collection.update(z, t)
    found = collection.compute()
    for name, ignored in (("one", -100), ("two", 0)):
        expected = group_accuracy(logits, targets.where(targets >= 0, 0), K, GROUPS, ignore_index=ignored)
        assert found[f"{name}_all"] == expected["all"]
    assert found["one_all"] != found["two_all"]


def test_accuracies_can_be_drawn() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    metric = GroupAccuracy(K, GROUPS)
    metric.update(*answers())
    figure, axes = metric.plot()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["all", *GROUPS]
    figure.clf()


@pytest.mark.parametrize(
    ("predictions", "targets", "options", "message"),
    [
        ([1], torch.tensor([1]), {}, "predictions must be a tensor, got list"),
        (torch.zeros(2, 3), torch.tensor([1, 1]), {}, r"\(B, num_classes\), num_classes = 7, got \(2, 3\)"),
        (torch.zeros(2), torch.tensor([1, 1]), {}, r"\(B, num_classes\), num_classes = 7, got \(2,\)"),
        (torch.zeros(2, K).long(), torch.tensor([1, 1]), {}, r"shape \(B,\), .* got \(2, 7\)"),
        (torch.tensor([True, False]), torch.tensor([1, 1]), {}, "predictions must be integers"),
        (torch.tensor([1, 1]), torch.tensor([1]), {}, "targets must have shape"),
        (torch.tensor([1, 1]), torch.tensor([1, 7]), {}, r"targets must be class indices in \[0, 7\)"),
        (torch.tensor([1]), torch.tensor([-100]), {}, "no sample has been seen"),
        (torch.tensor([1]), torch.tensor([1]), {"average": "weighted"}, "average must be 'macro' or 'micro'"),
        (torch.tensor([1]), torch.tensor([1]), {"groups": {"all": torch.tensor([1])}}, "the name 'all'"),
        (torch.tensor([1]), torch.tensor([1]), {"groups": {"few": torch.tensor([7])}}, "from 0 on below 7"),
    ],
)
def test_bad_input_is_named(predictions: Any, targets: Tensor, options: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        group_accuracy(predictions, targets, K, **{"groups": GROUPS, **options})


def test_bad_arguments_of_the_shells_are_named() -> None:
    logits, targets = answers()
    logits[1, 2] = torch.nan
    metric = GroupAccuracy(K, GROUPS)
    with pytest.raises(NonFiniteError, match="logits must not hold NaN"):
        metric.update(logits, targets)
    assert int(metric.total.sum()) == 0
    with pytest.raises(InvalidArgumentError, match="average must be"):
        GroupAccuracy(K, GROUPS, average="none")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="below 4"):
        GroupAccuracy(4, GROUPS)
    with pytest.raises(InvalidArgumentError, match="base_classes must be at most num_classes = 4, got 5"):
        SessionAccuracy(4, 2, 5)
    with pytest.raises(InvalidArgumentError, match=r"groups\['base_classes'\] must be .* below 4"):
        SessionAccuracy(4, 2, torch.tensor([4]))
    with pytest.raises(InvalidArgumentError, match="num_sessions must be at least 1"):
        SessionAccuracy(4, 0, 2)
    sessions = SessionAccuracy(4, 2, 2)
    for session, message in (
        (2, r"session must be in .* \[0, 2\), got 2"),
        (-1, "session must be at least 0"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            sessions.update(torch.tensor([1]), torch.tensor([1]), session)
    with pytest.raises(InvalidArgumentError, match="no sample has been seen"):
        sessions.compute()
    with pytest.raises(InvalidArgumentError, match=r"shape \(sessions, 2\), got \(2, 3\)"):
        session_measures(torch.ones(2, 3), torch.ones(2, 3))
