"""The steps that read no value; the solver that reads them is tested in ``tests/solvers``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from etflayers.linalg.newton_schulz import indicator, inverse_root, refine, schedule
from etflayers.testing import relative_error


@pytest.mark.parametrize("smallest", [0.9, 0.05, 0.03, 1e-3, 1e-6])
def test_a_schedule_brings_its_interval_near_one(smallest: float) -> None:
    x = torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), 20_001, dtype=torch.float64)
    for a, b, c in schedule(smallest):
        x = x * (a + b * x.square() + c * x.pow(4))
        # No value of those that have arrived is sent far away again, where it would lose digits.
        assert float(x.max()) < 1 + 1e-12
    assert float(x.min()) > 0.9869


def spectrum(*values: float) -> tuple[Tensor, Tensor]:
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return torch.tensor(values, dtype=torch.float64), basis


def test_roots_and_the_projector_on_what_is_present() -> None:
    values, basis = spectrum(1.0, 0.5, 1e-3, 1e-6, 0.0, 1e-17)
    gram = basis @ torch.diag(values) @ basis.T
    root, inverse = inverse_root(gram, 1e-4)
    present = indicator(inverse @ root)
    present = present.T @ present
    torch.testing.assert_close(present, basis[:, :4] @ basis[:, :4].T, rtol=0, atol=1e-10)
    root, inverse = refine(root @ present, present @ inverse @ present)
    kept = basis[:, :4]
    torch.testing.assert_close(root, kept @ torch.diag(values[:4].sqrt()) @ kept.T, rtol=0, atol=1e-10)
    exact = kept @ torch.diag(values[:4].rsqrt()) @ kept.T
    # An error eps of G is one of eps / lambda, relative to lambda^(-1/2).
    assert relative_error(inverse, exact) < 1e-9
