"""The landscape of the regularized model: one value of all minima, negative curvature elsewhere."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from etflayers.errors import InvalidArgumentError
from ufm import main
from unconstrained.landscape import Landscape, gradient_norm, landscape_rows, minimize

pytest.importorskip("cvxpy")

# Clarabel stops at a duality gap of 1e-8, absolute or relative: ten times that for infeasibility.
CONVEX = 1e-7


@pytest.fixture(scope="module", params=["ce", "mse"])
def rows(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = landscape_rows(Landscape(loss=request.param), (0, 1, 2))
    torch.set_num_threads(before)
    return found


def test_every_start_reaches_the_convex_optimum(rows: list[dict[str, Any]]) -> None:
    minima = [row for row in rows if row["rank"] == "free"]
    assert len(minima) == 3
    for row in minima:
        assert abs(row["gap"]) < CONVEX
        assert row["gradient_norm"] < 1e-8
        # The minima of f form a continuum, the rotations of one: zero is an eigenvalue, up to the gradient.
        assert abs(row["least_eigenvalue"]) < 1e-7
        assert row["collapse"] < 1e-5
    assert max(row["value"] for row in minima) - min(row["value"] for row in minima) < 1e-12


def test_other_critical_points_have_negative_curvature(rows: list[dict[str, Any]]) -> None:
    saddles = [row for row in rows if row["rank"] != "free"]
    assert [row["rank"] for row in saddles] == [0, 1, 2]
    for row in saddles:
        assert row["gradient_norm"] < 1e-8
        assert row["gap"] > 1e-2
        assert row["least_eigenvalue"] < -1e-3
        assert row["least_eigenvalue"] == pytest.approx(row["predicted_eigenvalue"], rel=1e-6)
    # At zero the gradient of the loss is known: singular values 1 / (K sqrt n), whatever the loss.
    assert saddles[0]["least_eigenvalue"] == pytest.approx(0.01 - 1 / (4 * math.sqrt(3)), rel=1e-3)


def test_cross_entropy_optimum_is_that_of_a_scalar_problem() -> None:
    """Among Z = t (I - 11'/K) repeated n times f is ``log(1 + (K-1) e^-t) + sqrt(lw lh) t (K-1) sqrt n``."""
    optimize = pytest.importorskip("scipy.optimize")
    landscape = Landscape(num_classes=3, per_class=2, dim=4, weight_decay=0.02, feature_decay=0.005)
    slope = math.sqrt(0.02 * 0.005) * 2 * math.sqrt(2)
    best = optimize.minimize_scalar(
        lambda t: math.log1p(2 * math.exp(-t)) + slope * t, bounds=(0, 20), method="bounded"
    )
    assert float(landscape.value(minimize(landscape, seed=3))) == pytest.approx(best.fun, abs=1e-9)


def test_restricted_start_stays_in_its_features() -> None:
    landscape = Landscape(num_classes=3, per_class=2, dim=4)
    point = minimize(landscape, seed=0, rank=1)
    weight, features, _ = landscape.unflatten(point)
    assert weight[:, :1].abs().max() > 0.1
    assert not weight[:, 1:].any()
    assert not features[1:].any()
    assert gradient_norm(landscape, point) < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 4}, "dim must be greater than K = 4"),
        ({"weight_decay": 1.0, "feature_decay": 1.0}, "or zero is the minimum"),
        ({"weight_decay": 0.0}, "must be positive"),
        ({"bias_decay": 0.0}, "bias_decay must be positive"),
    ],
)
def test_conditions_of_the_theorem(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Landscape(**options)


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--theory", "--seeds", "0", "--out", str(tmp_path)]) == 0
    with (tmp_path / "theory.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [(row["loss"], row["rank"]) for row in written] == [
        (loss, rank) for loss in ("ce", "mse") for rank in ("free", "0", "1", "2")
    ]
    assert "Critical points" in capsys.readouterr().out
