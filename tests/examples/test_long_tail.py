"""The study of long-tailed training: its data, its losses, its choices, and that it continues to the same."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from etflayers.errors import InvalidArgumentError
from imbalance.data import counts_of, groups_of, long_tailed
from imbalance.methods import KNOBS, Knobs, inverse_frequency, make_head, make_objective
from imbalance.settings import LongTailSettings
from imbalance.training import Key, LongTailRun
from lab.data import ImageData, Split, load
from lab.results import mean_and_deviation
from long_tail import main

SMALL = ["--data", "digits", "--features", "10", "--width", "0.25", "--batch-size", "64", "--epochs", "2"]
GIVEN = Knobs(scale=10.0, weight_decay=0.05, tau=1.0)


@pytest.fixture
def digits() -> ImageData:
    return load(LongTailSettings(data="digits"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_only_the_training_set_gets_a_tail(digits: ImageData) -> None:
    tailed = long_tailed(digits, "exponential", 10.0)
    counts = counts_of(tailed)
    largest = int(counts[0])
    expected = [round(largest * 10 ** (-k / 9)) for k in range(10)]
    assert counts.tolist() == expected
    turned = counts_of(long_tailed(digits, "exponential", 10.0, rare="first"))
    assert turned.tolist() == expected[::-1]
    assert groups_of(turned, "exponential")["few"].tolist() == [0, 1, 2]
    train, validation = digits.held_out()
    assert tailed.validation is not None
    assert torch.equal(tailed.validation.images, validation.images)
    assert torch.equal(tailed.test.images, digits.test.images)
    # No image to learn from is one to choose by.
    pool = {image.numpy().tobytes() for image in train.images}
    assert all(image.numpy().tobytes() in pool for image in tailed.train.images)


def test_views_make_a_class_large_enough_for_a_tail() -> None:
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    train, other = Split(images, torch.tensor([0, 0, 0, 1, 1, 1])), Split(images[::3], torch.tensor([0, 1]))
    small = ImageData.of("small", train, other, ("a", "b"), other)
    with pytest.raises(InvalidArgumentError, match="--views"):
        long_tailed(small, "step", 4.0)
    many = long_tailed(small, "step", 20.0, views=20)
    assert counts_of(many).tolist() == [60, 3]
    assert len({image.numpy().tobytes() for image in many.train.images}) == 63  # no view is another one


def test_groups_are_thirds_of_an_exponential_tail_and_halves_of_a_step(digits: ImageData) -> None:
    sizes = {
        kind: {
            name: classes.tolist()
            for name, classes in groups_of(counts_of(long_tailed(digits, kind, 10.0)), kind).items()
        }
        for kind in ("exponential", "step")
    }
    assert sizes["exponential"] == {"many": [0, 1, 2], "medium": [3, 4, 5, 6], "few": [7, 8, 9]}
    assert sizes["step"] == {"many": [0, 1, 2, 3, 4], "medium": [], "few": [5, 6, 7, 8, 9]}


def test_objectives_are_their_formulas() -> None:
    torch.manual_seed(0)
    counts, targets = torch.tensor([60, 30, 10]), torch.tensor([0, 1, 2, 0])
    features = torch.randn(4, 5)
    cosines = {}
    losses = {}
    for method in KNOBS:
        head = make_head(method, 5, counts, GIVEN)
        losses[method] = make_objective(method, head, counts, GIVEN)(features, targets).item()
        # The nearest head has moved by now: the logits of the loss are those of the head as it is left.
        cosines[method] = head.eval()(features).detach() / getattr(head, "scale", 1.0)
    log_prior = (counts / 100).log()
    weights = 1 / counts

    def negative_log(logits: torch.Tensor) -> torch.Tensor:
        return -logits.log_softmax(-1)[torch.arange(4), targets]

    own = {method: found[torch.arange(4), targets] for method, found in cosines.items()}
    weighted = negative_log(cosines["reweighted"]) * weights[targets]
    lengths = (100 / (3 * counts)).sqrt()[targets]
    expected = {
        "ce": negative_log(cosines["ce"]).mean(),
        "reweighted": weighted.sum() / weights[targets].sum(),
        "linear-la": negative_log(cosines["linear-la"] + log_prior).mean(),
        "etf-dr": ((own["etf-dr"] - 1) ** 2 / 2).mean(),
        "etf-dr-lengths": (lengths**2 * (own["etf-dr-lengths"] - 1) ** 2 / 2).mean(),
        "etf-ntce": F.cross_entropy(10 * cosines["etf-ntce"].T[targets], torch.arange(4)),
        "etf-nonl": torch.stack(
            [
                (10 * cosines["etf-nonl"][targets != y, y]).logsumexp(0) - 10 * cosines["etf-nonl"][i, y]
                for i, y in enumerate(targets.tolist())
            ]
        ).mean(),
    }
    for method in ("cosine-la", "etf-la", "nearest-la"):
        expected[method] = negative_log(10 * cosines[method] + log_prior).mean()
    assert losses == pytest.approx({method: loss.item() for method, loss in expected.items()}, rel=1e-4)
    assert torch.allclose(inverse_frequency(counts), weights / weights.mean())


def test_one_body_for_all_methods(digits: ImageData, tmp_path: Path) -> None:
    settings = LongTailSettings(data="digits", features=12, width=0.25, out=tmp_path)
    data = long_tailed(digits, "exponential", 10.0)
    runs = [LongTailRun(Key("exponential", 10.0, method, 3, GIVEN), settings, data) for method in KNOBS]
    first, *others = (list(run.model.body.parameters()) for run in runs)
    for other in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, other, strict=True))
    batches = [next(iter(run.batches()))[1] for run in runs]
    assert all(torch.equal(batches[0], batch) for batch in batches)
    few = LongTailSettings(data="digits", features=8)
    with pytest.raises(InvalidArgumentError, match="--features 8"):
        LongTailRun(Key("exponential", 10.0, "ce", 3, GIVEN), few, data)


def test_a_grid_has_the_knobs_of_the_method_alone() -> None:
    settings = LongTailSettings(scales=(5.0, 20.0), weight_decays=(0.1,), taus=(1.0, 2.0))
    assert settings.grid("ce") == [Knobs(10.0, 0.1, 1.0)]
    assert len(settings.grid("etf-nonl")) == 2
    assert len(settings.grid("etf-la")) == 4
    with pytest.raises(InvalidArgumentError, match="--tune-seed"):
        LongTailSettings(tune=True, seeds=(1000,)).check()


@pytest.mark.slow
def test_the_study_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = [*SMALL, "--ratios", "10", "--methods", "ce", "etf-la", "etf-nonl"]
    grid = ["--tune", "--scales", "5", "20", "--weight-decays", "0.05", "--taus", "1", "--tune-epochs", "1"]
    assert main([*tuned, *grid, "--seeds", "0", "1", "--out", str(tmp_path / "tuned")]) == 0
    runs, summary, trials = (
        rows_of(tmp_path / "tuned" / f"{name}.csv") for name in ("runs", "summary", "tuning")
    )
    assert len(runs) == 2 * 2 * 3 * 2  # kinds, seeds, methods, epochs
    assert len(summary) == 2 * 3
    assert len(trials) == 2 * 2 * 2  # of the two methods that have a scale
    # A trial does not see the test set, which a run looks at once, at the end.
    assert not any(name.startswith("test") for name in trials[0])
    assert all((row["test_accuracy_few"] != "") == (row["epoch"] == "2") for row in runs)
    assert all((row["test_accuracy_medium"] == "") == (row["kind"] == "step") for row in summary)
    for row in summary:
        if row["method"] == "etf-la":  # a fixed simplex: no pair of rows merges
            assert float(row["minority_collapse_weights_few"]) == pytest.approx(-1 / 9, abs=1e-5)
    choices = json.loads((tmp_path / "tuned" / "choices.json").read_text())
    for choice in choices:
        same = [row for row in trials if all(row[n] == str(choice[n]) for n in ("kind", "ratio", "method"))]
        if choice["method"] == "ce":
            assert not same
            continue
        best = max(same, key=lambda row: float(row["validation_accuracy_all"]))
        assert best["epoch"] == "1"
        assert float(best["scale"]) == choice["scale"]
    assert (tmp_path / "tuned" / "accuracy-step-10.png").stat().st_size > 10_000
    assert "digits, step 10" in capsys.readouterr().out

    # What was chosen is used again, to the same numbers.
    again = ["--choices", str(tmp_path / "tuned" / "choices.json"), "--seeds", "1", "--kinds", "step"]
    assert main([*tuned, *again, "--out", str(tmp_path / "again")]) == 0
    one = [row for row in runs if row["seed"] == "1" and row["kind"] == "step"]
    two = rows_of(tmp_path / "again" / "runs.csv")
    for row in (*one, *two):
        del row["ms_per_step"]
    assert [{name: row[name] for name in two[0]} for row in one] == two
    (tmp_path / "wrong.json").write_text('[{"kind": "step"}]')
    assert main([*tuned, "--choices", str(tmp_path / "wrong.json"), "--out", str(tmp_path / "wrong")]) == 1
    assert "is no list of choices" in capsys.readouterr().err


def test_a_measure_that_a_row_lacks_has_no_mean() -> None:
    found = mean_and_deviation([{"x": 1.0, "y": 1.0}, {"x": 3.0}], ("x", "y"))
    assert found["x"] == 2.0
    assert found["x_std"] == pytest.approx(math.sqrt(2))
    assert math.isnan(found["y"])
    assert found["y_std"] is None


@pytest.mark.slow
def test_a_killed_study_ends_at_the_same_numbers(
    tmp_path: Path, killed: Callable[[str, Sequence[str], Path, int], None]
) -> None:
    common = [*SMALL, "--kinds", "exponential", "--ratios", "10", "--methods", "cosine-la", "nearest-la"]
    common += ["--tune", "--scales", "5", "10", "--weight-decays", "0.05", "--taus", "1"]
    common += ["--checkpoint-every", "3"]
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    broken = [*common, "--resume", "--out", str(tmp_path / "broken")]
    killed("long_tail", broken, tmp_path / "broken" / "checkpoints", 3)
    for name in ("runs", "tuning"):
        whole, again = (rows_of(tmp_path / folder / f"{name}.csv") for folder in ("whole", "broken"))
        for row in (*whole, *again):
            del row["ms_per_step"]
        assert whole == again
