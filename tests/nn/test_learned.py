"""The learned head: its parameter, the optimizers that may move it and those that may not."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.errors import InvalidArgumentError, ManifoldError, MissingDependencyError
from etflayers.geometry import is_simplex_etf, is_stiefel, random_stiefel, simplex_etf
from etflayers.nn import LearnedETFHead

geoopt: Any = pytest.importorskip("geoopt")


def make(seed: int = 0, **options: Any) -> LearnedETFHead:
    return LearnedETFHead(6, 4, generator=torch.Generator().manual_seed(seed), **options)


def loss_of(head: LearnedETFHead) -> Tensor:
    features = torch.randn(16, 6, generator=torch.Generator().manual_seed(5), dtype=head.rotation.dtype)
    return F.cross_entropy(head(features), torch.arange(16) % 4)


def step(head: LearnedETFHead, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = loss_of(head)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.item()


OFF_MANIFOLD = r"rotation has left the Stiefel manifold.*RiemannianSGD or RiemannianAdam.*proj_\(\)"


def test_weight_is_the_etf_of_the_rotation_and_differentiable_in_it() -> None:
    head = make(dtype=torch.float64)
    rotation = head.rotation.detach()
    torch.testing.assert_close(head.weight, simplex_etf(4, 6, rotation=rotation), rtol=0, atol=1e-14)

    def logits(q: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(head, {"rotation": q}, torch.ones(2, 6, dtype=torch.float64))
        return out

    # The finite differences leave the manifold by less than its tolerance squared would notice.
    assert torch.autograd.gradcheck(logits, rotation.clone().requires_grad_(), eps=1e-11, atol=1e-4)


@pytest.mark.parametrize(
    "optimizer", ["RiemannianSGD", "RiemannianSGD-momentum", "RiemannianAdam", "RiemannianAdam-decay"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_riemannian_optimizers_learn_and_stay_on_the_manifold(optimizer: str, dtype: torch.dtype) -> None:
    head = make(dtype=dtype)
    name, _, variant = optimizer.partition("-")
    options: dict[str, Any] = {"lr": 0.1 if name == "RiemannianSGD" else 0.01}
    if variant:
        options |= {"momentum": 0.9} if variant == "momentum" else {"weight_decay": 0.01}
    optim = getattr(geoopt.optim, name)(head.parameters(), **options)

    losses = [step(head, optim) for _ in range(200)]

    assert is_stiefel(head.rotation), is_stiefel(head.rotation).reason
    assert is_simplex_etf(head.weight), is_simplex_etf(head.weight).reason
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("training", [True, False])
def test_an_ordinary_step_is_noticed_by_the_next_forward_pass(optimizer: Any, training: bool) -> None:
    head = make()
    step(head, optimizer(head.parameters(), lr=0.1))
    head.train(training)
    with pytest.raises(ManifoldError, match=OFF_MANIFOLD):
        loss_of(head)
    with pytest.raises(ManifoldError):  # and by every one after it, until it is repaired
        loss_of(head)
    with torch.no_grad():
        head.rotation.proj_()  # type: ignore[attr-defined]
    loss_of(head)


def test_ordinary_steps_too_small_to_notice_one_by_one_are_noticed_in_sum() -> None:
    head = make()
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-5)

    def steps(number: int) -> None:
        for _ in range(number):
            step(head, optimizer)

    steps(3)
    with pytest.raises(ManifoldError):
        steps(500)


def test_an_ordinary_step_is_noticed_in_compiled_training() -> None:
    head = make()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    features = torch.ones(2, 6)
    compiled(features)
    step(head, torch.optim.SGD(head.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="rotation has left the Stiefel manifold"):
        compiled(features)


def test_the_check_runs_once_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    head = make()
    checks: list[Tensor] = []
    monkeypatch.setattr(head, "_assert_orthonormal", checks.append)
    optimizer = geoopt.optim.RiemannianSGD(head.parameters(), lr=0.1)
    for expected in (1, 2, 3):
        step(head, optimizer)
        loss_of(head) if expected == 3 else None
        assert len(checks) == expected + (expected == 3)
    loss_of(head)
    assert len(checks) == 4


def test_loading_a_state_off_the_manifold_is_noticed() -> None:
    head = make()
    loss_of(head)
    head.load_state_dict({"rotation": 2 * torch.eye(6, 3)})
    with pytest.raises(ManifoldError):
        loss_of(head)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_copies_stay_parameters_on_the_manifold(copy_of: Any) -> None:
    head = make()
    step(head, geoopt.optim.RiemannianSGD(head.parameters(), lr=0.1))
    twin = copy_of(head)
    assert isinstance(twin.rotation, geoopt.ManifoldParameter)
    assert type(twin.rotation.manifold) is geoopt.EuclideanStiefel
    assert twin.rotation.requires_grad
    before = head.rotation.detach().clone()
    step(twin, geoopt.optim.RiemannianAdam(twin.parameters(), lr=0.1))
    assert is_stiefel(twin.rotation)
    assert torch.equal(head.rotation, before)
    # What the original knows of its version says nothing about the copy.
    other = copy_of(head)
    loss_of(head)
    step(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ManifoldError):
        loss_of(other)


def test_state_dict_holds_a_plain_tensor() -> None:
    state = make().state_dict()
    assert type(state["rotation"]) is Tensor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversion_to_half_leaves_the_rotation_on_the_manifold(dtype: torch.dtype) -> None:
    head = make()
    before = head.rotation.detach().clone()
    head = head.to(dtype)
    assert isinstance(head.rotation, geoopt.ManifoldParameter)
    assert torch.equal(head.rotation, before)
    assert make(dtype=dtype).rotation.dtype == torch.float32
    assert head(torch.ones(2, 6, dtype=dtype)).dtype == dtype
    step(head, geoopt.optim.RiemannianSGD(head.parameters(), lr=0.1))
    assert is_stiefel(head.rotation)


def test_a_given_rotation_is_copied() -> None:
    rotation = random_stiefel(6, 3)
    head = LearnedETFHead(6, 4, rotation=rotation)
    assert torch.equal(head.rotation, rotation)
    rotation.zero_()
    assert is_stiefel(head.rotation)


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        (
            torch.eye(6, 4),
            r"rotation must have shape \(in_features, num_classes - 1\) = \(6, 3\), got \(6, 4\)",
        ),
        (2 * torch.eye(6, 3), "rotation must have orthonormal columns.*project_stiefel"),
        (torch.eye(6, 3).long(), "rotation must have a real floating-point dtype"),
        ("canonical", "rotation must be 'haar' or a tensor, got 'canonical'"),
    ],
)
def test_bad_rotations_are_named(rotation: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        LearnedETFHead(6, 4, rotation=rotation)


def test_without_geoopt_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geoopt", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'etflayers\[solvers\]'"):
        LearnedETFHead(6, 4)
