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
OPTIONAL = (
    "cvxpy",
    "cvxpylayers",
    "geoopt",
    "matplotlib",
    "mlxtend",
    "PIL",
    "pymanopt",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "torchmetrics",
    "triton",
    "tyro",
)


KERNELS = {f"etflayers.kernels.{name}.triton" for name in ("class_sums", "cross_entropy", "polar")}


def run_fresh(program: str) -> str:
    """Run ``program`` in an interpreter that has imported nothing yet, and return what it prints."""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_module_imports_without_the_optional_dependencies() -> None:
    imported = run_fresh(
        f"""
import importlib, pkgutil, sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # from here on, importing it raises ImportError
import etflayers
for module in pkgutil.walk_packages(etflayers.__path__, "etflayers."):
    if not module.name.endswith(".triton"):  # the kernels themselves
        print(importlib.import_module(module.name).__name__)
"""
    )
    assert {"etflayers.functional", "etflayers.nn", "etflayers.testing"} <= set(imported.split())


def test_import_loads_no_optional_dependency() -> None:
    # A blocked import could be caught and hidden, so look at what a plain import adds where all is installed.
    added = run_fresh(
        """
import sys, numpy, torch
before = set(sys.modules)
import etflayers
print(*(set(sys.modules) - before))
"""
    )
    assert "etflayers" in added.split()
    # PyTorch's own compiler loads Triton where it is installed; the test above knows how to do without.
    unwanted = {*OPTIONAL, "etflayers.testing", *KERNELS} - {"triton"}
    assert not set(added.split()) & unwanted


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
