"""Kernels without a GPU: each file of checks below runs in a process of its own.

Triton decides when a kernel is defined whether it will be interpreted, so interpreted and compiled kernels
cannot live in one process. The files in ``interpreted`` and ``compiled`` are ordinary tests that are not
collected from here (their names begin with ``check_``); a test here runs one of them with pytest anew.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def run_checks(tmp_path: Path) -> Callable[[str], None]:
    """Run the checks in a file below ``tests/kernels``, e.g. ``interpreted/check_class_sums.py``."""

    def run(name: str) -> None:
        compiler = pytest.importorskip(
            "triton.compiler", reason="the kernels need Triton: pip install 'etflayers[triton]'"
        )
        if "constexprs" not in inspect.signature(compiler.ASTSource).parameters:
            pytest.skip(
                "Triton 3.2 has another interface to its compiler, and its interpreter another launch"
            )
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TRITON_CACHE_DIR": str(tmp_path / "triton"),
            "TRITON_INTERPRET": "1" if name.startswith("interpreted/") else "0",
        }
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            pytest.fail(f"{name}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}", pytrace=False)

    return run
