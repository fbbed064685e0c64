"""The linear case: its bound against other ways to the least excess, and the experiment against its bound."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from distillation import linear as module
from distillation.linear import LinearSet, LinearSettings, learn, linear_case, make_task
from distillation.theory import LinearTask
from etflayers.distill import SGD, unrolled_inner_loop
from etflayers.errors import InvalidArgumentError
from lab.data import load


def random_task(dim: int = 4, deviation: float = 0.7) -> LinearTask:
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(0.5, 2, dim, dtype=torch.float64)
    inputs = torch.randn(30, dim, generator=generator, dtype=torch.float64) * scales
    return LinearTask(inputs, torch.randn(30, generator=generator, dtype=torch.float64), deviation)


def least_excess(task: LinearTask, span: np.ndarray) -> float:
    """Least expected excess of ``theta_0 + v`` over v in a span, written as two least-squares problems.

    The best v is a linear function of theta_0 - theta*: in expectation, each direction of theta_0 counts with
    s^2 and theta* once.
    """
    root = np.linalg.cholesky(task.covariance.numpy()).T
    total = 0.0
    for column in (*(task.deviation * np.eye(task.dim)), task.best.numpy()):
        target = root @ column
        solution, *_ = np.linalg.lstsq(root @ span, target, rcond=None)
        total += 0.5 * float(np.sum((target - root @ span @ solution) ** 2))
    return total


def test_excess_is_the_difference_of_the_losses() -> None:
    task = random_task()
    theta = torch.randn(3, task.dim, dtype=torch.float64)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return 0.5 * (rows @ task.inputs.mT - task.targets).square().mean(-1)

    torch.testing.assert_close(
        task.excess(theta), loss(theta) - loss(task.best[None]), rtol=1e-12, atol=1e-12
    )


def test_bound_is_below_every_span_and_met_by_the_best() -> None:
    task = random_task()
    random = np.random.RandomState(0)
    for count in (1, 2, 3):
        found = [least_excess(task, random.randn(task.dim, count)) for _ in range(50)]
        assert task.bound(count) <= min(found)
        # The span that attains it: the first eigenvectors of G, taken back through C^{1/2}.
        values, vectors = np.linalg.eigh(task.covariance.numpy())
        root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
        best = task.best.numpy()
        moment = task.deviation**2 * np.eye(task.dim) + np.outer(best, best)
        leading = np.linalg.eigh(root @ moment @ root)[1][:, -count:]
        assert least_excess(task, np.linalg.solve(root, leading)) == pytest.approx(
            task.bound(count), rel=1e-10
        )
    assert task.bound(task.dim) == task.principal(task.dim) == 0


def test_one_step_on_principal_images_reaches_what_is_said() -> None:
    """The set of the derivation, trained on by the library's inner loop from many starts."""
    task, count, rate = random_task(), 2, 0.3
    _, vectors = torch.linalg.eigh(task.covariance)
    images = (count / rate) ** 0.5 * vectors[:, -count:].mT
    starts = task.deviation * torch.randn(100_000, task.dim, dtype=torch.float64)
    model = torch.nn.Linear(task.dim, len(starts), bias=False, dtype=torch.float64)
    trained = unrolled_inner_loop(
        model,
        {"weight": starts},
        images[None],
        (images @ task.best)[None],
        lr=rate,
        loss=module.squared_errors,
        optimizer=SGD(),
    )
    excess = task.excess(trained.params["weight"])
    error = float(excess.std()) / len(starts) ** 0.5
    assert abs(float(excess.mean()) - task.principal(count)) < 4 * error  # a chance of 1e-4, and a fixed seed


@pytest.mark.parametrize("case", ["one-step", "repeated", "in-turn"])
def test_affine_map_is_that_of_the_steps(case: module.CaseName) -> None:
    learned = LinearSet(case, 3, 5, 2, torch.Generator().manual_seed(0))
    matrix, offset = learned.affine_map()
    start = torch.randn(5, dtype=torch.float64)
    theta = start.clone()
    rates = learned.log_rates.detach().exp()
    images, targets = learned.images.detach(), learned.targets.detach()
    parts = range(3) if case == "in-turn" else [slice(None)] * len(rates)
    for rate, part in zip(rates, parts, strict=True):
        x, y = images[part].view(-1, 5), targets[part].view(-1)
        theta = theta - rate / len(x) * x.mT @ (x @ theta - y)
    torch.testing.assert_close(matrix @ start + offset, theta, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["one-step", "repeated", "in-turn"])
def test_learning_comes_to_the_least_excess_and_to_zero(case: module.CaseName) -> None:
    """In the plane: one image spans a line, and the best of all lines is found by trying them."""
    settings = LinearSettings(steps=200, repeats=2)
    task = random_task(dim=2)
    angles = torch.linspace(0, torch.pi, 10_001, dtype=torch.float64)
    lines = torch.stack([angles.cos(), angles.sin()], -1)
    covariance, best = task.covariance, task.best
    along = ((lines @ covariance) * lines).sum(-1)
    spread = task.deviation**2 * (covariance.trace() - along)
    offset = best @ covariance @ best - (lines @ covariance @ best).square() / along
    least = 0.5 * float((spread + offset).min())
    assert task.bound(1) <= least <= task.principal(1)
    # 200 steps with 32 random starts each leave that much noise; the worst line is 5 times as bad.
    assert learn(case, 1, 0, task, settings) == pytest.approx(least, rel=2e-3)
    assert learn(case, 2, 0, task, settings) < 1e-3 * task.untrained


def test_known_start_needs_one_image() -> None:
    task = random_task(dim=3)
    assert learn("known-start", 1, 0, task, LinearSettings(steps=150)) < 1e-6 * task.untrained


def test_outputs_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LinearSettings(side=2, steps=5, starts=4, images=(1, 4), seeds=(0, 1), repeats=2, out=tmp_path)
    rows = linear_case(settings, Console(quiet=True))
    task = make_task(settings, load(settings))
    assert task.dim == 4
    assert len(rows) == 4 * 2 * 2
    with (tmp_path / "linear.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["excess"]) for row in written] == [row["excess"] for row in rows]
    assert json.loads((tmp_path / "linear.json").read_text())["settings"]["side"] == 2
    assert (tmp_path / "linear.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(module, "learn", lambda *_: pytest.fail("a finished training is not done again"))
    assert linear_case(replace(settings, resume=True), Console(quiet=True)) == rows
    with pytest.raises(InvalidArgumentError, match="steps was 5, is 6"):
        linear_case(replace(settings, resume=True, steps=6), Console(quiet=True))


def test_more_pixels_than_there_are() -> None:
    with pytest.raises(InvalidArgumentError, match="--side 9 is more than the 8 pixels"):
        make_task(LinearSettings(side=9), load(LinearSettings()))
