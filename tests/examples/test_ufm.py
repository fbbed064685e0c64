"""The comparison on free features: its descent, its measures, its files and its errors."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from etflayers import simplex_etf
from etflayers.errors import InvalidArgumentError, NonFiniteError
from lab.heads import HeadName
from ufm import PANELS, SWEEP, collapse_figure, main
from unconstrained.descent import (
    Descent,
    RunKey,
    Settings,
    make_model,
    make_optimizers,
    measure,
    objective,
)

HEADS = Settings().heads


def run(head: HeadName, settings: Settings, *, lr: float = 0.03, seed: int = 0, **options: Any) -> Descent:
    pytest.importorskip("geoopt")
    descent = Descent(RunKey(settings.classes[0], head, lr, seed), settings)
    descent.finish(**options)
    return descent


@pytest.mark.parametrize(("loss", "lr"), [("ce", 0.15), ("mse", 1.0)])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_ends_at_an_etf(head: HeadName, loss: Any, lr: float) -> None:
    settings = Settings(classes=(4,), per_class=3, steps=200, loss=loss, spacing=4)
    history = run(head, settings, lr=lr).history
    first, last = history[0], history[-1]
    assert last["step"] == 200
    assert last["accuracy"] == 1
    assert last["loss"] < first["loss"]
    assert last["etf_distance"] < 0.1 * first["etf_distance"]
    assert last["nc1_trace"] < 0.01 * first["nc1_trace"]


def test_nearest_is_first() -> None:
    """For one seed: in at most half the steps of the fixed head and a fifth of those of the standard one."""
    reached = run("nearest", Settings(classes=(10,), steps=60)).steps_to(0.05)
    assert reached < math.inf
    for head, factor in (("fixed", 2), ("standard", 5)):
        assert run(head, Settings(classes=(10,), steps=factor * reached)).steps_to(0.05) == math.inf


def test_step_follows_the_loss_of_each_sample() -> None:
    """A feature moves by ``-lr`` times the gradient of its own loss, written out, whatever N and K."""
    settings = Settings(classes=(3,), per_class=2, features=5)
    model = make_model("fixed", 3, 0, settings).double()
    before, targets = model.features.detach().clone(), model.targets
    objective(model, model(), settings).backward()
    for optimizer in make_optimizers(model, 0.25, settings):
        optimizer.step()

    assert model.head.scale == 5
    frame, scale = model.head.frame, 5
    length = before.norm(dim=-1, keepdim=True)
    units = before / length
    error = (scale * units @ frame.mT).softmax(-1) - F.one_hot(targets, 3)
    gradient = scale * error @ frame
    gradient = (gradient - (gradient * units).sum(-1, keepdim=True) * units) / length
    torch.testing.assert_close(model.features.detach(), before - 0.25 * gradient, rtol=1e-12, atol=1e-12)


def test_standard_head_steps_by_the_mean_of_each_class() -> None:
    settings = Settings(classes=(3,), per_class=2, classifier_rate=0.5)
    model = make_model("standard", 3, 0, settings).double()
    weight = model.head.prototypes
    before = weight.detach().clone()
    objective(model, model(), settings).backward()
    gradient = weight.grad.clone()
    _, optimizer = make_optimizers(model, 0.25, settings)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 0.25 * 0.5 * 3 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_objective_is_its_definition(loss: Any) -> None:
    settings = Settings(classes=(3,), per_class=2, loss=loss, feature_decay=0.1, weight_decay=0.2)
    model = make_model("standard", 3, 0, settings).double()
    logits = model()
    h, w = model.features.detach().numpy(), model.head.prototypes.detach().numpy()
    z = logits.detach().numpy()
    scale = 5 if loss == "ce" else 0.5
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (h, w)]
    np.testing.assert_allclose(z, scale * unit[0] @ unit[1].T, rtol=1e-12)
    total = 0.0
    for row, target in zip(z, model.targets.tolist(), strict=True):
        if loss == "ce":
            total += math.log(sum(math.exp(v) for v in row)) - row[target]
        else:
            total += sum((v - (k == target)) ** 2 for k, v in enumerate(row)) / 2
    expected = total / len(z) + 0.05 * (h**2).sum() + 0.1 * (w**2).sum()
    assert objective(model, logits, settings).item() == pytest.approx(expected, rel=1e-12)


def test_distance_is_that_of_a_procrustes_fit() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    settings = Settings(classes=(5,), features=7, per_class=4)
    model = make_model("standard", 5, 1, settings).double()
    logits = model()
    row = measure(model, 0, objective(model, logits, settings), logits)

    means = F.normalize(model.features.detach(), dim=-1).view(5, 4, 7).mean(1)
    rows = (means - means.mean(0)).numpy()
    frame = simplex_etf(5, 7, dtype=torch.float64).numpy()
    rotation, _ = linalg.orthogonal_procrustes(frame, rows)
    expected = np.linalg.norm(rows / np.linalg.norm(rows) - frame @ rotation / np.sqrt(5))
    assert row["etf_distance"] == pytest.approx(expected, rel=1e-9)


def test_seed_decides_everything() -> None:
    settings = Settings(classes=(4,), per_class=3, steps=10)
    assert run("learned", settings).history == run("learned", settings).history
    assert run("learned", settings).history != run("learned", settings, seed=1).history
    starts = [make_model(head, 4, 7, settings).features for head in HEADS]
    assert all(torch.equal(start, starts[0]) for start in starts)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("head", ["standard", "nearest", "learned"])
def test_resumed_run_ends_with_the_same_numbers(head: HeadName, tmp_path: Path) -> None:
    pytest.importorskip("geoopt")

    def kill(step: int, *_: object) -> None:
        if step == 17:
            raise KilledError

    settings = Settings(classes=(4,), per_class=3, steps=23, sgd_momentum=0.5)
    whole = run(head, settings, lr=0.1)
    file: dict[str, Any] = {"lr": 0.1, "checkpoint": tmp_path / "broken.pt", "every": 7, "resume": True}
    with pytest.raises(KilledError):
        run(head, settings, **file, progress=kill)
    steps: list[int] = []
    continued = run(head, settings, **file, progress=lambda step, *_: steps.append(step))
    assert steps[0] == 14  # the last checkpoint before the kill
    assert continued.history == whole.history
    expected, got = whole.state(), continued.state()
    for part in continued.parts:
        torch.testing.assert_close(got[part], expected[part], rtol=0, atol=0)

    steps.clear()
    run(head, settings, **file, progress=lambda step, *_: steps.append(step))
    assert steps == [24]  # a finished run is not done again
    with pytest.raises(InvalidArgumentError, match=r"per_class was 3, is 5"):
        run(head, replace(settings, per_class=5), **file)


def test_outputs(tmp_path: Path) -> None:
    heads = ("fixed", "nearest")
    command = ["--classes", "4", "3", "--heads", *heads, "--steps", "20", "--seeds", "0", "1"]
    command += ["--spacing", "1.5", "--lr", "0.1", "--lr-grid", "0.01", "0.3", "--out", str(tmp_path)]
    assert main(command) == 0
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = Settings(steps=20, spacing=1.5).measured_steps()
    # For each K and head two seeds at the common rate, the grid for one seed, the best of it for the other.
    assert len(rows) == 2 * len(heads) * 5 * len(measured)

    def first_steps(entry: dict[str, Any], lr: float, seeds: str, distance: float) -> list[float]:
        steps = []
        for seed in seeds:
            key = (str(entry["classes"]), entry["head"], str(lr), seed)
            same = [row for row in rows if (row["classes"], row["head"], row["lr"], row["seed"]) == key]
            assert [int(row["step"]) for row in same] == measured
            near = [int(row["step"]) for row in same if float(row["etf_distance"]) <= distance]
            steps.append(min(near, default=math.inf))
        return steps

    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in ("common", "selected"):
        assert [(e["classes"], e["head"]) for e in summary[name]] == [(k, h) for k in (4, 3) for h in heads]
        for entry in summary[name]:
            middle = median(first_steps(entry, entry["lr"], "01", 0.05))
            assert entry["steps_to_0.05"] == (None if middle == math.inf else middle)
    assert {entry["lr"] for entry in summary["common"]} == {0.1}
    for entry in summary["selected"]:
        tried = [first_steps(entry, lr, "0", 0.01) for lr in (0.01, 0.3)]
        assert first_steps(entry, entry["lr"], "0", 0.01) == min(tried)
    for name in ("distance", "collapse"):
        for rate in ("common", "selected"):
            assert (tmp_path / f"{name}-{rate}.png").read_bytes().startswith(b"\x89PNG")


def test_one_sample_a_class_has_no_nc1_to_draw() -> None:
    descent = run("fixed", Settings(classes=(3,), per_class=1, steps=3))
    assert all(row["nc1_trace"] == 0 for row in descent.history)
    figure = collapse_figure([descent])
    assert [axes.get_title() for axes in figure.axes] == [PANELS["nc2_gram_means"], PANELS["nc3_distance"]]
    assert all(axes.lines for axes in figure.axes)


def test_sweep(tmp_path: Path) -> None:
    command = ["--sweep", "--classes", "3", "--steps", "5", "--seeds", "0", "--out", str(tmp_path)]
    assert main(command) == 0
    rows = json.loads((tmp_path / "sweep.json").read_text())["sweep"]
    assert [row["options"] for row in rows] == list(SWEEP)
    ends = [row["last_etf_distance"] for row in rows]
    assert len(set(ends)) == len(ends)  # every option has a say


def test_divergence_is_an_error() -> None:
    settings = Settings(classes=(3,), steps=200, loss="mse", normalize=False, scale=10)
    with pytest.raises(NonFiniteError, match="take a lower --lr"):
        run("standard", settings, lr=100)


def test_unnormalized_features_decay() -> None:
    """With decay the lengths of free features have an optimum, and all features of a class find it."""
    settings = Settings(
        classes=(3,), per_class=2, steps=700, spacing=4, normalize=False, scale=1, feature_decay=0.01
    )
    history = run("fixed", settings, lr=0.6).history
    assert history[-1]["etf_distance"] < 1e-3
    assert history[-1]["nc1_trace"] < 1e-6


def test_theory_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cvxpy")
    assert main(["--theory", "--seeds", "0", "--out", str(tmp_path)]) == 0
    with (tmp_path / "theory.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [(row["loss"], row["rank"]) for row in written] == [
        (loss, rank) for loss in ("ce", "mse") for rank in ("free", "0", "1", "2")
    ]
    assert float(written[0]["collapse"]) < 1e-5
    assert "Critical points" in capsys.readouterr().out
