"""The sweep: what a trial is, what its table says, and that Ray Tune runs it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from sweep import UNCHANGED, SweepSettings, main, markdown, means, run_trial


def test_a_trial_changes_what_it_names() -> None:
    settings = SweepSettings(data="digits", lr=0.01)
    changed = settings.changed("scale 5, normalize, momentum None, head fixed")
    assert (changed.scale, changed.normalize, changed.momentum, changed.head) == (5.0, True, None, ("fixed",))
    assert (changed.data, changed.lr) == ("digits", 0.01)
    assert settings.changed(UNCHANGED).fingerprint() == settings.changed("momentum 0.1").fingerprint()
    settings.check()  # the default trials are all possible


def test_means_are_over_seeds_and_divergence_is_counted() -> None:
    rows = [
        {"trial": "a", "seed": 0, "diverged": False, "NC1 trace": 0.1, "test accuracy %": 90.0},
        {"trial": "a", "seed": 1, "diverged": False, "NC1 trace": 0.3, "test accuracy %": 91.0},
        {"trial": "b", "seed": 0, "diverged": False, "NC1 trace": 0.1, "test accuracy %": 90.0},
        {"trial": "b", "seed": 1, "diverged": True},
    ]
    first, second = means(rows)
    assert first["NC1 trace"] == pytest.approx(0.2)
    assert first["test accuracy %"] == pytest.approx(90.5)
    assert (first["diverged"], second["diverged"]) == (0, 1)
    assert "NC1 trace" not in second
    assert markdown([first, second]).splitlines()[2:] == ["| a | 0.2 | 90.50 |", "| b | 1 of 2 diverged |  |"]


def test_a_diverging_trial_is_a_finding(tmp_path: Path) -> None:
    settings = SweepSettings(data="digits", epochs=1, out=tmp_path, trials=("lr 1e30",))
    assert run_trial("lr 1e30", 0, settings) == {"trial": "lr 1e30", "seed": 0, "diverged": True}


def test_ray_runs_every_trial_once_for_each_seed(tmp_path: Path) -> None:
    pytest.importorskip("ray.tune", reason="pip install 'etflayers[sweeps]'")
    options = ("--data", "digits", "--epochs", "1", "--trials", "scale 2", "--out", str(tmp_path))
    assert main(options) == 0
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [(UNCHANGED, "0"), (UNCHANGED, "1"), ("scale 2", "0"), ("scale 2", "1")]
    assert [(row["trial"], row["seed"]) for row in rows] == expected
    assert all(float(row["test accuracy %"]) > 0 for row in rows)
    assert (tmp_path / "sweep.md").read_text().startswith("| change |")
