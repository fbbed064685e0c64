"""The Walsh-Hadamard transform against SciPy's matrix, and its derivatives."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError
from etflayers.kernels.hadamard import api, hadamard_transform

SIZES = [1, 2, 16, 64, 128, 256, 2048]


def matrix(size: int) -> Tensor:
    return torch.tensor(scipy.linalg.hadamard(size), dtype=torch.float64) / math.sqrt(size)


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 0), (2, 3)])
def test_is_the_product_with_the_hadamard_matrix_and_its_own_inverse(
    size: int, leading: tuple[int, ...]
) -> None:
    x = sample(*leading, size)
    found = hadamard_transform(x)
    torch.testing.assert_close(found, x @ matrix(size), rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard_transform(found), x, rtol=0, atol=1e-13)


def test_rows_may_lie_apart_in_memory() -> None:
    x = sample(256, 6).mT[::2]
    torch.testing.assert_close(hadamard_transform(x), x @ matrix(256), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [4, 128])
def test_derivatives_in_both_modes_and_batched(size: int) -> None:
    x = sample(2, size).requires_grad_()
    assert torch.autograd.gradcheck(
        hadamard_transform, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(lambda x: hadamard_transform(x).square(), x)
    jacobian = torch.func.jacrev(hadamard_transform)(x[0].detach())
    torch.testing.assert_close(jacobian, matrix(size), rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.func.jacfwd(hadamard_transform)(x[0].detach()), jacobian)
    across = torch.vmap(hadamard_transform, in_dims=1)(sample(size, 3))
    torch.testing.assert_close(across, sample(size, 3).mT @ matrix(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_at_the_end_and_autocast_changes_nothing(dtype: torch.dtype) -> None:
    x = sample(4, 256).to(dtype)
    exact = x.double() @ matrix(256)
    with torch.autocast("cpu", torch.bfloat16):
        found, single = hadamard_transform(x), hadamard_transform(x.float())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [32, 256])
def test_compiles_into_one_graph_with_its_gradient(size: int) -> None:
    x = sample(3, size).requires_grad_()
    compiled = torch.compile(lambda x: hadamard_transform(2 * x), backend="aot_eager", fullgraph=True)
    found = compiled(x)
    torch.testing.assert_close(found, 2 * x @ matrix(size))
    (grad,) = torch.autograd.grad(found[0, 1], x)
    torch.testing.assert_close(grad[0], 2 * matrix(size)[1])


def test_a_matrix_made_in_inference_mode_serves_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_matrices", {})
    x = sample(2, 16)
    with torch.inference_mode():
        hadamard_transform(x)
    (kept,) = api._matrices.values()
    assert not kept.is_inference()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(hadamard_transform(x).sum(), x)
    torch.testing.assert_close(grad, torch.ones_like(x) @ matrix(16))
    assert len(api._matrices) == 1


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, 12), "power of two, got shape .3, 12.*pad it with zeros"),
        (torch.ones(()), "power of two"),
        (torch.ones(2, 0), "power of two"),
        (torch.ones(4, dtype=torch.int64), "x must have a real floating-point dtype"),
    ],
)
def test_bad_input_is_named(x: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        hadamard_transform(x)
