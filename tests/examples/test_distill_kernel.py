"""Kernel inducing points: learned sets against their start, parts against plain formulas, resume, files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.ndimage import rotate

from distillation.common import first_set, random_lesson, squared_error
from distillation.inducing import Inducing, make_loop, with_solved_labels
from distillation.kernel import full_accuracy, learn_kernel_set
from distillation.kernel_settings import KernelSettings
from distillation.view import View
from etflayers.distill import DistilledSet, accuracy, centered_one_hot, teach
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.storage import read_tensors
from lab.data import ImageData, load_inputs


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_inputs(KernelSettings(data="digits"))


def made(kind: str, count: int, data: ImageData) -> DistilledSet:
    return first_set(kind, count, data, torch.Generator().manual_seed(0), labels="centered")


def small(**options: Any) -> KernelSettings:
    return KernelSettings(**{"data": "digits", "outer_batch": 100, "outer_steps": 25, **options})


def learn(settings: KernelSettings, size: int, seed: int, data: ImageData, *kept: Any) -> Inducing:
    """A learned set; kept: the name of its checkpoint, and what is told of each step."""
    run = Inducing(settings, size, seed, data)
    if kept:
        run.learn(*kept)
    else:
        run.finish()
    return run


def error_of(settings: KernelSettings, distilled: DistilledSet, data: ImageData) -> float:
    outputs = make_loop(settings, data).predict(data.train.images, distilled.inputs, distilled.labels)
    return float((outputs - centered_one_hot(data.train.targets, 10)).square().sum(-1).mean())


@pytest.mark.parametrize("labels", ["fixed", "learned", "solved"])
def test_learned_set_is_better_than_its_start(labels: Any, digits: ImageData) -> None:
    settings = small(labels=labels)
    learned = learn(settings, 1, 0, digits)
    start = made("kmeans", 1, digits)
    if labels == "solved":
        start = with_solved_labels(make_loop(settings, digits), start, digits.train)
    # 25 steps are the beginning of learning; a set that stood still would keep all of its error.
    assert error_of(settings, learned.distilled, digits) < 0.9 * error_of(settings, start, digits)
    hot = centered_one_hot(torch.arange(10), 10)
    assert torch.equal(learned.distilled.labels.detach(), hot) == (labels == "fixed")
    assert [row["step"] for row in learned.history] == list(range(25))


def test_predictions_are_those_of_linear_ridge_regression(digits: ImageData) -> None:
    settings = small(kernel="linear", bias_variance=0.0, ridge=0.1)
    real = made("real", 1, digits)
    s, y = (value.detach().double().flatten(1).numpy() for value in (real.inputs, real.labels))
    x = digits.test.images.double().flatten(1).numpy()
    penalty = 0.1 * np.square(s).sum() / len(s)
    weight = np.linalg.solve(s.T @ s + penalty * np.eye(s.shape[1]), s.T @ y)
    found = make_loop(settings, digits).predict(digits.test.images, real.inputs, real.labels)
    np.testing.assert_allclose(found.numpy(), x @ weight, rtol=1e-4, atol=1e-5)  # labels come in float32


@pytest.mark.parametrize("kernel", ["nngp", "rbf"])
def test_other_kernels_learn(kernel: Any, digits: ImageData) -> None:
    settings = small(kernel=kernel, outer_steps=10)
    start = made("kmeans", 1, digits)
    learned = learn(settings, 1, 0, digits).distilled
    assert error_of(settings, learned, digits) < error_of(settings, start, digits)


def test_gradient_needs_none_through_the_best_labels(digits: ImageData) -> None:
    """Labels solved inside the graph, or these labels detached: the loss has one gradient."""
    loop = make_loop(small(), digits)
    real = made("real", 1, digits)
    support = real.inputs.detach().double().requires_grad_()
    inputs = digits.train.images[:60].double()
    targets = centered_one_hot(digits.train.targets[:60], 10, dtype=torch.float64)
    labels = loop.solve_labels(inputs, targets, support)
    gradients = [
        torch.autograd.grad((loop(inputs, support, chosen) - targets).square().sum(), support)[0]
        for chosen in (labels.detach(), labels)
    ]
    torch.testing.assert_close(
        gradients[0], gradients[1], rtol=1e-6, atol=1e-8 * gradients[0].abs().max().item()
    )


def test_batches_are_shifted_images(digits: ImageData, holds_shifted_images: Callable[..., None]) -> None:
    run = Inducing(small(shift=2, outer_batch=8), 1, 0, digits)
    holds_shifted_images(digits, run.generator, run.batch, 2)


def test_batches_are_turned_and_mirrored_images(digits: ImageData) -> None:
    run = Inducing(small(rotation=30.0, flip=True, outer_batch=8), 1, 0, digits)
    state = run.generator.get_state()
    inputs, classes = run.batch()
    replay = torch.Generator()
    replay.set_state(state)
    originals, targets = digits.train.batch(8, replay)
    angles = 30 * (2 * torch.rand(8, generator=replay) - 1)
    flips = torch.rand(8, generator=replay) < 0.5
    assert torch.equal(classes, targets)
    black = float(-digits.mean / digits.deviation)
    for image, original, angle, flip in zip(inputs, originals, angles, flips, strict=True):
        expected = (
            rotate((original[0] - black).numpy(), float(angle), reshape=False, order=1, mode="grid-constant")
            + black
        )
        if flip:
            expected = expected[:, ::-1]
        torch.testing.assert_close(image[0], torch.from_numpy(expected.copy()), rtol=0, atol=1e-4)


def test_whitening_leaves_the_training_images_with_a_known_covariance(digits: ImageData) -> None:
    view = View(digits, 0.1)
    rows = digits.train.images.flatten(1).double()
    covariance = torch.cov(rows.T, correction=0)
    values = torch.linalg.eigvalsh(covariance)
    expected = values / (values + 0.1 * covariance.trace() / 64)
    whitened = view.data.train.images.flatten(1).double()
    found = torch.linalg.eigvalsh(torch.cov(whitened.T, correction=0))
    torch.testing.assert_close(found, expected.sort().values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-5)
    # The test images were not looked at: they go through the map of the training images.
    fewer = replace(digits, test=digits.test.where(digits.test.targets < 3))
    assert torch.equal(View(fewer, 0.1).data.train.images, view.data.train.images)


def test_whitened_images_are_changed_and_shown_as_they_were(digits: ImageData) -> None:
    plain, view = View(digits), View(digits, 0.1)
    near = {"rtol": 1e-4, "atol": 1e-4}
    assert view.whitening is not None
    images, inputs = digits.test.images[:5], view.data.test.images[:5]
    torch.testing.assert_close(view.whitening.undone(inputs), images, **near)

    def change(images: torch.Tensor) -> torch.Tensor:
        return images.roll(1, -1)

    expected = view.whitening(plain.changed(images, [change]))
    torch.testing.assert_close(view.changed(inputs, [change]), expected, **near)
    sets = [
        first_set("real", 1, v.data, torch.Generator().manual_seed(0), labels="one-hot")
        for v in (plain, view)
    ]
    torch.testing.assert_close(plain.shown(sets[0]), view.shown(sets[1]), **near)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "conv-ntk", "depth": 2, "parametrization": "standard", "zca": 0.1},
        pytest.param(
            {"kernel": "conv-nngp", "depth": 1, "pool_after": (1,), "readout": "average"},
            marks=pytest.mark.slow,
        ),
        {"kernel": "ntk", "parametrization": "standard", "kernel_width": 64},
    ],
    ids=lambda options: options["kernel"],
)
def test_wide_networks_learn(options: dict[str, Any], digits: ImageData) -> None:
    settings = small(outer_steps=8, **options)
    view = View(digits.resized(4), settings.zca)
    start, part = made("kmeans", 1, view.data), view.data.train.where(torch.arange(300))
    run = Inducing(settings, 1, 0, view.data, view)
    run.finish()
    errors = [error_of(settings, found, replace(view.data, train=part)) for found in (start, run.distilled)]
    assert errors[1] < errors[0]


def test_the_kernel_of_all_images_is_left_out_where_it_costs_too_much(digits: ImageData) -> None:
    few = replace(digits, train=digits.train.where(torch.arange(20)), test=digits.test.where(torch.arange(5)))
    settings = small(kernel="conv-nngp", depth=1, readout="average")
    assert full_accuracy(settings, few) is not None  # 20^2 x 64^2 numbers
    assert full_accuracy(settings, digits) is None  # 1437^2 x 64^2


def test_kernel_of_all_images_classifies(digits: ImageData) -> None:
    found = full_accuracy(small(), digits)
    assert found is not None
    assert found > 0.97  # scikit-learn's nearest neighbor on these digits has 0.98


def test_network_learns_the_labels_it_is_given(digits: ImageData) -> None:
    centers = made("kmeans", 2, digits)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )
    lesson = random_lesson(
        *centers.dataset().tensors, 7, 300, "adam", seed=0
    )  # 7 does not divide the 20 images
    trained = teach(model, lesson.scaled(1e-2), loss=squared_error)
    with torch.no_grad():
        outputs = trained(centers.inputs)
    labels = centers.labels.detach()
    assert float((outputs - labels).square().sum(-1).mean()) < 0.01 * float(labels.square().sum(-1).mean())
    assert accuracy(outputs, labels.argmax(-1)) == {"accuracy": 1}


def test_sgd_has_momentum_and_an_l2_penalty() -> None:
    rule, rates = small(l2=0.1, sgd_rates=(0.5,)).training_rule("sgd")
    assert rates == (0.5,)
    assert callable(rule)
    model, generator = torch.nn.Linear(3, 2, bias=False).double(), torch.Generator().manual_seed(0)
    inputs, labels = (
        torch.randn(4, 3, generator=generator).double(),
        torch.randn(4, 2, generator=generator).double(),
    )
    weight, velocity = model.weight.detach().clone(), torch.zeros(2, 3, dtype=torch.float64)
    lesson = random_lesson(inputs, labels, 4, 3, rule, seed=0).scaled(0.1)
    teach(model, lesson, loss=squared_error)
    for rate in lesson.rates.tolist():
        gradient = 2 * (inputs @ weight.T - labels).T @ inputs / 4 + 0.1 * weight
        velocity = 0.9 * velocity + gradient
        weight -= rate * velocity
    torch.testing.assert_close(model.weight.detach(), weight)


@pytest.mark.parametrize("labels", ["learned", "solved"])
def test_resumed_run_ends_with_the_same_set(labels: Any, digits: ImageData, tmp_path: Path) -> None:
    options = {"labels": labels, "outer_steps": 7, "checkpoint_every": 2, "resume": True, "out": tmp_path}
    settings = small(shift=1, **options)
    whole = learn(settings, 2, 3, digits)

    def kill(step: int, *_: object) -> None:
        if step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        learn(settings, 2, 3, digits, "run", kill)
    steps: list[int] = []
    continued = learn(settings, 2, 3, digits, "run", lambda step, *_: steps.append(step))
    assert steps == [4, 5, 6, 7]
    assert continued.history == whole.history
    for name, value in whole.distilled.state_dict().items():
        assert torch.equal(continued.distilled.state_dict()[name], value)
    steps.clear()
    learn(settings, 2, 3, digits, "run", lambda step, *_: steps.append(step))
    assert steps == [7]  # a finished run is not done again
    with pytest.raises(InvalidArgumentError, match=r"shift was 1, is 0"):
        learn(replace(settings, shift=0), 2, 3, digits, "run")


def test_outputs(tmp_path: Path) -> None:
    settings = small(
        per_class=(1, 2),
        outer_steps=2,
        draws=2,
        networks=("mlp",),
        evaluations=1,
        training_steps=2,
        rate_grid=(1e-3,),
        optimizers=("adam", "sgd"),
        sgd_rates=(1e-2,),
        zca=0.1,
        out=tmp_path,
    )
    rows = learn_kernel_set(settings, Console(quiet=True))
    with (tmp_path / "sets.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["test_accuracy"]) for row in written] == [row["test_accuracy"] for row in rows]
    # For each of two sizes: the learned set, 2 draws, means and centers, with 2 kinds of labels; 3 networks
    # of each of two optimizers.
    assert len(rows) == 2 * (5 * 2 + 3 * 2)
    assert {row["learner"] for row in rows} == {"kernel", "mlp", "mlp by SGD"}
    content = json.loads((tmp_path / "summary.json").read_text())
    best = [
        row for row in content["summary"] if row["images"] == "random images" and row["learner"] == "kernel"
    ]
    assert {row["sets"] for row in best} == {2}
    loaded = DistilledSet.load(tmp_path / "2-a-class-seed0.safetensors")
    assert loaded.inputs.shape == (20, 1, 8, 8)
    assert loaded.metadata["seed"] == 0
    tensors, record = read_tensors(tmp_path / "whitening.safetensors")
    assert record["kind"] == "whitening"
    torch.testing.assert_close(tensors["matrix"] @ tensors["inverse"], torch.eye(64, dtype=torch.float64))
    for name in ("accuracy", "learning", "1-a-class-seed0"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert learn_kernel_set(replace(settings, resume=True), Console(quiet=True)) == rows


def test_divergence_is_an_error(digits: ImageData) -> None:
    run = Inducing(small(), 1, 0, digits)
    run.loop.forward = lambda inputs, support, labels: torch.full((len(inputs), 10), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="take a smaller --image-rate"):
        run.advance()
