"""The study of many classes: its files, its heads, and that it continues to the same numbers."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from codes.training import CodeRun, Key, ManyClassesSettings, exists, make_head
from etflayers.nn import ClassMeanHead, FixedCodeHead, NearestCodeHead
from lab.data import load
from many_classes import main

pytest.importorskip("scipy")

SMALL = ["--classes", "30", "--image-size", "8", "--epochs", "2", "--settle", "1", "--batch-size", "16"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the glyphs are drawn once."""
    return tmp_path_factory.mktemp("glyphs")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_all_heads_from_the_command_line(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--features", "7", "16", "--out", str(tmp_path), "--data-dir", str(data_dir)]
    assert main(arguments) == 0
    runs, summary = rows_of(tmp_path / "runs.csv"), rows_of(tmp_path / "summary.csv")
    assert len(runs) == 2 * 2 * 6
    assert {row["method"] for row in summary} == set(ManyClassesSettings().methods)
    for row in runs:
        # The test set is looked at once, at the end.
        assert (row["test_accuracy"] != "") == (row["epoch"] == "2")
        assert (row["cosine_of_refit"] != "") == (row["method"] == "code-arranged" and row["epoch"] == "1")
    free = {row["method"]: float(row["head_megabytes"]) for row in summary if row["features"] == "16"}
    assert free["code"] < 1e-5 < free["class-means"] < free["linear"]  # one number that remembers a device
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert "30 classes of glyphs" in capsys.readouterr().out


def test_roots_need_enough_pairs() -> None:
    assert exists("roots", 6, 30)
    assert not exists("roots", 5, 30)
    assert exists("code", 5, 30)


@pytest.mark.slow
def test_one_body_for_all_heads_and_one_code_for_all_seeds(tmp_path: Path, data_dir: Path) -> None:
    settings = ManyClassesSettings(classes=30, image_size=8, data_dir=data_dir, out=tmp_path)
    data = load(settings)
    bodies = [CodeRun(Key(method, 7, 3), settings, data).model.body for method in ("linear", "class-means")]
    for ours, theirs in zip(*(body.parameters() for body in bodies), strict=True):
        assert torch.equal(ours, theirs)
    words = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        head = make_head(Key("code", 7, seed), 30, settings)
        assert isinstance(head, FixedCodeHead)
        words.append(head.frame)
    assert torch.equal(*words)
    assert list(tmp_path.glob("code-30-7.safetensors"))
    assert isinstance(make_head(Key("class-means", 7, 0), 30, settings), ClassMeanHead)
    assert isinstance(make_head(Key("code-arranged", 7, 0), 30, settings), NearestCodeHead)


@pytest.mark.slow
def test_a_killed_study_ends_at_the_same_numbers(
    tmp_path: Path, data_dir: Path, killed: Callable[[str, Sequence[str], Path, int], None]
) -> None:
    common = [*SMALL, "--features", "7", "--methods", "linear", "code-arranged", "--checkpoint-every", "3"]
    common += ["--data-dir", str(data_dir)]
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    broken = [*common, "--resume", "--out", str(tmp_path / "broken")]
    killed("many_classes", broken, tmp_path / "broken" / "checkpoints", 2)
    whole, again = (rows_of(tmp_path / name / "runs.csv") for name in ("whole", "broken"))
    for row in (*whole, *again):
        del row["ms_per_step"]
    assert whole == again
