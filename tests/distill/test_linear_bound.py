"""How well M images can serve a linear model: the bound against other ways to the least excess."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from etflayers.distill import SGD, LinearTask, unrolled_inner_loop
from etflayers.errors import InvalidArgumentError


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

    def squared_errors(model: torch.nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        error: Tensor = model(images) - targets.unsqueeze(-1)
        return 0.5 * error.square().mean(0).sum()

    trained = unrolled_inner_loop(
        model,
        {"weight": starts},
        images[None],
        (images @ task.best)[None],
        lr=rate,
        loss=squared_errors,
        optimizer=SGD(),
    )
    excess = task.excess(trained.params["weight"])
    error = float(excess.std()) / len(starts) ** 0.5
    assert abs(float(excess.mean()) - task.principal(count)) < 4 * error  # a chance of 1e-4, and a fixed seed


def test_points_and_targets_must_fit() -> None:
    with pytest.raises(InvalidArgumentError, match=r"targets \(N,\)"):
        LinearTask(torch.zeros(3, 2), torch.zeros(2), 1.0)
