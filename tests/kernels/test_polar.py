"""The nearest frame without a factorization: by products here, by kernels without a GPU and on one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from etflayers import NearestETFHead, nearest_etf, simplex_etf
from etflayers.adjoints import Implicit, Unrolled
from etflayers.errors import ConvergenceError, InvalidArgumentError
from etflayers.geometry import is_simplex_etf
from etflayers.kernels import describe
from etflayers.kernels.polar import polar, polar_adjoint
from etflayers.solvers import SVD, ByRegime, GramRoot
from etflayers.testing import adjoint_identity_error, means_with_condition, relative_error, svd_frame

EPS = torch.finfo(torch.float32).eps


@pytest.mark.slow
def test_interpreted(run_checks: Callable[[str], None]) -> None:
    run_checks("interpreted/check_polar.py")


@pytest.mark.slow
def test_compiled(run_checks: Callable[[str], None]) -> None:
    run_checks("compiled/check_polar.py")


# The frame by products.


@pytest.mark.parametrize("kappa", [1.0, 5.0, 1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize(("num_classes", "in_features"), [(2, 3), (5, 4), (10, 64), (40, 39), (140, 150)])
def test_frame_and_gradient_against_an_svd(num_classes: int, in_features: int, kappa: float) -> None:
    kappa = kappa if num_classes > 2 else 1.0
    linear = means_with_condition(num_classes, in_features, kappa, dtype=torch.float32)
    found = polar(linear)
    assert found.frame.dtype == torch.float64
    # The Gram matrix has the error eps of float64, and squares kappa.
    bound = 1e-13 + 1e-16 * kappa**2
    # Where the frame divides by one singular value, its derivative divides by it twice, after products of
    # size K.
    gradient_bound = 1e-12 + 2e-16 * num_classes * kappa**2
    assert is_simplex_etf(found.frame, atol=1e-10).ok
    assert relative_error(found.frame, SVD().solve(linear).frame) < bound
    direction = torch.randn(num_classes, in_features, dtype=torch.float64)
    exact = torch.func.jvp(lambda x: nearest_etf(x, solver=SVD()), (linear.double(),), (direction,))[1]
    assert relative_error(polar_adjoint(direction, found), exact) < gradient_bound


def exact_adjoint(direction: Tensor, linear: Tensor, frame: Tensor) -> Tensor:
    """By an eigenbasis, for the frame as it is: for rank-deficient M the derivative depends on the frame."""
    state = SVD().solve(linear)
    basis, reciprocals = state.spectrum
    frame, change = frame.double(), direction.double() - direction.double().mean(0)
    inner = change @ frame.mT
    turned = basis @ ((basis.mT @ (inner - inner.mT) @ basis) * reciprocals) @ basis.mT
    return turned @ frame + state.inverse @ (change - (1 - 1 / len(frame)) * inner @ frame)


DEGENERATE = ["unseen", "coinciding", "all equal", "zero", "one seen", "in a plane", "exact simplex"]


def degenerate(kind: str, num_classes: int, in_features: int) -> Tensor:
    linear = torch.randn(num_classes, in_features)
    half = num_classes // 2
    if kind == "unseen":
        linear[half:] = 0
    elif kind == "coinciding":
        linear[half:] = linear[half]
    elif kind == "all equal":
        linear[:] = linear[0]
    elif kind == "zero":
        linear[:] = 0
    elif kind == "one seen":
        linear[1:] = 0
    elif kind == "in a plane":
        linear[:, 2:] = 0
    else:
        linear = simplex_etf(num_classes, in_features, rotation="haar")
    return linear


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize(("num_classes", "extra"), [(2, 0), (5, -1), (9, 20), (40, 3)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e30])
def test_any_rank_gives_a_simplex_and_the_minimum_norm_gradient(
    kind: str, num_classes: int, extra: int, scale: float
) -> None:
    linear = scale * degenerate(kind, num_classes, num_classes + extra)
    found = polar(linear)
    assert is_simplex_etf(found.frame, atol=1e-8).ok
    centered = linear.double() - linear.double().mean(0)
    exact = SVD().solve(linear).inverse @ centered
    assert float((found.inverse @ centered - exact).norm()) <= 1e-8 * float(exact.norm())
    direction = torch.randn(linear.shape)
    gradient, expected = polar_adjoint(direction, found), exact_adjoint(direction, linear, found.frame)
    assert float((gradient - expected).norm()) <= 1e-6 * float(expected.norm())


def test_members_of_a_batch_do_not_know_each_other() -> None:
    batch = torch.stack([degenerate(kind, 6, 9) for kind in DEGENERATE])
    batch = torch.stack([batch, torch.randn_like(batch)])
    found, direction = polar(batch), torch.randn_like(batch)
    gradient = polar_adjoint(direction, found)
    for i in range(2):
        for j in range(len(DEGENERATE)):
            alone = polar(batch[i, j])
            torch.testing.assert_close(found.frame[i, j], alone.frame, rtol=0, atol=1e-7)
            expected = polar_adjoint(direction[i, j], alone)
            torch.testing.assert_close(gradient[i, j], expected, rtol=1e-6, atol=1e-6)


def test_scale_and_translation_do_not_matter_at_the_ends_of_float32() -> None:
    means = torch.randn(5, 8)
    exact = SVD().solve(means).frame
    for moved in (1e-20 * means, 1e37 * means):
        assert relative_error(polar(moved).frame, exact) < 1e-6
    far = means.double() + 1e6
    assert relative_error(polar(far.float()).frame, SVD().solve(far.float()).frame) < 1e-9


def test_nan_is_refused() -> None:
    with pytest.raises(ConvergenceError, match="NaN, infinity or an overflow"):
        polar(torch.full((3, 4), torch.nan))


# As a solver.


def test_both_modes_and_second_derivatives_with_a_rank_that_is_missing() -> None:
    means = degenerate("coinciding", 5, 7).double()
    solve = GramRoot()
    assert adjoint_identity_error(lambda x: nearest_etf(x, solver=solve), means) < 1e-7


def test_transforms() -> None:
    means = torch.randn(3, 5, 8, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return nearest_etf(x, solver=GramRoot()).sin().sum()

    expected = torch.func.grad(lambda x: nearest_etf(x).sin().sum())(means)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(means), expected)


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    means = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(5, 8, dtype=torch.float64)

    def solve(x: Tensor) -> Tensor:
        return nearest_etf(x, solver=GramRoot())

    frame = torch.compile(solve, fullgraph=True, backend="aot_eager")(means)
    torch.testing.assert_close(frame, solve(means))
    (mine,), (theirs,) = (torch.autograd.grad(f, means, cotangent) for f in (frame, solve(means)))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_no_value_is_read(shape: tuple[int, ...]) -> None:
    # Fake tensors have none, and a branch on one is an error.
    with FakeTensorMode():
        direction = torch.empty(shape)
        state = polar(torch.empty(shape))
        assert polar_adjoint(direction, state).shape == shape


def test_a_head_trains_the_same() -> None:
    features, targets = torch.randn(30, 8, requires_grad=True), torch.arange(30) % 4
    heads = [  # one of the five classes is never seen
        NearestETFHead(8, 5, solver=solver, generator=torch.Generator().manual_seed(0))
        for solver in (GramRoot(), None)
    ]
    mine, theirs = (torch.autograd.grad(head(features, targets).sin().sum(), features)[0] for head in heads)
    torch.testing.assert_close(mine, theirs)


def test_where_the_kernel_cannot_run_it_says_so() -> None:
    options = {"device": "cpu", "dtype": torch.float32, "num_classes": 10, "in_features": 64}
    assert describe("polar", **options).impl == "numpy"
    assert describe("polar", **(options | {"num_classes": 40})).impl == "reference"
    with pytest.raises(InvalidArgumentError, match="impl='triton' cannot run polar"):
        nearest_etf(torch.randn(10, 64), solver=GramRoot(impl="triton"))
    with pytest.raises(InvalidArgumentError, match="GramRoot records no operations"):
        torch.func.jvp(
            lambda x: nearest_etf(x, solver=GramRoot(), adjoint=Unrolled()), (torch.eye(3),), (torch.eye(3),)
        )


# On a GPU.


@pytest.fixture
def no_sync() -> Iterator[Callable[[], None]]:
    """Call it to make each wait for the device an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


SHAPES = [(10, 512), (16, 16), (32, 2048), (33, 64), (100, 512), (300, 512)]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
@pytest.mark.parametrize("kappa", [1.0, 5.0, 1e3])
def test_on_a_gpu_against_an_svd(
    num_classes: int, in_features: int, kappa: float, impl: str, no_sync: Callable[[], None]
) -> None:
    means = means_with_condition(num_classes, in_features, kappa, dtype=torch.float32)
    cotangent = torch.randn(num_classes, in_features)
    device = means.cuda().requires_grad_()
    device_cotangent = cotangent.cuda()
    solver = ByRegime() if impl == "auto" else GramRoot(impl="reference")
    nearest_etf(device, solver=solver)  # compiles the kernel
    no_sync()
    frame = nearest_etf(device, solver=solver)
    (gradient,) = torch.autograd.grad(frame, device, device_cotangent)
    torch.cuda.set_sync_debug_mode("default")
    wide = means.double().requires_grad_()
    exact = nearest_etf(wide, solver=SVD())
    (exact_gradient,) = torch.autograd.grad(exact, wide, cotangent.double())
    assert relative_error(frame.cpu(), exact) < 2e-6
    assert relative_error(gradient.cpu(), exact_gradient) < 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("num_classes", [9, 40])
def test_any_rank_on_a_gpu(kind: str, num_classes: int) -> None:
    means = degenerate(kind, num_classes, num_classes + 3).cuda().requires_grad_()
    frame = nearest_etf(means)
    assert is_simplex_etf(frame).ok
    cotangent = torch.randn_like(frame)
    (gradient,) = torch.autograd.grad(frame, means, cotangent)
    expected = exact_adjoint(cotangent.cpu(), means.detach().cpu(), frame.detach().double().cpu())
    assert float((gradient.cpu() - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.gpu
def test_second_derivative_on_a_gpu() -> None:
    results = []
    means, cotangent = torch.randn(6, 9), torch.randn(6, 9)
    for device in ("cuda", "cpu"):
        x = means.to(device).requires_grad_()
        (first,) = torch.autograd.grad(nearest_etf(x), x, cotangent.to(device), create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append(second.cpu())
    assert relative_error(results[0], results[1]) < 1e-5


def training_step(num_classes: int, *, autocast: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 128)).cuda()
    head = NearestETFHead(128, num_classes, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    inputs = torch.randn(64, 20, device="cuda")
    targets = torch.arange(64, device="cuda") % num_classes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = F.cross_entropy(head(model(inputs), targets), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return nn.ModuleList([model, head]), step


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_a_training_step_in_a_graph_and_without_a_sync(
    num_classes: int, autocast: bool, no_sync: Callable[[], None]
) -> None:
    _, eager = training_step(num_classes, autocast=autocast)
    expected = [float(eager()) for _ in range(8)]
    _, step = training_step(num_classes, autocast=autocast)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        no_sync()
        for _ in range(3):
            step()
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    found = []
    for _ in range(5):
        graph.replay()
        found.append(float(loss))
    # Capturing does not run: the replays are the steps after the first three.
    torch.testing.assert_close(found, expected[3:], rtol=2e-2 if autocast else 1e-4, atol=1e-5)
    assert expected[-1] < expected[0]


@pytest.mark.gpu
@pytest.mark.parametrize("num_classes", [10, 100])
def test_compiled_on_a_gpu(num_classes: int) -> None:
    means = torch.randn(num_classes, 128, device="cuda", requires_grad=True)
    cotangent = torch.randn_like(means)
    compiled = torch.compile(nearest_etf, fullgraph=True)
    mine, theirs = compiled(means), nearest_etf(means)
    assert relative_error(mine, theirs) < 1e-6
    (a,), (b,) = (torch.autograd.grad(frame, means, cotangent) for frame in (mine, theirs))
    assert relative_error(a, b) < 1e-6


@pytest.mark.gpu
def test_transforms_on_a_gpu() -> None:
    means = torch.randn(3, 5, 8, device="cuda")

    def loss(x: Tensor) -> Tensor:
        return nearest_etf(x, adjoint=Implicit()).sin().sum()

    expected = torch.func.grad(lambda x: nearest_etf(x).sin().sum())(means.cpu())
    mine = torch.func.vmap(torch.func.grad(loss))(means)
    torch.testing.assert_close(mine.cpu(), expected, rtol=1e-5, atol=1e-6)


NAN = """
import torch
from etflayers.kernels.polar import polar
polar(torch.full((3, 4), torch.nan, device="cuda"), impl={impl!r})
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nan_is_asserted_on(impl: str) -> None:
    # An assertion on the device ends the CUDA context, so it needs a process of its own.
    done = subprocess.run([sys.executable, "-c", NAN.format(impl=impl)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "nearest simplex ETF" in done.stderr + done.stdout


def test_svd_frame_is_the_oracle() -> None:
    # What the tests above trust, against plain autograd.
    means = means_with_condition(4, 6, 3.0)
    assert relative_error(SVD().solve(means).frame, svd_frame(means)) < 1e-13
