"""What a user gets from `pip install etflayers`: the package alone, typed, on PyTorch and NumPy alone."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import etflayers

ROOT = Path(__file__).parents[1]


def test_only_torch_and_numpy_are_required() -> None:
    requirements = importlib.metadata.requires("etflayers") or []
    names = {re.match(r"[\w-]+", line)[0] for line in requirements if "extra ==" not in line}
    assert names == {"torch", "numpy"}


def test_wheel_holds_the_typed_package_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"etflayers-{etflayers.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "etflayers").rglob("*.py")}
    assert packed == sources | {"etflayers/py.typed"}


def test_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == etflayers.__version__
