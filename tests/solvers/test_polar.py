import numpy as np
import pytest
import torch
from scipy import linalg

from etflayers.errors import NonFiniteError
from etflayers.geometry import centered_basis_adjoint, centered_basis_apply, etf_radius, is_simplex_etf
from etflayers.solvers import QRSVD, SVD, ByRegime, GramEigh, GramRoot, NewtonSchulz
from etflayers.testing import means_with_condition, relative_error

ANY_RANK = [SVD(), QRSVD(), ByRegime()]
SOLVERS = [*ANY_RANK, GramEigh(), NewtonSchulz(), GramRoot()]
SHAPES = [(2, 1), (2, 5), (5, 4), (5, 5), (5, 9), (40, 39), (40, 64)]


def scipy_frame(linear):
    factor, _ = linalg.polar(centered_basis_apply(linear).numpy())
    return etf_radius(len(linear)) * centered_basis_adjoint(torch.from_numpy(np.ascontiguousarray(factor)))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
def test_frame_agrees_with_scipy_polar(solver, num_classes, in_features):
    linear = means_with_condition(num_classes, in_features, 50.0)
    assert relative_error(solver.solve(linear).frame, scipy_frame(linear)) < 1e-11


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize(("num_classes", "in_features"), SHAPES)
def test_a_state_answers_by_its_definitions(solver, num_classes, in_features):
    linear = torch.randn(3, num_classes, in_features, dtype=torch.float64) + 5
    state = solver.solve(linear)
    frame, inverse, *_ = state.tensors()
    centered = linear - linear.mean(-2, keepdim=True)
    left, values, _ = torch.linalg.svd(centered, full_matrices=False)
    radius = etf_radius(num_classes)
    root = radius * left @ torch.diag_embed(values) @ left.mT
    exact = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(centered @ frame.mT, root, **exact)
    # `inverse` may hold anything along 1: compare what it does to centered rows, which is all it is used for.
    torch.testing.assert_close(inverse @ root @ centered, radius**2 * centered, **exact)
    torch.testing.assert_close(inverse @ centered, frame, **exact)
    # Y solves T Y + Y T = B for a B
    # that does not see 1.
    rhs = centered @ torch.randn(3, in_features, num_classes, dtype=torch.float64)
    rhs = rhs - rhs.mean(-1, keepdim=True)
    solution = state.solve_sylvester(rhs)
    torch.testing.assert_close(root @ solution + solution @ root, rhs, **exact)


@pytest.mark.parametrize("kappa", [1.0, 4.9, 5.1, 31.0, 33.0, 1e3, 9e4, 2e5, 1e6])
@pytest.mark.parametrize("num_classes", [5, 40])
def test_every_regime_of_float32_is_accurate(kappa, num_classes):
    # One unit in the last place of the data already moves the exact frame by about eps * kappa, so the bound
    # is on the frame of exactly these float32 numbers.
    linear = means_with_condition(num_classes, 64, kappa, dtype=torch.float32)
    assert relative_error(ByRegime().solve(linear).frame, scipy_frame(linear.double())) < 2e-6


def test_regime_chooses_precision_by_condition():
    def precisions(kappa, num_classes):
        """Of the products, and whether the eigenproblem was solved in float64."""
        linear = means_with_condition(num_classes, 64, kappa, dtype=torch.float32)
        state = ByRegime().solve(linear)
        exact = GramEigh(torch.float64).solve(linear)
        same = torch.equal(state.spectrum.basis.double(), exact.spectrum.basis.to(state.dtype).double())
        return state.dtype, same

    assert precisions(3.0, 40) == (torch.float32, False)
    assert precisions(30.0, 40) == (torch.float32, True)  # 20 d / K = 32
    assert precisions(40.0, 40) == (torch.float64, True)
    assert precisions(3.0, 5)[0] == torch.float64


@pytest.mark.parametrize(
    ("kappa", "num_classes", "expected"),
    [(3.0, 40, [torch.float32]), (10.0, 40, [torch.float64]), (100.0, 40, [torch.float64])],
)
def test_no_eigenproblem_is_solved_in_vain(kappa, num_classes, expected, monkeypatch):
    solved = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: solved.append(gram.dtype) or eigh(gram))
    ByRegime().solve(means_with_condition(num_classes, 512, kappa, dtype=torch.float32))
    assert solved == expected


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1.0, 1e12, 1e18, 1e30])
@pytest.mark.parametrize("spikes", [1, 30])
def test_a_wrong_guess_of_the_condition_costs_no_digit(spikes, factor):
    # Two singular values only, 1 and kappa: dispersed beyond the bound at kappa 4 where few are large, and
    # within it at kappa 100 where nearly all are.
    kappa = 4.0 if spikes == 1 else 100.0
    left, right = torch.linalg.qr(torch.randn(40, 40))[0], torch.linalg.qr(torch.randn(64, 40))[0]
    linear = (
        factor * (left[:, :39] * torch.tensor([kappa] * spikes + [1.0] * (39 - spikes))) @ right[:, :39].mT
    )
    assert relative_error(ByRegime().solve(linear).frame, scipy_frame(linear.double())) < 2e-6


@pytest.mark.parametrize("solver", ANY_RANK, ids=repr)
@pytest.mark.parametrize("num_classes", [5, 40, 520])
@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e38])
def test_nothing_overflows_at_the_ends_of_float32(solver, num_classes, factor):
    linear = factor * torch.rand(num_classes, num_classes + 8)
    state = solver.solve(linear)
    assert is_simplex_etf(state.frame.double(), atol=1e-5).ok
    assert all(bool(torch.isfinite(part.float()).all()) for part in state.tensors())


def test_gram_refuses_rank_deficient_rows():
    linear = torch.randn(4, 6).index_fill(0, torch.tensor([1, 2]), 0.0)
    with pytest.raises(NonFiniteError, match=r"solver=GramEigh\(\) needs class means of full rank"):
        GramEigh().solve(linear)


@pytest.mark.parametrize("solver", ANY_RANK, ids=repr)
@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("in_features", [8, 24])  # without and with a QR decomposition in the default
def test_rank_deficient_rows_still_give_a_simplex(solver, rank, in_features):
    linear = torch.randn(5, rank, dtype=torch.float64) @ torch.randn(rank, in_features, dtype=torch.float64)
    state = solver.solve(linear)
    assert is_simplex_etf(state.frame).ok
    assert all(bool(torch.isfinite(part).all()) for part in state.tensors())
