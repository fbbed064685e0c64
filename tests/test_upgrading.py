"""docs/moving/upgrading.md is right: every old name in it works with a warning or raises, and the new one works."""

from __future__ import annotations

import builtins
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import etflayers
from etflayers import FixedETFHead, LearnedETFHead, NearestETFHead
from etflayers.adjoints import Implicit, Unrolled
from etflayers.distill import DistilledSet, UnrolledInnerLoop
from etflayers.functional import solve_stiefel, stiefel_argmin
from etflayers.geometry import centered_basis_adjoint, etf_radius
from etflayers.metrics import CosineMargins, NeuralCollapse, class_statistics, cosine_margins, numerical_rank
from etflayers.solvers import ConjugateGradients, GramEigh

NOTE = (Path(__file__).parents[1] / "docs" / "moving" / "upgrading.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")


def table(header: str) -> list[list[str]]:
    """The code in each cell of the rows below a header."""
    rows = NOTE.split(f"{header}\n", 1)[1].splitlines()[1:]
    cells = []
    for row in rows:
        if not row.startswith("|"):
            break
        cells.append([CODE.search(cell)[1] for cell in row.strip("|").split(" | ")])
    return cells


RENAMED = table("| old name | new name |")
REFUSED = table("| with 0.1.0 | with 0.2.0 | the old form raises |")


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_an_old_name_works_and_warns(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"^{re.escape(old)} is now {re.escape(new)};"):
        value = named(old)
    assert value is named(new)


def test_the_note_lists_all_that_has_moved() -> None:
    rooms = [path.parent.name for path in Path(etflayers.__file__).parent.glob("*/__init__.py")]
    moved = {}
    for name in ("etflayers", *(f"etflayers.{room}" for room in rooms)):
        on_demand = getattr(importlib.import_module(name), "__getattr__", None)
        if on_demand is not None:
            found = inspect.getclosurevars(on_demand).nonlocals["moved"]
            moved |= {f"{name}.{old}": new for old, new in found.items()}
    assert dict(RENAMED) == moved
    assert len(moved) == 36


@pytest.mark.parametrize("make", ["from_data", "from_noise"])
def test_the_old_name_of_per_class(make: str) -> None:
    arguments = {
        "from_data": (torch.rand(6, 1, 4, 4), torch.arange(6) % 3),
        "from_noise": ((1, 4, 4), 3),
    }[make]
    with pytest.warns(DeprecationWarning, match="count is now per_class"):
        old = getattr(DistilledSet, make)(*arguments, count=1, generator=torch.Generator().manual_seed(0))
    new = getattr(DistilledSet, make)(*arguments, per_class=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(old.inputs, new.inputs)


@pytest.fixture
def names() -> dict[str, Any]:
    """What the lines of the second table are about."""
    pytest.importorskip("torchmetrics")
    features, targets = torch.randn(8, 2), torch.arange(8) % 2
    images, labels = torch.rand(1, 2, 3), torch.tensor([[0, 1]])
    return {
        **{each.__name__: each for each in (CosineMargins, NeuralCollapse, ConjugateGradients, GramEigh)},
        **{each.__name__: each for each in (Implicit, Unrolled, cosine_margins, numerical_rank)},
        "torch": torch,
        "classifier": torch.nn.Linear(2, 2),
        "features": features,
        "targets": targets,
        "weight": torch.eye(2),
        "statistics": class_statistics(features, targets, 2, scatter="per_class"),
        "distilled": DistilledSet.from_noise((1, 4, 4), 3, per_class=1),
        "images": images,
        "labels": labels,
        "loop": UnrolledInnerLoop(torch.nn.Linear(3, 2)),
        "linear": torch.randn(3, 4),
    }


@pytest.mark.parametrize(("old", "new", "error"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_raises_now_and_what_to_write(old: str, new: str, error: str, names: dict[str, Any]) -> None:
    def value(code: str) -> Any:
        return named(code) if re.fullmatch(r"[\w.]+", code) else eval(code, names)

    with pytest.raises(getattr(builtins, error)):
        value(old)
    assert value(new) is not None


@pytest.mark.parametrize("function", [stiefel_argmin, solve_stiefel])
def test_where_the_options_of_adjoints_went(function: Callable[..., object]) -> None:
    assert {"linear_solver", "unrolled_steps"} <= set(inspect.signature(function).parameters)


def test_state_dicts_of_the_first_version_load() -> None:
    """With the entries and shapes that 0.1.0 saved; that logits agree was tried once with its code."""
    averages = {"means": torch.randn(4, 6), "counts": torch.full((4,), 9), "updates": torch.full((4,), 2)}
    frame = NearestETFHead(6, 4).frame.clone()
    nearest = NearestETFHead(6, 4)
    assert not torch.equal(nearest.frame, frame)
    state = {f"averages.{name}": value for name, value in averages.items()}
    nearest.load_state_dict({"frame": frame, "centre": torch.ones(6), **state})
    torch.testing.assert_close(nearest.frame, frame, rtol=0, atol=0)
    assert torch.equal(nearest.averages.means, averages["means"])

    learned = LearnedETFHead(6, 4)
    rotation = torch.linalg.qr(torch.randn(6, 3)).Q
    learned.load_state_dict({"rotation": rotation})
    then = etf_radius(4) * centered_basis_adjoint(rotation.mT)  # c E'Q'
    torch.testing.assert_close(learned.frame.detach(), then)

    FixedETFHead(6, 4, rotation="canonical").load_state_dict({})
    FixedETFHead(4, 4).load_state_dict({})
    with pytest.raises(RuntimeError, match="vertices"):
        FixedETFHead(6, 4).load_state_dict({})
