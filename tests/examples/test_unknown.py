"""The study of unknown inputs: what is unknown, what scores say, and that it continues to the same."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unknowns.data
from etflayers import NearestETFHead
from etflayers.errors import InvalidArgumentError, MissingDependencyError
from etflayers.functional import neighbor_entropy_loss
from lab.classifiers import train
from lab.data import ImageData, Split, load
from lab.files import write_json
from lab.settings import DataSettings, Settings
from unknown import main
from unknowns.claims import claim_rows, joined
from unknowns.data import World, make_world
from unknowns.evaluation import collapse, evaluate, probe
from unknowns.networks import Collapsed, UnknownRun, settings_of
from unknowns.scores import OF_LOGITS, OWN, feature_detectors, logit_scores, missing
from unknowns.settings import UnknownSettings

SIDE = 8
SMALL = UnknownSettings(
    data="fashion", known=3, features=6, width=0.25, epochs=1, batch_size=8, unknown_images=7, affine=0.1
)


def pictures(name: str, classes: int, each: int = 12, side: int = SIDE) -> ImageData:
    """Random images; those of a class share a pattern."""
    generator = torch.Generator().manual_seed(len(name))
    patterns = torch.randint(0, 200, (classes, 1, side, side), generator=generator)
    targets = torch.arange(classes).repeat(each)

    def split() -> Split:
        noise = torch.randint(0, 50, (len(targets), 1, side, side), generator=generator)
        return Split((patterns[targets] + noise).to(torch.uint8), targets)

    letters = (
        "0a\N{GREEK SMALL LETTER ALPHA}\N{GREEK SMALL LETTER BETA}\N{CYRILLIC SMALL LETTER BE}z"
        if name == "glyphs"
        else "abcdef"
    )
    return ImageData.of(name, split(), split(), tuple(letters[:classes]))


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    """All data but the learned ones, small; glyphs are not installed."""

    def small(settings: DataSettings) -> ImageData:
        if settings.data == "glyphs":
            raise MissingDependencyError("no faces")
        return pictures(settings.data, 2)

    monkeypatch.setattr(unknowns.data, "load", small)


@pytest.fixture
def world(others: None) -> World:
    return make_world(pictures("fashion", 5), 3, 7, 20, DataSettings())


def test_held_out_classes_are_learned_by_nobody(world: World) -> None:
    whole = pictures("fashion", 5)
    assert world.known.num_classes == 3
    assert set(world.known.train.targets.tolist()) == set(world.known.test.targets.tolist()) == {0, 1, 2}
    held = {image.numpy().tobytes() for image in whole.test.images[whole.test.targets >= 3]}
    assert {image.numpy().tobytes() for image in world.unknown["held-out"]} <= held
    assert list(world.unknown) == ["mnist5k", "digits", "held-out", "rotated", "noise"]
    assert {len(images) for images in world.unknown.values()} == {7}
    assert all(images.dtype == torch.uint8 for images in world.unknown.values())
    turned = {image.rot90(1, (1, 2)).numpy().tobytes() for image in world.known.test.images}
    assert {image.numpy().tobytes() for image in world.unknown["rotated"]} <= turned
    assert world.absent == {"glyphs": "no faces"}
    # No image that a probe learns from, or is chosen by, is one that it is tested on.
    for task in world.tasks.values():
        sets = [{image.numpy().tobytes() for image in part.images} for part in task]
        assert len(sets[0] | sets[1] | sets[2]) == sum(map(len, sets))


@pytest.mark.usefixtures("others")
def test_to_letters_and_digits_other_digits_are_not_unknown() -> None:
    world = make_world(pictures("glyphs", 6), 2, 7, 20, DataSettings())
    assert list(world.unknown) == ["fashion", "greek", "cyrillic", "noise"]
    assert list(world.tasks) == ["mnist5k", "digits", "fashion"]
    with pytest.raises(InvalidArgumentError, match="--known 7: glyphs has 6 classes"):
        make_world(pictures("glyphs", 6), 7, 7, 20, DataSettings())
    colored = pictures("folder", 2).mapped(
        lambda split: Split(split.images.repeat(1, 3, 1, 1), split.targets)
    )
    with pytest.raises(InvalidArgumentError, match="has colors"):
        make_world(colored, None, 7, 20, DataSettings())


def test_scores_of_logits_are_their_formulas() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [90.0, 1.0, 0.0], [95.0, 1.0, 0.0]])
    rows = logits.double().numpy()
    found = {name: score.numpy() for name, score in logit_scores(logits).items()}
    assert list(found) == list(OF_LOGITS)
    np.testing.assert_allclose(found["msp"], np.exp(rows).max(1) / np.exp(rows).sum(1))
    np.testing.assert_allclose(found["energy"], np.log(np.exp(rows).sum(1)))
    np.testing.assert_allclose(found["max-logit"], rows.max(1))
    # float32 has no number between 1 - 6e-8 and 1: more would tie.
    sure = logit_scores(torch.tensor([[20.0, 0.0], [21.0, 0.0]]))["msp"]
    assert sure[1] > sure[0]


def test_what_is_not_scored_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_ood", "pytorch_ood.detector"):  # where it is installed it may be loaded already
        monkeypatch.setitem(sys.modules, name, None)
    text = missing()
    assert text is not None
    assert "knn, mahalanobis, vim" in text
    features, targets = torch.randn(20, 6), torch.arange(20) % 3
    names = [name for name, _ in feature_detectors(features, targets, 3, None)]
    assert names == list(OWN)


def test_scores_of_the_package() -> None:
    pytest.importorskip("pytorch_ood.detector")
    features, targets = torch.randn(60, 6) + 3 * torch.eye(6)[torch.arange(60) % 3], torch.arange(60) % 3
    found = dict(feature_detectors(features, targets, 3, nn.Linear(6, 3)))
    assert list(found) == [*OWN, "knn", "mahalanobis", "vim"]
    assert found["knn"].detector.k == 20  # the size of a class
    assert list(dict(feature_detectors(features, targets, 3, None))) == [*OWN, "knn", "mahalanobis"]
    # The distance of directions to the neighbor of this number, by brute force.
    rows, asked = F.normalize(features), F.normalize(torch.randn(5, 6))
    expected = -torch.cdist(asked, rows).sort(dim=1).values[:, 19].double()
    torch.testing.assert_close(found["knn"].score(asked), expected, rtol=1e-5, atol=1e-6)


def test_all_networks_begin_alike_and_see_the_same(world: World) -> None:
    runs = [
        UnknownRun(head, variant, 3, SMALL, world.known)
        for head in ("linear", "fixed", "nearest", "code")
        for variant in ("plain", "entropy", "projector", "both")
    ]
    first, *rest = (list(run.model.encoder.parameters()) for run in runs)
    for other in rest:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, other, strict=True))
    batches = [next(iter(run.batches())) for run in runs]
    assert all(torch.equal(batches[0][0], images) for images, _ in batches)
    with pytest.raises(InvalidArgumentError, match="--features 1"):
        UnknownRun("fixed", "plain", 3, replace(SMALL, features=1), world.known)


def test_the_loss_is_that_of_the_head_and_the_regularizer(world: World) -> None:
    settings = replace(SMALL, penalty=0.7, lr=1e-9, batch_size=36)
    run = UnknownRun("fixed", "both", 3, settings, world.known)
    images, targets = next(iter(run.batches()))
    row = run.advance()  # the epoch has one step
    assert row is not None
    with torch.no_grad():
        run.model.train()
        features = run.model.encoder(images)
        units = F.normalize(run.model.projector(features))
        logits = 10 * units @ run.head.frame.T
    expected = F.cross_entropy(logits, targets) + 0.7 * neighbor_entropy_loss(features)
    assert row["loss"] == pytest.approx(float(expected), abs=1e-4)


def test_a_network_with_a_projector_has_two_spaces(world: World) -> None:
    run = UnknownRun("nearest", "both", 0, SMALL, world.known)
    run.finish()
    answers = run.answers(world.known.test.images)
    assert list(answers.features) == ["encoder", "projector"]
    for rows in answers.features.values():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    found = evaluate(run, world, (0.1, 1.0))
    encoder, projector = found["spaces"]
    # The head reads the projector: self-duality and its scores exist there alone.
    assert "nc3_distance" not in encoder
    assert "nc4_disagreement" not in encoder
    assert 0 <= projector["nc4_disagreement"] <= 1
    kinds = {
        space: {row["score"] for row in found["scores"] if row["space"] == space} for space in answers[0]
    }
    assert {*OF_LOGITS, *OWN} <= kinds["projector"]
    assert not set(OF_LOGITS) & kinds["encoder"]
    accuracy = (answers.logits.argmax(1) == world.known.test.targets).double().mean()
    assert projector["test_accuracy"] == float(accuracy)
    places = joined(found["spaces"], found["scores"])
    neco = [row["auroc"] for row in found["scores"] if row["score"] == "neco" and row["space"] == "encoder"]
    assert places[0]["auroc_neco"] == pytest.approx(np.mean(neco))


def test_collapse_is_that_of_definitions() -> None:
    torch.manual_seed(0)
    targets = torch.arange(30) % 3
    head = NearestETFHead(6, 3)
    features = 5 * torch.randn(3, 6)[targets] + torch.randn(30, 6)
    head(features, targets)
    head.eval()
    split = Split(torch.zeros(30, 1, 1, 1), targets)
    row = collapse(features, split, features, split, head)
    means = np.stack([features[targets == k].double().numpy().mean(0) for k in range(3)])
    centered = means - means.mean(0)
    inner = features.double().numpy() - means[targets.numpy()]
    within, between = inner.T @ inner / 30, centered.T @ centered / 3
    assert row["nc1_trace"] == pytest.approx(np.trace(within @ np.linalg.pinv(between)) / 3, rel=1e-6)
    distances = ((features.numpy()[:, None] - means) ** 2).sum(-1)
    chosen = head(features).argmax(1).numpy()
    assert row["nc4_disagreement"] == pytest.approx((distances.argmin(1) != chosen).mean())


def test_the_strength_of_a_probe_is_chosen_by_validation() -> None:
    torch.manual_seed(0)
    rows, targets = torch.randn(30, 4), torch.arange(30) % 2
    flipped = 1 - targets  # a validation set on which the weaker probe of noise is not the better one

    def accuracy(strength: float, part: tuple[torch.Tensor, torch.Tensor]) -> float:
        return probe([(rows, targets), part, part], (strength,))

    scores = {strength: accuracy(strength, (rows, flipped)) for strength in (1e-4, 100.0)}
    best = max(scores, key=scores.__getitem__)
    assert scores[1e-4] != scores[100.0]
    found = probe([(rows, targets), (rows, flipped), (rows, targets)], (1e-4, 100.0))
    assert found == accuracy(best, (rows, targets))


def place(variant: str, space: str, seed: int, nc1: float, auroc: float, transfer: float) -> dict:
    own = {"data": "x", "head": "fixed", "variant": variant, "seed": seed, "space": space}
    detects = {"auroc_neco": auroc, "auroc_vertex": auroc + 0.01, "auroc": auroc}
    return own | {"nc1_trace": nc1, "nc1_quotient": nc1, "transfer": transfer} | detects


def test_claims_are_numbers_of_one_seed() -> None:
    places = [
        place("plain", "encoder", 0, 1.0, 0.80, 0.60),
        place("both", "encoder", 0, 10.0, 0.70, 0.65),
        place("both", "projector", 0, 0.1, 0.90, 0.55),
        place("plain", "encoder", 1, 1.0, 0.80, 0.60),
    ]
    rows = claim_rows(places)
    found = {(row["claim"], row["seed"]): row["value"] for row in rows if "best" not in row}
    correlations = {"detection": 1.0, "detection by neco": 1.0, "detection by vertex": 1.0, "transfer": -1.0}
    expected = {
        (f"{form} and error of {name}", 0): pytest.approx(value)
        for form in ("nc1_trace", "nc1_quotient")
        for name, value in correlations.items()
    }
    assert found == expected | {
        ("two spaces, gain of detection", 0): pytest.approx(0.1),
        ("two spaces, gain of transfer", 0): pytest.approx(0.05),
    }
    vertex = [row for row in rows if "best" in row]
    assert len(vertex) == 4
    assert all(row["best"] == "neco" and row["value"] == pytest.approx(0.01) for row in vertex)


@pytest.mark.usefixtures("others")
def test_networks_of_the_collapse_study_are_asked(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    trained = Settings(
        data="digits", classes=4, image_size=6, width=0.25, epochs=1, normalize=True, out=folder
    )
    world = make_world(load(trained), None, 7, 20, DataSettings())
    whole = world.known
    run = train("fixed", 0, trained, whole)
    write_json(folder / "run.json", {"study": "study", "settings": trained.fingerprint()})
    settings = settings_of(UnknownSettings(trained=folder))
    assert settings.fingerprint() == trained.fingerprint()
    subject = Collapsed(folder / "checkpoints" / "fixed-seed0.pt", settings, whole)
    assert subject.finished
    answers = subject.answers(whole.test.images)
    accuracy = float((answers.logits.argmax(1) == whole.test.targets).double().mean())
    assert accuracy == pytest.approx(run.last["test_accuracy"], abs=1e-6)
    with pytest.raises(InvalidArgumentError, match="other settings"):
        Collapsed(folder / "checkpoints" / "fixed-seed0.pt", settings, pictures("digits", 4))
    with pytest.raises(InvalidArgumentError, match=r"has no run\.json"):
        UnknownSettings(trained=tmp_path).check()


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


COMMON = ["--data", "digits", "--known", "8", "--width", "0.25", "--features", "16", "--epochs", "2"]
COMMON += ["--batch-size", "64", "--heads", "nearest", "--variants", "plain", "both"]
COMMON += ["--probe-images", "200", "--probe-strengths", "0.1", "--unknown-images", "50"]


@pytest.mark.slow
def test_a_killed_study_ends_at_the_same_numbers(
    tmp_path: Path,
    killed: Callable[[str, Sequence[str], Path, int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = [*COMMON, "--data-dir", str(tmp_path / "data"), "--checkpoint-every", "5"]
    assert main([*common, "--seeds", "0", "1", "--out", str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    assert "digits, mean ± deviation of 2 seeds" in printed
    assert ("not scored" in printed) == (missing() is not None)
    places, scores = (rows_of(tmp_path / "whole" / f"{name}.csv") for name in ("runs", "scores"))
    assert len(places) == 2 * 3  # seeds, spaces
    assert len({(row["score"], row["unknown"]) for row in scores}) >= 5 * 3
    assert all(0 <= float(row["auroc"]) <= 1 and 0 <= float(row["fpr95"]) <= 1 for row in scores)
    summary = rows_of(tmp_path / "whole" / "summary.csv")
    assert len(summary) == 3
    both = [float(row["transfer"]) for row in places if row["variant"] == "plain"]
    assert float(summary[0]["transfer"]) == pytest.approx(np.mean(both))
    assert all(
        (tmp_path / "whole" / f"{name}.png").stat().st_size > 10_000 for name in ("scores", "trade-off")
    )
    broken = [*common, "--resume", "--seeds", "0", "1", "--out", str(tmp_path / "broken")]
    killed("unknown", broken, tmp_path / "broken" / "checkpoints", 3)
    for name in ("runs", "scores", "summary", "claims"):
        whole, again = (rows_of(tmp_path / folder / f"{name}.csv") for folder in ("whole", "broken"))
        assert whole == again
