"""SECURITY.md says that no code comes out of a file: which calls could bring it in, and where they stand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from etflayers.codes import find_code
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.nn import FeatureMemory
from etflayers.storage import write_tensors

ROOT = Path(__file__).parents[1]

# Calls that run what a file says, or a program, by the end of their names.
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen", "read_pickle"}
METHODS = {"eval", "compile"}  # of modules and patterns, which run nothing
UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "subprocess",
    "socket",
}
UNSAFE_MODULES |= {"urllib", "http", "requests", "ctypes", "yaml"}

# What is there, and why it may be.
ALLOWED = {
    "etflayers/__main__.py: import subprocess",  # imports optional packages in an interpreter of its own
    "etflayers/testing/suites/base.py: torch.load(weights_only=False)",  # of bytes that it wrote itself
    "examples/lab/ranks.py: import subprocess",  # torchrun with the script itself
}


def findings(source: str) -> Iterator[str]:
    """Calls and imports in ``source`` that could run what a file holds, or open a connection."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            names = [module] if module else [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Call):
            yield from unsafe(node)


def unsafe(call: ast.Call) -> Iterator[str]:
    last = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    options = {option.arg: ast.unparse(option.value) for option in call.keywords} if "load" in last else {}
    if last in UNSAFE_CALLS and (isinstance(call.func, ast.Name) or last not in METHODS):
        yield f"{ast.unparse(call.func)}()"
    elif last == "load" and ast.unparse(call.func).startswith("torch."):
        if options.get("weights_only") != "True":
            yield f"{ast.unparse(call.func)}(weights_only={options.get('weights_only')})"
    elif "allow_pickle" in options:
        yield f"{ast.unparse(call.func)}(allow_pickle)"


def test_nothing_runs_what_a_file_holds() -> None:
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {finding}"
        for folder in ("etflayers", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for finding in findings(path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED  # both ways: an entry that is no longer there has to go


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import urllib.request",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=trusted)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "np.load(file, allow_pickle=True)",
        "pandas.read_pickle(file)",
    ],
)
def test_what_counts_as_a_finding(source: str) -> None:
    assert len(list(findings(source))) == 1


@pytest.mark.parametrize(
    "source", ["model.eval()", "torch.compile(model)", "re.compile(text)", "torch.load(f, weights_only=True)"]
)
def test_what_does_not(source: str) -> None:
    assert not list(findings(source))


def test_what_the_note_names_is_there() -> None:
    """The classes and functions that read files, by who calls ``read_tensors``."""
    readers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "etflayers").rglob("*.py")
        if "read_tensors(" in path.read_text(encoding="utf-8")
    }
    assert readers == {
        "etflayers/storage.py",
        "etflayers/distill/distilled_set.py",  # DistilledSet.load
        "etflayers/nn/memory.py",  # FeatureMemory.load
        "etflayers/codes/catalog.py",  # find_code and spherical_code
    }
    note = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for name in ("DistilledSet.load", "FeatureMemory.load", "find_code", "spherical_code"):
        assert f"`{name}`" in note


FORGED = {
    "no means": ({"feature_memory": {}}, {"rows": torch.ones(2)}),
    "one axis": ({"feature_memory": {"capacity": 2}}, {"means": torch.ones(2)}),
    "unknown option": ({"feature_memory": {"capacity": 2, "run": "me"}}, {"means": torch.ones(2, 3)}),
    "no mapping": ({"feature_memory": [1]}, {"means": torch.ones(2, 3)}),
    "other entries": ({"feature_memory": {"capacity": 2}}, {"means": torch.ones(2, 3), "x": torch.ones(1)}),
}


@pytest.mark.parametrize(("record", "tensors"), FORGED.values(), ids=FORGED)
def test_a_forged_memory_is_refused(
    record: dict[str, Any], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    write_tensors(tmp_path / "file", tensors, record)
    with pytest.raises(InvalidArgumentError, match="does not hold a FeatureMemory"):
        FeatureMemory.load(tmp_path / "file")


@pytest.mark.parametrize("rows", [torch.eye(5), torch.full((20, 5), torch.nan), torch.ones(20, 5)])
def test_a_forged_code_is_refused(rows: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    asked = {"num_classes": 20, "in_features": 5, "kind": "optimized"}
    write_tensors(tmp_path / "file", {"rows": rows}, {"spherical_code": asked})
    with pytest.raises((InvalidArgumentError, NonFiniteError)):
        find_code(20, 5, kind="optimized", cache=tmp_path / "file")
