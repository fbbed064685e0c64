"""The GPU benchmarks: what they check without being timed, and the command."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.ceilings import ceilings
from benchmarks.report import Report

SUITES = ("ceilings", "class_sums", "cross_entropy")


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every rival once and say that it took a second."""

    def eager(rivals: Mapping[str, Callable[[], object]], **_: object) -> dict[str, list[float]]:
        return {name: [1.0 for _ in range(3) if call() is not None] for name, call in rivals.items()}

    def graph(rivals: Mapping[str, Sequence[Callable[[], object]]], **_: object) -> dict[str, list[float]]:
        return eager({name: calls[0] for name, calls in rivals.items()})

    ceilings.cache_clear()
    for name in SUITES:
        suite = importlib.import_module(f"benchmarks.gpu.{name}")
        for function, fake in [
            ("eager_seconds", eager),
            ("graph_seconds", graph),
            ("peak_bytes", lambda _: 1),
        ]:
            if hasattr(suite, function):
                monkeypatch.setattr(suite, function, fake)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("name", SUITES)
def test_every_rival_is_right(name: str) -> None:
    report: Report = importlib.import_module(f"benchmarks.gpu.{name}").run(quick=True)
    assert report.tables
    assert not report.failures, report.failures
    assert bool(report.checks) == (name != "ceilings")


def test_without_a_gpu_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 1
    assert capsys.readouterr().out == "no CUDA device: the GPU benchmarks were not run\n"


@pytest.mark.usefixtures("untimed")
def test_results_are_written_per_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(command, "_device", lambda: {"GPU": "H100"})
    monkeypatch.setattr(command, "importlib", _QuickSuites)
    for name in ("class_sums", "cross_entropy"):
        assert command.main(["--only", name, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu-h100-80gb-hbm3.json").read_text())
    assert set(record) == {"class sums", "cross-entropy"}
    text = (tmp_path / "gpu-h100-80gb-hbm3.md").read_text()
    assert text.startswith("# Measured on a GPU: NVIDIA H100 80GB HBM3\n")
    assert "## class sums" in text
    assert "## cross-entropy" in text


class _QuickSuites:
    @staticmethod
    def import_module(name: str) -> object:
        suite = importlib.import_module(name)
        return type("Suite", (), {"run": staticmethod(lambda quick: suite.run(True))})


@pytest.mark.gpu
def test_the_command_runs_on_a_gpu(tmp_path: Path) -> None:
    assert command.main(["--quick", "--only", *SUITES, "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
