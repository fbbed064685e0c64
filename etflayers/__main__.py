"""What a bug report has to say: versions, devices, the paths that calls take, and optional packages.

``python -m etflayers`` prints it. A part that cannot be told says why, and the others are told nevertheless.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy
import torch

from etflayers import __version__
from etflayers.kernels import describe

__all__ = ["OPTIONAL", "OptionalPackage", "main", "probe", "report"]


class OptionalPackage(NamedTuple):
    """What to import of a package, and the extras of etflayers that install it."""

    module: str
    extras: str


# Of each distribution the module that is imported where it is used.
OPTIONAL: Mapping[str, OptionalPackage] = {
    "cvxpylayers": OptionalPackage("cvxpylayers.torch", "solvers"),
    "geoopt": OptionalPackage("geoopt", "solvers"),
    "jinja2": OptionalPackage("jinja2", "examples"),
    "matplotlib": OptionalPackage("matplotlib.pyplot", "examples"),
    "mlxtend": OptionalPackage("mlxtend.data", "examples"),
    "pillow": OptionalPackage("PIL.Image", "distill, examples"),
    "plotly": OptionalPackage("plotly.offline", "examples"),
    "pymanopt": OptionalPackage("pymanopt", "solvers"),
    "pytorch-ood": OptionalPackage("pytorch_ood.api", "ood"),
    "ray": OptionalPackage("ray.tune", "sweeps"),
    "rich": OptionalPackage("rich.console", "examples"),
    "safetensors": OptionalPackage("safetensors.torch", "distill, examples"),
    "scikit-learn": OptionalPackage("sklearn.cluster", "distill, examples"),
    "scipy": OptionalPackage("scipy.optimize", "solvers"),
    "tensorboard": OptionalPackage("tensorboard.compat.proto.summary_pb2", "tracking"),
    "torchmetrics": OptionalPackage("torchmetrics", "examples, metrics, ood"),
    "triton": OptionalPackage("triton", "triton"),
    "tyro": OptionalPackage("tyro", "examples"),
    "wandb": OptionalPackage("wandb", "tracking"),
}

# Operations that have more than one path, and sizes (K, d) that take different ones.
_OPERATIONS = ("class_sums", "cross_entropy", "polar")
_SIZES = ((10, 512), (100, 512), (1000, 2048))
_BATCH = 128

# Variables that choose among paths or instructions.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "MKL_ENABLE_INSTRUCTIONS",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)

# Writes a name before its import and the outcome behind it. What a package prints goes elsewhere.
_PROBE = """
import importlib, os, sys
report = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
os.dup2(2, 1)
for name in sys.argv[1:]:
    print(name, end="\\t", file=report, flush=True)
    try:
        importlib.import_module(name)
        outcome = "imports"
    except BaseException as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        words = f"{type(error).__name__}: {error}".split()
        outcome = "not installed" if missing else "fails: " + " ".join(words)[:160]
    print(outcome, file=report, flush=True)
"""


def main() -> None:
    """Print the report, each line as soon as it is known."""
    for line in report():
        print(line, flush=True)


def report(optional: Mapping[str, OptionalPackage] = OPTIONAL) -> Iterator[str]:
    """The lines of the report.

    Args:
        optional: the optional packages, by distribution.

    >>> next(report()).startswith(f"etflayers {__version__}, PyTorch {torch.__version__}, ")
    True
    """
    yield (
        f"etflayers {__version__}, PyTorch {torch.__version__}, NumPy {numpy.__version__}, "
        f"Python {platform.python_version()}, {platform.platform()}"
    )
    variables = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    if variables:
        yield f"with {', '.join(variables)}"
    yield from ("", "Devices", *_attempt(_devices))
    yield from ("", f"Paths of K classes and d features, batches of {_BATCH}, float32", *_attempt(_paths))
    yield from ("", "Optional packages", *_attempt(lambda: _packages(optional)))


def probe(modules: Sequence[str], *, timeout: float = 120.0) -> dict[str, str]:
    """How the import of each module ends: ``"imports"``, ``"not installed"`` or what went wrong.

    It happens in an interpreter of its own. Where a module takes that one down or never returns, the next
    interpreter goes on with the others.

    Args:
        modules: their full names.
        timeout: seconds after which an interpreter is given up.

    >>> probe(["json", "no_such_module"])
    {'json': 'imports', 'no_such_module': 'not installed'}
    """
    outcomes: dict[str, str] = {}
    while waiting := [name for name in modules if name not in outcomes]:
        command = [sys.executable, "-W", "ignore", "-c", _PROBE, *waiting]
        try:
            child = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=timeout,
                check=False,
            )
            written, end = child.stdout, f"fails: Python ends with exit status {child.returncode}"
        except subprocess.TimeoutExpired as error:
            written, end = error.stdout or b"", f"fails: takes more than {timeout:g} s"
        lines = written.decode(errors="replace").splitlines() or [waiting[0]]
        for name, _, outcome in (line.partition("\t") for line in lines):
            outcomes[name] = outcome or end
    return outcomes


def _attempt(part: Callable[[], Iterator[str]]) -> Iterator[str]:
    """The lines of a part, and why it ends early if it does."""
    try:
        for line in part():
            yield f"  {line}"
    except Exception as error:
        yield f"  could not be told: {type(error).__name__}: {error}"


def _devices() -> Iterator[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"cpu: {platform.machine()}, {capability}, threads: {torch.get_num_threads()}"
    for device in _accelerators():
        if device.type != "cuda":
            yield f"{device}"
            continue
        facts = torch.cuda.get_device_properties(device)
        yield (
            f"{device}: {facts.name}, compute capability {facts.major}.{facts.minor}, "
            f"{facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )


def _accelerators() -> list[torch.device]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator()
    return [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())] if kind else []


def _paths() -> Iterator[str]:
    # Devices of one machine rarely differ, and the first is the default.
    for device in (torch.device("cpu"), *_accelerators()[:1]):
        for op in _OPERATIONS:
            choices = [
                (
                    f"K={num_classes} d={in_features}",
                    str(
                        describe(
                            op,
                            device=device,
                            dtype=torch.float32,
                            num_classes=num_classes,
                            in_features=in_features,
                            batch=None if op == "polar" else _BATCH,
                        )
                    ),
                )
                for num_classes, in_features in _SIZES
            ]
            for choice, alike in groupby(choices, key=lambda pair: pair[1]):
                sizes = ", ".join(size for size, _ in alike)
                yield f"{device} {op} at {sizes}: {choice}"


def _packages(optional: Mapping[str, OptionalPackage]) -> Iterator[str]:
    outcomes = probe([package.module for package in optional.values()])
    width = max(map(len, optional), default=0)
    for name, package in optional.items():
        outcome = outcomes[package.module]
        if outcome == "not installed":
            outcome += f" (in the extra {package.extras})"
        yield f"{name:{width}}  {_version(name):12}  {outcome}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except Exception:  # not installed, or its metadata are damaged
        return "-"


if __name__ == "__main__":
    main()
