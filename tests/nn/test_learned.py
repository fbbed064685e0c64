"""The learned head: in free coordinates for any optimizer, and on the manifold for geoopt's."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError, ManifoldError, MissingDependencyError
from etflayers.geometry import is_simplex_etf, is_stiefel, random_stiefel, simplex_etf
from etflayers.nn import LearnedETFHead

geoopt: Any = pytest.importorskip("geoopt")


def make(seed: int = 0, manifold: Any = "geoopt", **options: Any) -> LearnedETFHead:
    generator = torch.Generator().manual_seed(seed)
    return LearnedETFHead(6, 4, manifold=manifold, generator=generator, **options)


def loss_of(head: LearnedETFHead) -> Tensor:
    features = torch.randn(16, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return F.cross_entropy(head(features.to(head.frame.dtype)), torch.arange(16) % 4)


def step(head: LearnedETFHead, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = loss_of(head)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.item()


# --- free coordinates -------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.5, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
    "NAdam, decay": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0.1),
    "RiemannianAdam": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.02),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_optimizer_learns_and_the_frame_stays_an_etf(optimizer: str, dtype: torch.dtype) -> None:
    """200 steps of fused AdamW had left a rotation 1.5 from orthogonal, without a word."""
    head = make(manifold=None, dtype=dtype)
    optim = OPTIMIZERS[optimizer](head.parameters())
    losses = [step(head, optim) for _ in range(200)]
    assert is_simplex_etf(head.frame), is_simplex_etf(head.frame).reason
    assert losses[-1] < losses[0] - 0.1


def test_l_bfgs_learns_as_well_as_the_manifold_allows() -> None:
    """Both parametrizations have the same frames, so a converged loss is the same."""
    head = make(manifold=None, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(head)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    rival = make(dtype=torch.float64)
    riemannian = geoopt.optim.RiemannianSGD(rival.parameters(), lr=0.2, momentum=0.9)
    for _ in range(500):
        step(rival, riemannian)
    torch.testing.assert_close(loss_of(head), loss_of(rival), rtol=1e-6, atol=0)
    assert is_simplex_etf(head.frame)


def test_a_gradient_step_is_the_riemannian_one() -> None:
    """To first order in the step, free coordinates at P = W move the frame as the manifold does."""
    free, on_manifold = make(manifold=None, dtype=torch.float64), make(dtype=torch.float64)
    torch.testing.assert_close(free.frame, on_manifold.frame, rtol=0, atol=1e-14)
    start, rate = free.frame.detach(), 1e-5
    step(free, torch.optim.SGD(free.parameters(), lr=rate))
    # dW = c E' dQ', so the same step in W takes c^2 times the rate in Q.
    step(on_manifold, geoopt.optim.RiemannianSGD(on_manifold.parameters(), lr=rate / (4 / 3)))
    moved = (free.frame - start).norm()
    assert moved > 1e-7
    assert (free.frame - on_manifold.frame).norm() < 1e-4 * moved


def test_the_length_of_the_prototypes_does_not_matter() -> None:
    head = make(manifold=None, dtype=torch.float64)
    frame = head.frame.detach()
    torch.autograd.backward(loss_of(head))
    assert head.prototypes.grad is not None
    grad, prototypes = head.prototypes.grad, head.prototypes.detach()
    rounding = 10 * torch.finfo(torch.float64).eps * float(grad.norm() * prototypes.norm())
    assert abs(float((grad * prototypes).sum())) < rounding
    with torch.no_grad():
        head.prototypes.mul_(1e-3)
    torch.testing.assert_close(head.frame, frame, rtol=0, atol=1e-13)


def test_frame_is_differentiable_in_the_prototypes_to_second_order() -> None:
    head = make(manifold=None, dtype=torch.float64)
    features = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def logits(prototypes: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(head, {"prototypes": prototypes}, features)
        return out

    prototypes = torch.randn(4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.autograd.gradcheck(logits, prototypes.requires_grad_())
    assert torch.autograd.gradgradcheck(logits, prototypes)


def test_whatever_is_written_into_the_prototypes_the_frame_is_an_etf() -> None:
    for write in (nn.init.xavier_uniform_, nn.init.orthogonal_, nn.init.ones_, nn.init.zeros_):
        head = make(manifold=None)
        write(head.prototypes)
        assert is_simplex_etf(head.frame), write.__name__
        loss = loss_of(head)
        torch.autograd.backward(loss)
        assert head.prototypes.grad is not None
        assert bool(torch.isfinite(head.prototypes.grad).all())


def test_a_checkpoint_of_the_manifold_loads_into_free_coordinates() -> None:
    old, head = make(seed=3), make(seed=0, manifold=None)
    head.load_state_dict(old.state_dict())
    torch.testing.assert_close(head.frame, old.frame, rtol=0, atol=1e-6)
    with pytest.raises(InvalidArgumentError, match="rotation must have orthonormal columns"):
        head.load_state_dict({"rotation": 2 * torch.eye(6, 3)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversion_to_half_leaves_the_prototypes(dtype: torch.dtype) -> None:
    head = make(manifold=None)
    before = head.prototypes.detach().clone()
    assert torch.equal(head.to(dtype).prototypes, before)
    assert make(manifold=None, dtype=dtype).prototypes.dtype == torch.float32


# --- on the manifold --------------------------------------------------------------------------------------

OFF_MANIFOLD = r"rotation has left the Stiefel manifold.*RiemannianSGD or RiemannianAdam.*proj_\(\)"


def test_weight_is_the_etf_of_the_rotation_and_differentiable_in_it() -> None:
    head = make(dtype=torch.float64)
    rotation = head.rotation.detach()
    torch.testing.assert_close(head.frame, simplex_etf(4, 6, rotation=rotation), rtol=0, atol=1e-14)

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
    assert is_simplex_etf(head.frame), is_simplex_etf(head.frame).reason
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


def test_an_ordinary_step_is_noticed_in_compiled_training(
    require_tracing: Callable[[nn.Module], None],
) -> None:
    head = make()
    require_tracing(head)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    features = torch.ones(2, 6)
    compiled(features)
    step(head, torch.optim.SGD(head.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="rotation has left the Stiefel manifold"):
        compiled(features)


def test_fused_steps_are_noticed_though_they_leave_no_trace() -> None:
    """A fused optimizer does not advance the version counter of a parameter."""
    head = make()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, fused=True)
    step(head, optimizer)
    with pytest.raises(ManifoldError):
        loss_of(head)


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
    head = LearnedETFHead(6, 4, manifold="geoopt", rotation=rotation)
    torch.testing.assert_close(head.rotation.detach(), rotation, rtol=0, atol=1e-6)
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
        LearnedETFHead(6, 4, manifold="geoopt")
    LearnedETFHead(6, 4)


def test_an_unknown_manifold_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="manifold must be None or 'geoopt', got 'stiefel'"):
        LearnedETFHead(6, 4, manifold="stiefel")  # type: ignore[arg-type]
