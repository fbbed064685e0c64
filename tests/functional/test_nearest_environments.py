"""The node where users put it: autocast, half precision, torch.compile, torch.func, a stripped-down batch."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from etflayers import nearest_etf, simplex_etf
from etflayers.adjoints import Unrolled
from etflayers.errors import NonFiniteError
from etflayers.functional import solve_nearest_etf
from etflayers.geometry import is_simplex_etf
from etflayers.solvers import SVD, ByRegime, GramEigh
from etflayers.testing import relative_error


def loss(means):
    return nearest_etf(means).sin().sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    means = torch.randn(10, 32).to(dtype).requires_grad_()
    frame = nearest_etf(means)
    assert frame.dtype == dtype
    expected = nearest_etf(means.detach().float())
    assert torch.equal(frame, expected.to(dtype))
    frame.float().sin().sum().backward()
    assert means.grad.dtype == dtype
    assert means.grad.isfinite().all()


@pytest.mark.parametrize("num_classes", [10, 40])
def test_autocast_changes_nothing(num_classes):
    means = torch.randn(num_classes, 64, requires_grad=True)
    anchor = simplex_etf(num_classes, 64)
    weights = torch.rand(num_classes) + 0.1

    def run():
        frame = nearest_etf(means, weights=weights, anchor=anchor, proximity=0.1)
        return frame, *torch.autograd.grad(frame, means, torch.ones_like(frame) * anchor)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run()
        assert solve_nearest_etf(means).residual < 1e-5
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_torch_func_transforms_agree_with_autograd():
    means = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(jacrev(nearest_etf)(means), jacfwd(nearest_etf)(means))
    torch.testing.assert_close(hessian(loss)(means), torch.autograd.functional.hessian(loss, means))
    batch = torch.randn(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(vmap(nearest_etf)(batch), nearest_etf(batch))
    torch.testing.assert_close(vmap(grad(loss))(batch), grad(loss)(batch))
    torch.testing.assert_close(
        vmap(nearest_etf, in_dims=1, out_dims=1)(batch.transpose(0, 1)), nearest_etf(batch).transpose(0, 1)
    )


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", [None, SVD(), GramEigh(), ByRegime()], ids=repr)
def test_compile_full_graph(backend, solver):
    def solve(means, weights, anchor, proximity):
        return nearest_etf(means, weights=weights, anchor=anchor, proximity=proximity, solver=solver)

    arguments = [torch.randn(5, 8), torch.rand(5) + 0.1, simplex_etf(5, 8), torch.tensor(0.3)]
    arguments = [a.requires_grad_() for a in arguments]
    compiled = torch.compile(solve, fullgraph=True, backend=backend)
    cotangent = torch.randn(5, 8)
    mine, theirs = compiled(*arguments), solve(*arguments)
    assert relative_error(mine, theirs) < 1e-6
    for a, b in zip(
        torch.autograd.grad(mine, arguments, cotangent),
        torch.autograd.grad(theirs, arguments, cotangent),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "transform", [grad(loss), vmap(grad(loss)), jacfwd(nearest_etf), jacrev(nearest_etf)]
)
def test_compile_of_transforms(backend, transform):
    means = torch.randn(3, 4, 6, dtype=torch.float64)
    compiled = torch.compile(transform, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(means), transform(means))


def test_compile_of_the_record_and_of_unrolled():
    means = torch.randn(5, 8, dtype=torch.float64)
    record = torch.compile(lambda x: solve_nearest_etf(x).frame, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(record(means), nearest_etf(means))
    unrolled = torch.compile(
        lambda x: nearest_etf(x, adjoint=Unrolled()), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(unrolled(means), nearest_etf(means))


def test_compiled_node_still_refuses_nan():
    compiled = torch.compile(nearest_etf, fullgraph=True, backend="aot_eager")
    means = torch.randn(4, 6)
    compiled(means)
    means[0, 0] = torch.nan
    with pytest.raises((RuntimeError, NonFiniteError), match=r"NaN or infinity|non-finite"):
        compiled(means)


def test_empty_batch():
    frame = nearest_etf(torch.randn(0, 4, 6))
    assert frame.shape == (0, 4, 6)


def test_inputs_are_not_modified():
    means, weights, anchor = torch.randn(4, 6), torch.rand(4), torch.randn(4, 6)
    copies = [t.clone() for t in (means, weights, anchor)]
    nearest_etf(means, weights=weights, anchor=anchor, proximity=0.5)
    for tensor, copy in zip((means, weights, anchor), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_non_contiguous_and_expanded_means():
    means = torch.randn(6, 4).T
    assert is_simplex_etf(nearest_etf(means)).ok
    torch.testing.assert_close(nearest_etf(means), nearest_etf(means.contiguous()))
    batch = means.expand(3, 4, 6)
    torch.testing.assert_close(nearest_etf(batch)[2], nearest_etf(means))
