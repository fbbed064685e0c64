"""A run that is killed at any moment continues to the numbers of an unbroken one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from etflayers.errors import InvalidArgumentError, NonFiniteError
from lab import files
from lab.classifiers import Trained, train
from lab.data import load
from lab.settings import Settings
from train_heads import main

RUN = ("--data", "digits", "--head", "nearest", "learned", "--epochs", "3")
RUN += ("--batch-size", "32", "--shift", "1")


def states(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: torch.load(path, weights_only=True) for path in (folder / "checkpoints").glob("*")}


def without_clock(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_numbers(tmp_path: Path, killed: Callable[..., None]) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main([*RUN, "--out", str(unbroken)]) == 0
    run = [*RUN, "--checkpoint-every", "3", "--resume", "--out", str(broken)]
    killed("train_heads", run, broken / "checkpoints", 6)
    expected, got = states(unbroken), states(broken)
    assert got.keys() == expected.keys() == {"nearest-seed0.pt", "learned-seed0.pt"}
    for name, state in expected.items():
        for part in ("model", "optimizer0", "random", "snapshots", "step"):
            torch.testing.assert_close(got[name][part], state[part], rtol=0, atol=0, msg=f"{name}: {part}")
        assert without_clock(got[name]["history"]) == without_clock(state["history"])
    assert not list((broken / "checkpoints").glob(".*"))


def train_fixed(folder: Path, **options: Any) -> Trained:
    settings = Settings(data="digits", epochs=1, out=folder, **options)
    return train("fixed", 0, settings, load(settings))


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "fixed-seed0.pt"
    first = train_fixed(tmp_path)
    before = checkpoint.stat().st_mtime_ns
    assert train_fixed(tmp_path, resume=True).history == first.history
    assert checkpoint.stat().st_mtime_ns == before
    train_fixed(tmp_path)
    assert checkpoint.stat().st_mtime_ns > before


def test_run_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    train_fixed(tmp_path)
    with pytest.raises(InvalidArgumentError, match=r"lr was 0.05, is 0.01"):
        train_fixed(tmp_path, lr=0.01, resume=True)


def test_an_earlier_run_is_not_revived(tmp_path: Path) -> None:
    """Without --resume a new run forgets the checkpoint in its place before its first step."""
    train_fixed(tmp_path)
    with pytest.raises(NonFiniteError, match="diverged"):
        train_fixed(tmp_path, lr=1e30)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_write_leaves_the_old_file_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file.json"
    files.write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="power cut"):
            files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
