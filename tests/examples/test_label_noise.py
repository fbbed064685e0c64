"""The study of label noise: data, terms, search and theory, and that it continues to the same numbers."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from etflayers.errors import InvalidArgumentError
from etflayers.functional import label_relaxation_loss
from lab.data import ImageData, Split, load
from lab.tuning import local_ray
from label_noise import main
from noise.comparison import theory_rows
from noise.data import NoisyData, with_noise
from noise.figures import curves_figure, dilation_figure
from noise.measures import measure
from noise.methods import Knobs, MethodName
from noise.search import METRIC, run_trial
from noise.settings import NoiseSettings
from noise.theory import decay_of, equilibrium, loss_of, probability, risk
from noise.training import Key, NoiseRun

EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS: tuple[MethodName, ...] = (
    "ce",
    "smoothing",
    "relaxation",
    "fixed",
    "nearest",
    "nearest-huber",
    "code",
)
SMALL = ["--data", "digits", "--classes", "3", "--width", "16", "--depth", "3", "--batch-size", "32"]
SETTINGS = NoiseSettings(data="digits", classes=3, width=16, depth=3, batch_size=32, epochs=2)
LOSSES = ("ce", "smoothing", "relaxation")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load(SETTINGS)


@pytest.fixture(scope="module")
def noisy(digits: ImageData) -> NoisyData:
    return with_noise(digits, 0.4, 3)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_both_parts_get_noise_after_the_split_and_the_test_set_none(digits: ImageData) -> None:
    clean = digits.held_out()
    found = with_noise(digits, 0.4, 3)
    for part, original in zip((found.data.train, found.validation), clean, strict=True):
        assert torch.equal(part.images, original.images)
        wrong = (part.targets != original.targets).double().mean()
        assert abs(float(wrong) - 0.4 * 2 / 3) < 4 * math.sqrt(0.25 / len(part))
    assert torch.equal(found.originals, clean[0].targets)
    assert torch.equal(found.data.test.targets, digits.test.targets)
    assert torch.equal(found.corrupted, found.data.train.targets != clean[0].targets)
    # More noise leaves wrong what less noise has made wrong; another seed is other noise on the same images.
    less, other = with_noise(digits, 0.1, 3), with_noise(digits, 0.4, 4)
    assert less.corrupted.any()
    assert found.corrupted[less.corrupted].all()
    assert not torch.equal(other.data.train.targets, found.data.train.targets)
    assert torch.equal(other.data.train.images, found.data.train.images)
    assert not with_noise(digits, 0.0, 3).corrupted.any()


def test_all_methods_start_from_one_body_and_see_the_same_batches(noisy: NoisyData) -> None:
    runs = [NoiseRun(Key(0.4, method, 3, SETTINGS.given), SETTINGS, noisy) for method in METHODS]
    first, *others = (run.model.body.state_dict() for run in runs)
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    batches = [next(iter(run.batches())) for run in runs]
    for images, targets in batches[1:]:
        assert torch.equal(images, batches[0][0])
        assert torch.equal(targets, batches[0][1])
    layers = [module for module in runs[0].model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == SETTINGS.depth
    assert (runs[0].features(noisy.data.test) >= 0).all()


def test_the_loss_is_that_of_the_method(noisy: NoisyData) -> None:
    logits, targets = torch.randn(8, 3), torch.randint(3, (8,))
    expected = {
        "ce": F.cross_entropy(logits, targets),
        "smoothing": F.cross_entropy(logits, targets, label_smoothing=0.2),
        "relaxation": label_relaxation_loss(logits, targets, alpha=0.2),
        "nearest": F.cross_entropy(logits, targets),
    }
    for method, value in expected.items():
        run = NoiseRun(Key(0.4, method, 3, SETTINGS.given._replace(alpha=0.2)), SETTINGS, noisy)
        assert torch.equal(run.loss(logits, targets), value)


def test_the_learning_rate_has_five_steps(noisy: NoisyData) -> None:
    run = NoiseRun(Key(0.4, "ce", 3, Knobs(0.5, 0.1, 0.0, 0.1)), replace(SETTINGS, epochs=10), noisy)
    rates = []
    for step in range(run.total):
        run.step = step
        rates.append(run.rate())
    values = sorted(set(rates), reverse=True)
    assert values == pytest.approx([0.5, 0.05, 0.005, 0.0005, 0.00005])
    sizes = [rates.count(value) for value in values]
    assert max(sizes) - min(sizes) <= 1


def test_measures_are_their_definitions(noisy: NoisyData) -> None:
    settings = replace(SETTINGS, epochs=8)
    run = NoiseRun(Key(0.4, "fixed", 3, settings.given), settings, noisy)
    run.finish()
    row = run.history[-1]
    train, test = noisy.data.train, noisy.data.test
    unit = {part: F.normalize(run.features(part)).double().numpy() for part in (train, test)}
    centers = np.stack([unit[test][test.targets.numpy() == k].mean(0) for k in range(3)])
    distance = np.mean([np.linalg.norm(centers[j] - centers[k]) for j, k in ((0, 1), (0, 2), (1, 2))])
    wrong, classes = noisy.corrupted.numpy(), noisy.originals.numpy()
    away = np.linalg.norm(unit[train] - centers[classes], axis=1)[wrong]
    spread = np.mean((unit[test] - centers[test.targets.numpy()]) ** 2 * np.ones(3), axis=0).sum()
    logits = run.model.head(run.features(train)).detach()
    said = logits.argmax(1).numpy()
    labels = train.targets.numpy()
    probabilities = logits.double().softmax(1).numpy()[np.arange(len(labels)), labels]
    expected = {
        "distance": distance,
        "memorization": away.sum(),
        "memorization_relative": away.sum() / len(labels) / distance,
        "memorization_class1": away[classes[wrong] == 1].mean(),
        "accuracy_wrong_labels": (said == labels)[wrong].mean(),
        "accuracy_right_labels": (said == labels)[~wrong].mean(),
        "recovered": (said == classes)[wrong].mean(),
        "probability_right_labels": probabilities[~wrong].mean(),
        "noise_rate": wrong.mean(),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    balanced = np.mean(
        [np.mean((unit[test][test.targets.numpy() == k] - centers[k]) ** 2, 0) for k in range(3)]
    )
    assert row["dilation_trace"] == pytest.approx(spread, rel=0.02)  # weighs samples, or classes, alike
    assert 3 * balanced == pytest.approx(spread, rel=0.02)
    assert run.samples["distance"].numpy() == pytest.approx(away, rel=1e-5)
    assert run.samples["index"].tolist() == np.flatnonzero(wrong).tolist()


def test_a_network_without_noise_has_nothing_corrupted(digits: ImageData) -> None:
    run = NoiseRun(Key(0.0, "ce", 3, SETTINGS.given), SETTINGS, with_noise(digits, 0.0, 3))
    run.finish()
    row = run.history[-1]
    assert row["memorization_relative"] == 0
    assert not {"accuracy_wrong_labels", "recovered", "corruption_bias"} & set(row)


def test_a_network_that_has_died_has_no_relative_measures(noisy: NoisyData) -> None:
    run = NoiseRun(Key(0.4, "ce", 3, SETTINGS.given), SETTINGS, noisy)
    row, samples = measure(run.model.eval().head, lambda split: torch.zeros(len(split), 3), noisy)
    assert row["distance"] == row["dilation_trace"] == row["memorization"] == 0
    assert not any("relative" in name for name in (*row, *samples))
    rows = [{**row, "eta": 0.4, "method": "ce", "seed": 3, "alpha": None}]
    assert theory_rows(rows) == []
    for figure in (dilation_figure(rows), curves_figure(rows)):
        assert len(figure.axes) >= 2


def test_a_trial_sees_neither_test_data_nor_true_labels(noisy: NoisyData) -> None:
    hidden = torch.full_like(noisy.data.test.images, 77)
    blind = replace(
        noisy,
        data=replace(noisy.data, test=Split(hidden, torch.full_like(noisy.data.test.targets, -5))),
        originals=torch.full_like(noisy.originals, -5),
    )
    rows = []
    for data in (noisy, blind):
        run = NoiseRun(Key(0.4, "smoothing", 3, SETTINGS.given, trial=True), SETTINGS, data)
        run.finish()
        rows.append([{name: row[name] for name in row if name != "ms_per_step"} for row in run.history])
    assert rows[0] == rows[1]
    assert rows[0][-1]["validation_accuracy"] > 0
    assert not any(name.startswith(("test", "memorization", "dilation")) for name in rows[0][-1])


def test_a_trial_that_diverges_loses(tmp_path: Path) -> None:
    settings = replace(SETTINGS, out=tmp_path)
    row = run_trial("ce", Knobs(1e30, 1.0, 0.0, 0.1), settings)
    assert row["diverged"]
    assert row[METRIC] == 0
    assert run_trial("ce", SETTINGS.given, settings)[METRIC] > 0


def test_bad_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.json").write_text('[{"method": "ce"}]')
    cases = {
        "--etas": ["--etas", "1.5"],
        "--tune-seed": ["--tune", "--seeds", "1000"],
        "no list of choices": ["--choices", str(tmp_path / "wrong.json")],
        "--features 1": ["--features", "1"],
        "--alpha": ["--alpha", "0"],
    }
    for word, options in cases.items():
        assert main([*SMALL, *options, "--out", str(tmp_path / "out")]) == 1
        assert word in capsys.readouterr().err


def test_the_study_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "choices.json").write_text(
        json.dumps([{"method": "smoothing", "lr": 0.03, "gamma": 0.5, "weight_decay": 1e-4, "alpha": 0.2}])
    )
    options = ["--classes", "2", "--etas", "0", "0.3", "--methods", "ce", "smoothing", "--seeds", "0", "1"]
    options += ["--epochs", "3", "--choices", str(tmp_path / "choices.json")]
    assert main([*SMALL, *options, "--out", str(tmp_path / "out")]) == 0
    names = ("runs", "summary", "samples", "theory")
    runs, summary, samples, theory = (rows_of(tmp_path / "out" / f"{name}.csv") for name in names)
    assert len(runs) == 2 * 2 * 2 * 3  # seeds, etas, methods, epochs
    assert {row["lr"] for row in runs if row["method"] == "smoothing"} == {"0.03"}
    assert {row["alpha"] for row in runs if row["method"] == "ce"} == {""}
    assert len(summary) == 4
    assert all((row["test_accuracy"] != "") == (row["epoch"] == "3") for row in runs)
    counts = {row["seed"]: 0 for row in samples}
    for row in samples:
        assert row["label"] != row["class"]
        counts[row["seed"]] += 1
    assert all(count % 2 == 0 for count in counts.values())  # the same samples for both methods
    assert {row["method"] for row in theory} == {"ce", "smoothing"}
    assert (tmp_path / "out" / "dilation.png").stat().st_size > 10_000
    assert "eta 0.3" in capsys.readouterr().out


# Theory


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_of_a_gap_is_that_of_two_logits(kind: Any) -> None:
    gap = torch.linspace(-30, 30, 41, dtype=torch.float64)
    logits, label = torch.stack([gap, torch.zeros_like(gap)], 1), torch.zeros(41, dtype=torch.int64)
    if kind == "relaxation":
        expected = label_relaxation_loss(logits, label, alpha=0.2, reduction="none")
    else:
        smoothing = 0.2 if kind == "smoothing" else 0.0
        expected = F.cross_entropy(logits, label, label_smoothing=smoothing, reduction="none")
    assert loss_of(kind, 0.2)(gap.numpy()) == pytest.approx(expected.numpy(), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("kind", LOSSES)
def test_without_noise_free_features_come_to_the_configuration_of_the_model(kind: Any) -> None:
    """Features and weights from a random start, by L-BFGS-B: nothing of the derivation is used."""
    feature_decay, weight_decay, alpha = 4e-3, 1e-2, 0.1
    loss = loss_of(kind, alpha)

    def total(x: np.ndarray) -> float:
        features, weights = x[:4].reshape(2, 2), x[4:].reshape(2, 2)
        logits = features @ weights.T
        gaps = np.array([logits[0, 0] - logits[0, 1], logits[1, 1] - logits[1, 0]])
        decay = feature_decay * (features**2).sum(1).mean() + weight_decay * (weights**2).sum()
        return float(loss(gaps).mean() + decay)

    bounds = [(0, None)] * 4 + [(None, None)] * 4
    starts = np.random.default_rng(0)
    found = min(
        (
            minimize(total, starts.uniform(0.2, 1, 8), method="L-BFGS-B", bounds=bounds, tol=1e-14)
            for _ in range(6)
        ),
        key=lambda result: result.fun,
    )
    features, weights = found.x[:4].reshape(2, 2), found.x[4:].reshape(2, 2)
    gap = features[0] @ (weights[0] - weights[1])
    right = probability(kind, alpha, feature_decay * weight_decay)
    assert 1 / (1 + math.exp(-gap)) == pytest.approx(right, abs=1e-5)
    lengths = np.linalg.norm(features, axis=1)
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)
    assert features[0] @ features[1] == pytest.approx(0, abs=1e-3 * lengths[0] ** 2)
    assert weights[0] == pytest.approx(-weights[1], abs=1e-3)
    decay = math.sqrt(feature_decay * weight_decay)
    assert feature_decay * lengths[0] ** 2 == pytest.approx(decay * gap, rel=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_risk_is_that_of_the_whole_problem(kind: Any) -> None:
    """Matrices, softmax and a mean over the plane, instead of gaps along a line."""
    eta, alpha, decay_h, decay_w = 0.3, 0.15, 2e-3, 8e-3
    decay = decay_h * decay_w
    gap = math.log(probability(kind, alpha, decay) / (1 - probability(kind, alpha, decay)))
    a = math.sqrt(math.sqrt(decay) * gap / decay_h)
    b = gap / (math.sqrt(2) * a)
    features = a * torch.eye(2, dtype=torch.float64)
    weights = b * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    nodes, masses = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))
    masses = masses / masses.sum()
    plane = torch.cartesian_prod(nodes, nodes)
    mass = torch.cartesian_prod(masses, masses).prod(1)

    def mean(place: torch.Tensor, label: int, deviation: float) -> torch.Tensor:
        cloud = place + deviation / math.sqrt(2) * plane
        labels = torch.full((len(cloud),), label)
        if kind == "relaxation":
            loss = label_relaxation_loss(cloud @ weights.mT, labels, alpha=alpha, reduction="none")
        else:
            smoothing = alpha if kind == "smoothing" else 0.0
            loss = F.cross_entropy(cloud @ weights.mT, labels, label_smoothing=smoothing, reduction="none")
        return mass @ (loss + decay_h * cloud.square().sum(1))

    x, y, dilation = 0.4, 0.5, 0.35
    deviation = dilation * a * math.sqrt(2)
    moved = a * torch.tensor([[y, x], [x, y]], dtype=torch.float64)  # u_1, of class 2, and u_2, of class 1
    whole = sum(mean(features[k], k, deviation) + eta * mean(moved[k], k, deviation) for k in range(2))
    # A grid of sixty nodes integrates no softplus exactly, and less so the kink of relaxation.
    near = 5e-4 if kind == "relaxation" else 1e-7
    half = risk(kind, eta, decay, alpha)(np.array([x, y, dilation]))
    assert 2 * half == pytest.approx(float(whole), rel=near)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("eta", [0.05, 0.3])
def test_the_equilibrium_is_the_minimum(kind: Any, eta: float) -> None:
    """Another parametrization, without constraints, by another method from other starts."""
    slope, decay, alpha = 0.3, 1e-3, 0.1
    found = equilibrium(kind, eta=eta, slope=slope, decay=decay, alpha=alpha)
    value = risk(kind, eta, decay, alpha)

    def inside(free: np.ndarray) -> np.ndarray:
        dilation = free[0] ** 2
        reach = math.sqrt(2) * slope / eta * dilation * math.sin(free[1]) ** 2
        return np.array([abs(1 - reach * math.cos(free[2])), abs(reach * math.sin(free[2])), dilation])

    best = min(
        minimize(
            lambda free: value(inside(free)),
            start,
            method="Nelder-Mead",
            options={"fatol": 1e-13, "xatol": 1e-9},
        ).fun
        for start in ([0.5, 1.0, 0.7], [0.3, 0.5, 1.2])
    )
    assert found.value == pytest.approx(best, abs=1e-8)
    assert found.memorization <= slope * found.dilation * (1 + 1e-6)
    assert found.memorization == pytest.approx(eta * math.dist(found.point, (1, 0)) / math.sqrt(2))


def test_what_the_model_says_of_noise_and_losses() -> None:
    etas, options = (0.0, 0.05, 0.1, 0.2, 0.3), {"slope": 0.3, "decay": 1e-4}
    curves = {kind: [equilibrium(kind, eta=eta, **options) for eta in etas] for kind in LOSSES}
    for points in curves.values():
        for before, after in pairwise(points):
            assert after.memorization > before.memorization
            assert after.dilation > before.dilation
    for kind in ("smoothing", "relaxation"):
        for own, plain in zip(curves[kind][1:], curves["ce"][1:], strict=True):
            assert own.memorization < plain.memorization
            assert own.dilation < plain.dilation


def test_two_numbers_of_the_theory_are_read_off_and_the_rest_is_computed() -> None:
    """Rows that the model itself has made give its numbers back."""
    decay, slope = 4e-5, 0.25
    rows = []
    for method, alpha in (("ce", None), ("smoothing", 0.2)):
        for eta in (0.0, 0.1, 0.4):
            rate = eta / 2
            ratio, given = rate / (1 - rate), {"slope": slope, "decay": decay, "alpha": alpha or 0.0}
            point = equilibrium(method, eta=ratio, **given)
            rows.append({"method": method, "alpha": alpha, "eta": eta, "noise_rate": rate})
            rows[-1] |= {"probability_right_labels": probability("ce", 0.0, decay)}
            rows[-1] |= {"memorization_relative": point.memorization * (1 - rate)}
            rows[-1] |= {"dilation_relative": point.dilation}
    found = theory_rows([*rows, rows[0] | {"method": "fixed"}])
    assert [row["method"] for row in found] == ["ce"] * 3 + ["smoothing"] * 3
    for row, made in zip(found, rows, strict=True):
        assert row["decay"] == pytest.approx(decay)
        assert row["slope"] == pytest.approx(slope, rel=1e-5)
        assert row["memorization"] == pytest.approx(made["memorization_relative"], abs=1e-4)
        assert row["dilation"] == pytest.approx(made["dilation_relative"], abs=1e-3)
    assert theory_rows(rows[1:]) == []  # without noise there is nothing to read lambda from


def test_bad_input_of_the_theory_is_named() -> None:
    for name, options in {
        "eta": {"eta": -0.1},
        "slope": {"slope": 0.0},
        "decay": {"decay": 1.0},
    }.items():
        with pytest.raises(InvalidArgumentError, match=name):
            equilibrium("ce", **({"eta": 0.1, "slope": 0.3, "decay": 1e-4} | options))
    with pytest.raises(InvalidArgumentError, match="right"):
        decay_of(1.0)


# Resume and Ray


@pytest.mark.slow
def test_a_killed_study_ends_at_the_same_numbers(
    tmp_path: Path, killed: Callable[[str, Sequence[str], Path, int], None]
) -> None:
    common = [*SMALL, "--etas", "0.2", "0.4", "--methods", "ce", "nearest", "--epochs", "8"]
    common += ["--checkpoint-every", "3"]
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    broken = [*common, "--resume", "--out", str(tmp_path / "broken")]
    killed("label_noise", broken, tmp_path / "broken" / "checkpoints", 3)
    for name in ("runs", "samples"):
        whole, again = (rows_of(tmp_path / folder / f"{name}.csv") for folder in ("whole", "broken"))
        for row in (*whole, *again):
            row.pop("ms_per_step", None)
        assert whole == again


def command(folder: Path, *more: str) -> list[str]:
    own = ["--etas", "0.2", "--methods", "ce", "smoothing", "--epochs", "20", "--tune", "--trials", "4"]
    own += ["--out", str(folder), *more]
    return [sys.executable, str(EXAMPLES / "label_noise.py"), *SMALL, *own]


def family(process: int) -> list[Any]:
    psutil = pytest.importorskip("psutil")
    return psutil.Process(process).children(recursive=True)


def alive(processes: Sequence[Any]) -> list[Any]:
    return [child for child in processes if child.is_running() and child.status() != "zombie"]


@pytest.mark.slow
def test_a_killed_search_leaves_no_process_and_ends_at_the_same_choices(tmp_path: Path) -> None:
    pytest.importorskip("ray.tune", reason="pip install 'etflayers[sweeps]'")
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    quiet: dict[str, Any] = {"env": here, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "whole"), check=True, timeout=500, **quiet)

    process = subprocess.Popen(command(tmp_path / "broken"), **quiet)
    checkpoints = tmp_path / "broken" / "checkpoints"
    deadline = time.monotonic() + 300
    while len(list(checkpoints.glob("*.pt"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = family(process.pid)
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    while alive(children):
        assert time.monotonic() < deadline, alive(children)
        time.sleep(0.2)
    kept = {path: path.stat().st_mtime_ns for path in checkpoints.glob("*.pt")}
    finished = min(kept, key=lambda path: kept[path])

    again = subprocess.Popen(command(tmp_path / "broken", "--resume"), **quiet)
    assert again.wait(timeout=500) == 0
    assert finished.stat().st_mtime_ns == kept[finished]  # a trial that had finished was not run again
    for name in ("runs", "tuning"):
        whole, broken = (rows_of(tmp_path / folder / f"{name}.csv") for folder in ("whole", "broken"))
        for row in (*whole, *broken):
            del row["ms_per_step"]
        assert whole == broken
    choices = [json.loads((tmp_path / folder / "choices.json").read_text()) for folder in ("whole", "broken")]
    assert choices[0] == choices[1]
    trials = rows_of(tmp_path / "whole" / "tuning.csv")
    points = [[row["lr"] for row in trials if row["method"] == method] for method in ("ce", "smoothing")]
    assert points[0] == points[1]  # the same for all methods
    assert not any(name.startswith("test") for name in trials[0])
    for choice in choices[0]:
        same = [row for row in trials if row["method"] == choice["method"]]
        assert choice["lr"] == float(max(same, key=lambda row: float(row[METRIC]))["lr"])


@pytest.mark.slow
def test_ray_is_gone_afterwards() -> None:
    pytest.importorskip("ray.tune", reason="pip install 'etflayers[sweeps]'")
    before = os.environ.get("PYTHONPATH")
    with local_ray(1):
        children = family(os.getpid())
        assert alive(children)
    deadline = time.monotonic() + 60
    while alive(children):
        assert time.monotonic() < deadline, alive(children)
        time.sleep(0.2)
    assert os.environ.get("PYTHONPATH") == before


def test_optuna_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("noise.search.find_spec", lambda name: None)
    assert main([*SMALL, "--tune", "--search", "optuna", "--out", str(tmp_path)]) == 1
    assert "pip install optuna" in capsys.readouterr().err


@pytest.mark.slow
def test_optuna_proposes_trials(tmp_path: Path) -> None:
    pytest.importorskip("ray.tune", reason="pip install 'etflayers[sweeps]'")
    pytest.importorskip("optuna")
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    options = ("--search", "optuna", "--tune-epochs", "1", "--epochs", "1")
    subprocess.run(command(tmp_path, *options), env=here, check=True, timeout=500)
    assert len(rows_of(tmp_path / "tuning.csv")) == 8
