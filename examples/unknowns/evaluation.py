"""What a network knows: collapse, transfer to other tasks, and detection of unknown inputs."""

from __future__ import annotations

import warnings
from statistics import fmean

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from etflayers.metrics import (
    class_statistics,
    collapse_measures,
    nearest_center,
    read_classifier,
)
from etflayers.ood import ood_metrics
from lab.data import Split
from lab.files import Row
from unknowns.data import World
from unknowns.networks import Answers, Subject
from unknowns.scores import feature_detectors, logit_scores

COLLAPSE = ("nc1_trace", "nc1_quotient", "nc2_etf_distance_means", "nc3_distance")
ROUNDS = 200  # of the solver of the linear probe


def evaluate(subject: Subject, world: World, strengths: tuple[float, ...]) -> dict[str, list[Row]]:
    """All that is asked of a network.

    Returns:
        ``"spaces"``, a row for each space with accuracy, NC1 to NC4 and the accuracy of each task, and
        ``"scores"``, a row for each space, score and kind of unknown input.
    """
    train = subject.answers(world.known.train.images)
    test = subject.answers(world.known.test.images)
    unknown = {name: subject.answers(images) for name, images in world.unknown.items()}
    tasks = {
        name: [(subject.answers(part.images), part.targets) for part in task]
        for name, task in world.tasks.items()
    }
    spaces, scores = [], []
    for space, features in train.features.items():
        own = {**subject.labels, "space": space}
        head = subject.head if space == subject.space else None
        row = own | collapse(features, world.known.train, test.features[space], world.known.test, head)
        row |= accuracies(train, test, world)
        for name, parts in tasks.items():
            rows = [(answers.features[space], targets) for answers, targets in parts]
            row[f"transfer_{name}"] = probe(rows, strengths)
        row["transfer"] = fmean(row[f"transfer_{name}"] for name in tasks)
        spaces.append(row)
        scores += [own | found for found in detection(space, train, test, unknown, world, head)]
    return {"spaces": spaces, "scores": scores}


def accuracies(train: Answers, test: Answers, world: World) -> Row:
    """Of the head, on the classes that it knows."""
    pairs = {"train": (train, world.known.train), "test": (test, world.known.test)}
    return {
        f"{name}_accuracy": float((answers.logits.argmax(1) == split.targets).double().mean())
        for name, (answers, split) in pairs.items()
    }


def collapse(
    features: Tensor, train: Split, test_features: Tensor, test: Split, head: nn.Module | None
) -> Row:
    """NC1 and NC2 of the training features, with a head NC3, and NC4 on the test set: see docs/metrics.md."""
    classes = int(train.targets.max()) + 1
    statistics = class_statistics(features, train.targets, classes)
    classifier = None if head is None else read_classifier(head)
    measured = collapse_measures(statistics, classifier)
    row = {name: float(measured[name]) for name in COLLAPSE if name in measured}
    if classifier is not None:
        chosen = classifier.logits(test_features).argmax(1)
        nearest = nearest_center(test_features.double(), statistics.means)
        row["nc4_disagreement"] = float((chosen != nearest).double().mean())
    return row


def probe(parts: list[tuple[Tensor, Tensor]], strengths: tuple[float, ...]) -> float:
    """Test accuracy of logistic regression on frozen features; C is the best on the validation set.

    Args:
        parts: features and targets of training, validation and test set.
        strengths: values of C; of equals the first is taken.
    """
    (rows, targets), validation, test = ([part.cpu().numpy() for part in pair] for pair in parts)
    best, found = -1.0, 0.0
    for strength in strengths:
        regression = LogisticRegression(C=strength, max_iter=ROUNDS)
        model = make_pipeline(StandardScaler(), regression)
        with warnings.catch_warnings():  # what has not converged after so many rounds is stopped early
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(rows, targets)
        accuracy = model.score(*validation)
        if accuracy > best:
            best, found = accuracy, model.score(*test)
    return float(found)


def detection(
    space: str,
    train: Answers,
    test: Answers,
    unknown: dict[str, Answers],
    world: World,
    head: nn.Module | None,
) -> list[Row]:
    """AUROC and FPR95 of every score for every kind of unknown input; scores of logits where a head reads."""
    known, others = {}, {name: {} for name in unknown}
    if head is not None:
        known |= logit_scores(test.logits)
        for name, answers in unknown.items():
            others[name] |= logit_scores(answers.logits)
    split = world.known.train
    for score, detector in feature_detectors(
        train.features[space], split.targets, world.known.num_classes, head
    ):
        known[score] = detector.score(test.features[space])
        for name, answers in unknown.items():
            others[name][score] = detector.score(answers.features[space])
    rows = []
    for score, inside in known.items():
        for name in unknown:
            measured = ood_metrics(inside, others[name][score])
            rows.append({"score": score, "unknown": name, "auroc": measured.auroc, "fpr95": measured.fpr95})
    return rows
