"""The files that go to a package index: what they hold, and that they do alone what README says of them."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import etflayers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SHIPPED = ("benchmarks", "docs", "etflayers", "examples", "tests")  # the folders of the source distribution
CACHES = {"__pycache__", ".pytest_cache", ".hypothesis", ".benchmarks"}


def run(command: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run Python with a command line, and return what it prints."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**variables, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was made of it."""
    folder = tmp_path_factory.mktemp("dist")
    run(["-m", "build", "--no-isolation", "--outdir", str(folder)], cwd=ROOT)
    assert {path.name for path in folder.iterdir()} == {
        f"etflayers-{etflayers.__version__}.tar.gz",
        f"etflayers-{etflayers.__version__}-py3-none-any.whl",
    }
    return folder


@pytest.fixture(scope="module")
def source(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def site(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages that holds the wheel and nothing else; PyTorch comes from around it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        archive.extractall(folder)
    return folder


def digests(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_twine_has_no_objection(built: Path) -> None:
    printed = run(["-m", "twine", "check", "--strict", *map(str, built.iterdir())], cwd=built)
    assert printed.count("PASSED") == 2


def test_the_wheel_of_the_source_distribution_is_that_of_the_repository(built: Path, tmp_path: Path) -> None:
    run(["-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT)
    assert digests(next(tmp_path.glob("*.whl"))) == digests(next(built.glob("*.whl")))


def test_the_source_distribution_holds_the_repository_without_its_dot_files(source: Path) -> None:
    def files(tree: Path) -> set[str]:
        inside = (path.relative_to(tree) for folder in SHIPPED for path in (tree / folder).rglob("*"))
        return {path.as_posix() for path in inside if (tree / path).is_file() and not CACHES & {*path.parts}}

    assert files(source) == files(ROOT)
    here = {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")}
    there = {path.name for path in source.iterdir() if path.is_file()}
    assert there == here | {"PKG-INFO", ".gitignore"}


def test_the_source_distribution_runs_its_tests(source: Path) -> None:
    # All are found and can be imported; those of a few rooms are run.
    found = run(["-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"], cwd=source)
    assert int(re.search(r"^(\d+)(?:/\d+)? tests collected", found, re.MULTILINE)[1]) > 3000
    rooms = ["tests/geometry", "tests/test_imports.py", "tests/test_package.py", "tests/test_security.py"]
    run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *rooms], cwd=source)


def test_the_wheel_alone_keeps_the_promises_of_readme(site: Path, tmp_path: Path) -> None:
    alone = {"PYTHONPATH": str(site)}
    where = run(["-c", "import etflayers; print(etflayers.__file__)"], tmp_path, alone)
    assert Path(where.strip()) == site / "etflayers" / "__init__.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert blocks
    run(["-W", "error", "-c", "\n".join(blocks)], tmp_path, alone)
    assert "etflayers " + etflayers.__version__ in run(["-m", "etflayers"], tmp_path, alone)
    shown = run(["-m", "etflayers.demo", "--data", "gaussians", "--epochs", "3"], tmp_path, alone)
    assert "NearestETFHead" in shown
    assert not list(tmp_path.iterdir())  # none of it writes a file
