"""What an import loads, what it costs, which names it gives, and which private ones it uses."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import etflayers
from etflayers._imports import AfterImport
from etflayers._torch import allow_in_graph

OPTIONAL = (
    "cvxpy",
    "cvxpylayers",
    "geoopt",
    "lightning",
    "matplotlib",
    "mlxtend",
    "PIL",
    "pymanopt",
    "pytorch_ood",
    "pytorch_lightning",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "torchmetrics",
    "triton",
    "tyro",
)


def run_fresh(program: str, *arguments: str) -> Any:
    """Run ``program`` in an interpreter that has imported nothing yet, and return the JSON that it prints."""
    command = [sys.executable, "-W", "error::DeprecationWarning:etflayers", "-c", program, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


# Seconds of CPU and the modules added, by import.
PLAIN_IMPORTS = """
import json, sys, time
def added_by(module):
    start, before = time.process_time(), set(sys.modules)
    __import__(module)
    return time.process_time() - start, sorted(set(sys.modules) - before)
print(json.dumps({name: added_by(name) for name in ("torch", "etflayers", "etflayers.metrics")}))
"""


@pytest.fixture(scope="module")
def plain_imports() -> list[dict[str, tuple[float, list[str]]]]:
    return [run_fresh(PLAIN_IMPORTS) for _ in range(3)]


def test_an_import_loads_nothing_but_its_own_modules(
    plain_imports: list[dict[str, tuple[float, list[str]]]],
) -> None:
    own: set[str] = set()
    for module in ("etflayers", "etflayers.metrics"):
        _, added = plain_imports[0][module]
        assert module in added
        # Not even more of PyTorch than `import torch`: that would be its compiler, with sympy.
        assert {name.partition(".")[0] for name in added} - sys.stdlib_module_names == {"etflayers"}
        own |= set(added)
    late = (
        "__main__",
        "demo",
        "distill",
        "kernels.class_sums.triton",
        "kernels.cross_entropy.triton",
        "kernels.polar.triton",
        "metrics.callback",
        "metrics.collapse",
        "testing",
    )
    assert not own & {f"etflayers.{name}" for name in late}


# The library shall add at most half a second to the second or more that `import torch` takes. It adds a
# twentieth; PyTorch's compiler or torchmetrics would add as much again as PyTorch. A share, because it is the
# same on a slow machine; of the same process, so that both halves meet the same noise.
@pytest.mark.parametrize("module", ["etflayers", "etflayers.metrics"])
def test_an_import_takes_little_of_the_time_of_pytorch(
    plain_imports: list[dict[str, tuple[float, list[str]]]], module: str
) -> None:
    assert statistics.median(run[module][0] / run["torch"][0] for run in plain_imports) < 0.3


def test_pytorch_is_told_of_the_nodes_when_it_loads_its_compiler() -> None:
    # Traced through, each would be more nodes than one, and would have lost its forward mode.
    found = run_fresh(
        """
import json, sys, torch
from etflayers import ETFCrossEntropy, FixedETFHead
from etflayers.functional import nearest_etf, stiefel_argmin
assert "torch._dynamo" not in sys.modules
calls = []
def record(graph, example_inputs):
    calls.append([getattr(node.target, "__name__", "") for node in graph.graph.nodes])
    return graph
def run(function, *arguments, fullgraph=True):
    return torch.compile(function, backend=record, fullgraph=fullgraph)(*arguments)
means, targets = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
loss = ETFCrossEntropy(FixedETFHead(6, 4, rotation="canonical"))
run(nearest_etf, means)
run(lambda features: loss(features, targets), means)
calls, graphs = [], calls
def rayleigh_quotient(q, matrix):
    return (q * (matrix @ q)).sum((-2, -1))
start = torch.full((1, 3, 1), 3**-0.5)
matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
run(lambda m: stiefel_argmin(rayleigh_quotient, m + 0, start=start) + 1, matrix, fullgraph=False)
print(json.dumps([graphs, calls]))
"""
    )
    (nearest, losses), around = found
    assert "_nearest_frame" in nearest
    assert "softmax_losses" in losses
    assert [[name for name in graph if name in ("add", "matmul")] for graph in around] == [["add"], ["add"]]


def test_pytorch_is_told_at_once_where_its_compiler_is_loaded() -> None:
    importlib.import_module("torch._dynamo")

    @allow_in_graph
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    seen = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(twice, backend=record, fullgraph=True)(torch.ones(2))
    torch.compile(lambda x: twice(x), backend=record, fullgraph=True)(torch.ones(2))
    assert twice in seen


def test_without_the_optional_dependencies_all_modules_import_and_metrics_say_what_to_install() -> None:
    found = run_fresh(
        """
import importlib, json, pkgutil, sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # from here on, importing it raises ImportError
import torch
import etflayers
from etflayers.errors import MissingDependencyError
from etflayers.metrics import CosineMargins, NeuralCollapse, class_statistics, collapse_measures
names = [module.name for module in pkgutil.walk_packages(etflayers.__path__, "etflayers.")]
for name in names:
    if not name.endswith(".triton"):  # the kernels themselves
        importlib.import_module(name)
measures = collapse_measures(class_statistics(torch.eye(3).repeat(2, 1), torch.arange(3).repeat(2), 3))
messages = []
for make in (lambda: NeuralCollapse(3, 3), CosineMargins):
    try:
        make()
    except MissingDependencyError as error:
        messages.append(str(error))
print(json.dumps([names, measures["nc1_trace"].item(), messages]))
""",
        *OPTIONAL,
    )
    names, trace, messages = found
    assert {"etflayers.functional", "etflayers.nn", "etflayers.metrics.callback"} <= set(names)
    assert trace == 0
    assert ["etflayers[metrics]" in message for message in messages] == [True, True]


def test_a_metric_loads_torchmetrics_and_only_the_callback_lightning(tmp_path: Path) -> None:
    package = tmp_path / "pytorch_lightning"
    package.mkdir()
    (package / "__init__.py").write_text("class Callback: pass", encoding="utf-8")
    found = run_fresh(
        """
import json, sys
from etflayers.metrics import NeuralCollapse, NeuralCollapseProbe
sys.path.insert(0, sys.argv[1])
sys.modules["lightning"] = None
before = "pytorch_lightning" in sys.modules
from etflayers.metrics import NeuralCollapseCallback
import torchmetrics, pytorch_lightning
kinds = {NeuralCollapse: torchmetrics.Metric, NeuralCollapseCallback: pytorch_lightning.Callback}
print(json.dumps([before, all(issubclass(own, parent) for own, parent in kinds.items())]))
""",
        str(tmp_path),
    )
    assert found == [False, True]


# --- Names ---

# All that version 0.1.0 and its successors had at the top, and its spelling before it became PyTorch's.
OLD_NAMES = {
    "etflayers": "QRSVD SVD ByRegime ConvexHull CriticalPoint Detached GramEigh GramRoot HuberNearestETF "
    "Implicit Iterative MahalanobisNearestETF NearestETFSolution NewtonSchulz RiemannianDescent "
    "RiemannianNewton SolveWarning Status StiefelNode TrustRegions Unrolled huber_nearest_etf "
    "mahalanobis_nearest_etf solve_nearest_etf solve_stiefel stiefel_argmin",
    "etflayers.distill": "FixedInitialisation RandomInitialisation centred_one_hot kmeans_centres",
    "etflayers.geometry": "centred centred_basis_adjoint centred_basis_apply",
    "etflayers.metrics": "centre_disagreement nearest_centre",
}
ROOT = Path(etflayers.__path__[0])
ROOMS = sorted(f"etflayers.{path.parent.name}" for path in ROOT.glob("*/__init__.py"))


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in OLD_NAMES.items() for name in names.split()]
)
def test_an_old_name_works_and_warns_of_the_new_one(module: str, name: str) -> None:
    package = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"^{module}\.{name} is now (\S+); ") as warned:
        old = getattr(package, name)
    assert warned[0].filename == __file__
    place, _, new = str(warned[0].message).split()[3].rstrip(";").rpartition(".")
    assert old is getattr(importlib.import_module(place), new)
    assert new in importlib.import_module(place).__all__
    assert name not in package.__all__
    assert name not in dir(package)


@pytest.mark.parametrize("package", ["etflayers", *ROOMS])
def test_every_name_of_a_package_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        getattr(module, name)  # a DeprecationWarning is an error here
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


# --- Private names of PyTorch ---


def private_names(source: str) -> Iterator[str]:
    """The names from elsewhere that ``source`` imports or reads, in full."""
    tree = ast.parse(source)
    known = {}  # from a name in the module to what it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                first = name.name.partition(".")[0]
                known[name.asname or first] = name.name if name.asname else first
                yield name.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                known[name.asname or name.name] = f"{node.module}.{name.name}"
                yield f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in known:
            yield ".".join([known[node.id], *reversed(parts)])
        elif parts[:1] == ["_version"]:
            yield "torch.Tensor._version"


def is_private(name: str) -> bool:
    # Below torch.ops are operators: `torch.ops.aten._name` is what a graph holds, and has no other name.
    first, *rest = name.split(".")
    return first == "torch" and rest[:1] != ["ops"] and any(part.startswith("_") for part in rest)


def test_private_names_of_pytorch_stand_in_one_module() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in ROOT.rglob("*.py")
        for name in private_names(path.read_text(encoding="utf-8"))
        if is_private(name) and not name.endswith("__")
    }
    assert {line for line in found if not line.startswith("_torch.py: ")} == set()
    assert "_torch.py: torch._assert_async" in found  # so it finds some


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nx = torch._C.f()",
        "import torch as t\nt._C",
        "from torch import _inductor",
        "from torch._subclasses import FakeTensor",
        "import torch._dynamo",
        "import torch.distributed as dist\ndist._functional_collectives",
        "from torch.utils import data\ndata._utils",
        "x.grad._version",
    ],
)
def test_what_counts_as_a_private_name(source: str) -> None:
    assert any(map(is_private, private_names(source)))


# --- Actions after an import ---


@pytest.fixture
def module_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[str]:
    """Of a module that takes a while to import, and that can be made to fail."""
    name = f"watched_by_{request.node.name}"
    (tmp_path / f"{name}.py").write_text(
        "import builtins, time\ntime.sleep(0.1)\nif getattr(builtins, 'etflayers_fails', False): 1 / 0\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_actions_wait_for_the_import_and_run_once(module_name: str) -> None:
    watch, log = AfterImport(module_name), []
    for number in (1, 2):
        watch.run(lambda number=number: log.append((number, module_name in sys.modules)))
    assert importlib.util.find_spec(module_name) is not None  # looking is no import
    assert log == []
    module = importlib.import_module(module_name)
    assert log == [(1, True), (2, True)]
    assert watch not in sys.meta_path
    assert "time.sleep" in inspect.getsource(module)  # through its loader
    watch.run(lambda: log.append((3, True)))
    assert log[2:] == [(3, True)]
    importlib.reload(module)
    assert len(log) == 3


def test_an_action_runs_at_once_where_the_module_is_loaded(module_name: str) -> None:
    importlib.import_module(module_name)
    watch, log = AfterImport(module_name), []
    watch.run(lambda: log.append(1))
    assert log == [1]
    assert watch not in sys.meta_path


def test_an_import_that_fails_is_watched_again(module_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, log = AfterImport(module_name), []
    watch.run(lambda: log.append(1))
    with monkeypatch.context() as patch:
        patch.setattr("builtins.etflayers_fails", True, raising=False)
        with pytest.raises(ZeroDivisionError):
            importlib.import_module(module_name)
    assert log == []
    assert watch in sys.meta_path
    importlib.import_module(module_name)
    assert log == [1]


def test_no_thread_gets_the_module_before_the_actions_have_run(module_name: str) -> None:
    watch, log, seen = AfterImport(module_name), [], []
    watch.run(lambda: log.append(1))

    def use() -> None:
        importlib.import_module(module_name)
        seen.append(list(log))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [[1]] * 4
