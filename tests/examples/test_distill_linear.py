"""The linear case: the experiment against its bound, which has its own tests in tests/distill."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from distillation import linear as module
from distillation.linear import LinearSet, LinearSettings, learn, linear_case, make_task
from etflayers.distill import LinearTask
from etflayers.errors import InvalidArgumentError
from lab.data import load


def random_task(dim: int = 4, deviation: float = 0.7) -> LinearTask:
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(0.5, 2, dim, dtype=torch.float64)
    inputs = torch.randn(30, dim, generator=generator, dtype=torch.float64) * scales
    return LinearTask(inputs, torch.randn(30, generator=generator, dtype=torch.float64), deviation)


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
