"""``python -m etflayers`` tells what a bug report needs, whatever is broken on the machine."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

import etflayers
import etflayers.__main__ as report
from etflayers.__main__ import OptionalPackage, main, probe
from etflayers.errors import InvalidArgumentError
from etflayers.kernels import describe

# Modules that end an import in every way there is.
BROKEN = {
    "sound": "print('loud'); import sys; sys.stdout.flush()",
    "raises": "raise RuntimeError('built for\\nanother PyTorch')",
    "exits": "raise SystemExit(3)",
    "lacks": "import a_part_that_is_missing",
    "dies": "import os; os._exit(7)",
    "after": "",
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules above, where a new interpreter finds them."""
    for name, source in {**BROKEN, "hangs": "import time; time.sleep(60)"}.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("broken")
def test_each_import_is_told_however_it_ends() -> None:
    assert probe([*BROKEN, "absent.part"]) == {
        "sound": "imports",
        "raises": "fails: RuntimeError: built for another PyTorch",
        "exits": "fails: SystemExit: 3",
        "lacks": "fails: ModuleNotFoundError: No module named 'a_part_that_is_missing'",
        "dies": "fails: Python ends with exit status 7",
        "after": "imports",
        "absent.part": "not installed",
    }


@pytest.mark.usefixtures("broken")
def test_an_import_that_never_returns_is_given_up() -> None:
    assert probe(["hangs"], timeout=1) == {"hangs": "fails: takes more than 1 s"}


@pytest.mark.usefixtures("broken")
def test_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    packages = {
        "torch": OptionalPackage("raises", "ood"),
        "absent": OptionalPackage("absent", "ood, triton"),
    }
    for line in report.report(packages):
        print(line)
    text = capsys.readouterr().out
    assert f"etflayers {etflayers.__version__}, PyTorch {torch.__version__}, NumPy" in text
    assert "TRITON_INTERPRET=0" in text
    assert f"cpu: {report.platform.machine()}, {torch.backends.cpu.get_cpu_capability()}" in text
    for num_classes, in_features in ((10, 512), (100, 512), (1000, 2048)):
        choice = describe(
            "polar", device="cpu", dtype=torch.float32, num_classes=num_classes, in_features=in_features
        )
        (line,) = (x for x in text.splitlines() if "polar" in x and f"K={num_classes} " in x and "cpu" in x)
        assert line.endswith(str(choice))
    lines = [line.split(maxsplit=2) for line in text.splitlines()[-2:]]
    # Not torch.__version__: to that, builds for CUDA add theirs.
    installed = importlib.metadata.version("torch")
    assert lines[0] == ["torch", installed, "fails: RuntimeError: built for another PyTorch"]
    assert lines[1] == ["absent", "-", "not installed (in the extra ood, triton)"]


def test_a_part_that_cannot_be_told_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("driver too old")

    for module, name in ((torch.accelerator, "is_available"), (report, "probe")):
        monkeypatch.setattr(module, name, refuse)
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("  could not be told: RuntimeError: driver too old") == 3  # devices, paths, packages
    assert any(line.startswith("  cpu: ") for line in lines)


def test_every_operation_with_a_choice_is_told() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        describe("none", device="cpu", dtype=torch.float32, num_classes=10)
    assert f"op must be one of {', '.join(map(repr, report._OPERATIONS))}, got" in str(refused.value)
