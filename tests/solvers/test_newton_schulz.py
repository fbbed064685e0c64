"""The iteration itself; as one of the solvers it is tested in test_polar.py and with every adjoint."""

import pytest
import torch
from torch.func import grad, vmap

from etflayers import NearestETFHead, nearest_etf, simplex_etf
from etflayers.adjoints import Implicit, Unrolled
from etflayers.errors import ConvergenceError, InvalidArgumentError
from etflayers.geometry import is_simplex_etf
from etflayers.solvers import SVD, NewtonSchulz
from etflayers.solvers.newton_schulz import _minimax
from etflayers.testing import means_with_condition, relative_error, svd_frame


def step(x, scale):
    return scale * x * (3 - (scale * x) ** 2) / 2


@pytest.mark.parametrize("low", [1e-4, 0.1, 0.5, 0.99])
def test_no_other_scale_maps_the_interval_to_a_narrower_one(low):
    points = torch.linspace(low, 1, 20_001, dtype=torch.float64)

    def ratio(scale):
        image = step(points, scale)
        return float(image.min() / image.max())

    scale, new_low = _minimax(low)
    assert ratio(scale) == pytest.approx(new_low, abs=1e-6)
    others = [ratio(scale * factor) for factor in torch.linspace(0.5, 1.5, 401).tolist()]
    assert max(others) <= new_low + 1e-6


@pytest.mark.parametrize("kappa", [1.0, 1.1, 10.0, 1e3, 1e5])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4])
def test_a_wrong_guess_of_the_condition_costs_steps_and_not_accuracy(kappa, condition):
    means = means_with_condition(20, 32, kappa, dtype=torch.float32)
    frame = NewtonSchulz(condition=condition, max_steps=40).frame(means)
    # kappa^2 eps of the Gram matrix in float64
    assert relative_error(frame, SVD().solve(means).frame) < 1e-13 + 1e-16 * kappa**2


def test_single_precision_serves_near_collapse():
    means = means_with_condition(60, 100, 3.0, dtype=torch.float32)
    frame = NewtonSchulz(dtype=torch.float32).frame(means)
    assert frame.dtype == torch.float32
    assert relative_error(frame, svd_frame(means.double())) < 2e-6


@pytest.mark.parametrize(
    ("solver", "means"),
    [
        (NewtonSchulz(), torch.randn(4, 6).index_fill(0, torch.tensor([1, 2]), 0.0)),
        (NewtonSchulz(), torch.zeros(4, 6)),
        (NewtonSchulz(dtype=torch.float32), means_with_condition(10, 20, 1e3, dtype=torch.float32)),
        (NewtonSchulz(max_steps=3), means_with_condition(10, 20, 1e3)),
    ],
    ids=["rank-deficient", "zero", "precision too low", "too few steps"],
)
def test_refuses_what_it_cannot_solve(solver, means):
    with pytest.raises(ConvergenceError, match=r"NewtonSchulz\(\) did not reach .*use solver=SVD\(\) or the"):
        nearest_etf(means, solver=solver)


@pytest.mark.parametrize("option", ["condition", "max_steps"])
def test_bad_options_are_named(option):
    with pytest.raises(InvalidArgumentError, match=f"{option} must be at least 1, got 0"):
        NewtonSchulz(**{option: 0})


def test_one_bad_member_of_a_batch_is_enough():
    means = torch.randn(3, 4, 6)
    means[1, 2] = means[1, 3]
    with pytest.raises(ConvergenceError):
        nearest_etf(means, solver=NewtonSchulz())


def test_where_nothing_can_be_raised_a_wrong_frame_is_nan():
    means = torch.randn(3, 4, 6)
    means[1, 2] = means[1, 3]
    frames = vmap(lambda x: nearest_etf(x, solver=NewtonSchulz(), adjoint=Unrolled()))(means)
    assert frames[1].isnan().all()
    assert is_simplex_etf(frames[[0, 2]]).ok


@pytest.mark.parametrize("adjoint", [pytest.param(Implicit(), marks=pytest.mark.slow), Unrolled()], ids=repr)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(adjoint, backend):
    def solve(means):
        return nearest_etf(means, solver=NewtonSchulz(max_steps=8), adjoint=adjoint)

    means = (torch.eye(5, 8) + 0.1 * torch.randn(5, 8)).requires_grad_()
    cotangent = torch.randn(5, 8)
    compiled = torch.compile(solve, fullgraph=True, backend=backend)
    assert relative_error(compiled(means), solve(means)) < 1e-6
    (mine,) = torch.autograd.grad(compiled(means), means, cotangent)
    (theirs,) = torch.autograd.grad(solve(means), means, cotangent)
    assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=repr)
def test_transforms_of_torch_func(adjoint):
    def loss(means):
        return nearest_etf(means, solver=NewtonSchulz(), adjoint=adjoint).sin().sum()

    means = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = grad(lambda x: nearest_etf(x).sin().sum())(means)
    torch.testing.assert_close(vmap(grad(loss))(means), expected)


def test_unrolled_gradient_is_exact_at_neural_collapse():
    means = simplex_etf(6, 8, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(6, 8, dtype=torch.float64)
    frame = nearest_etf(means, solver=NewtonSchulz(), adjoint=Unrolled())
    (unrolled,) = torch.autograd.grad(frame, means, cotangent)
    (exact,) = torch.autograd.grad(nearest_etf(means), means, cotangent)
    assert relative_error(unrolled, exact) < 1e-12


@pytest.mark.parametrize("num_classes", [5, 40])
@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e38])
def test_nothing_overflows_at_the_ends_of_float32(num_classes, factor):
    means = factor * torch.rand(num_classes, num_classes + 8)
    frame = nearest_etf(means, solver=NewtonSchulz())
    assert is_simplex_etf(frame).ok
    assert relative_error(frame, SVD().solve(means).frame) < 1e-6


def test_autocast_changes_nothing():
    means = torch.randn(10, 16)
    expected = nearest_etf(means, solver=NewtonSchulz())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_etf(means, solver=NewtonSchulz()), expected)


def test_empty_batch():
    assert nearest_etf(torch.randn(0, 4, 6), solver=NewtonSchulz()).shape == (0, 4, 6)


def test_serves_a_head():
    torch.manual_seed(0)
    features, targets = torch.randn(30, 8, requires_grad=True), torch.arange(30) % 5
    heads = [
        NearestETFHead(8, 5, solver=solver, generator=torch.Generator().manual_seed(0))
        for solver in (NewtonSchulz(), None)
    ]
    mine, theirs = (torch.autograd.grad(head(features, targets).sin().sum(), features)[0] for head in heads)
    torch.testing.assert_close(mine, theirs)
