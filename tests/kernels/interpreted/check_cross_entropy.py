"""The cross-entropy kernels, interpreted, against ``F.cross_entropy`` in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from etflayers.functional import canonical_etf_logits, code_cross_entropy, etf_cross_entropy
from etflayers.kernels.cross_entropy import triton as kernels

IGNORE = -100
EPS = torch.finfo(torch.float32).eps


def problem(
    batch: int, width: int, classes: int, dtype: torch.dtype, mean: float = 0.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + width + classes)
    features = (torch.randn(batch, width, generator=generator) + mean).to(dtype)
    targets = torch.randint(classes, (batch,), generator=generator)
    targets[1::5] = IGNORE
    return features, targets


def loss_and_gradient(loss: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    point = features.detach().clone().requires_grad_()
    value = loss(point)
    (gradient,) = torch.autograd.grad(value.sum(), point)
    return value.detach(), gradient


@pytest.mark.parametrize(
    ("dtype", "smoothing"),
    [(torch.float32, 0.0), (torch.float32, 0.1), (torch.bfloat16, 0.1), (torch.float16, 0.0)],
)
@pytest.mark.parametrize(
    ("batch", "width", "classes", "mean"),
    [
        (7, 12, 10, 0.0),
        (2, 5000, 5000, 0.0),  # more than one block of columns
        (20, 2, 2, 0.0),  # more than one block of rows
        (5, 40, 3, 100.0),  # a mean that the softmax does not see
    ],
)
def test_losses_and_gradients(
    batch: int, width: int, classes: int, mean: float, smoothing: float, dtype: torch.dtype
) -> None:
    features, targets = problem(batch, width, classes, dtype, mean)
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "none"}

    def head(rows: Tensor) -> Tensor:
        return F.cross_entropy(3 * canonical_etf_logits(rows, classes), targets, **options)

    def kernel(rows: Tensor) -> Tensor:
        return etf_cross_entropy(rows, targets, classes, scale=3.0, impl="triton", **options)

    exact, exact_gradient = loss_and_gradient(head, features.double())
    eager, eager_gradient = loss_and_gradient(head, features.float())
    found, gradient = loss_and_gradient(kernel, features)

    assert found.dtype == torch.float32
    assert gradient.dtype == dtype
    # The floor of a loss is one rounding of its largest term, of a gradient one of its entries.
    budget = 2 * (eager - exact).abs().max() + 4 * EPS * exact.abs().max()
    assert (found - exact).abs().max() <= budget
    rounding = torch.finfo(dtype).eps * exact_gradient.abs().max()
    budget = 2 * (eager_gradient - exact_gradient).abs().max() + rounding
    assert (gradient.double() - exact_gradient).abs().max() <= budget


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_and_leading_dimensions(reduction: Any) -> None:
    features, targets = problem(12, 6, 5, torch.float32)
    point = features.view(3, 4, 6)
    loss = etf_cross_entropy(point, targets.view(3, 4), 5, reduction=reduction, impl="triton")
    expected = F.cross_entropy(canonical_etf_logits(features, 5), targets, reduction=reduction)
    torch.testing.assert_close(loss, expected)


def test_nan_in_an_ignored_row_reaches_neither_loss_nor_gradient() -> None:
    features = torch.tensor([[torch.nan] * 4, [0.5, 0.0, 0.0, 1.0]], requires_grad=True)
    loss = etf_cross_entropy(features, torch.tensor([IGNORE, 0]), 3, label_smoothing=0.1, impl="triton")
    (gradient,) = torch.autograd.grad(loss, features)
    assert bool(torch.isfinite(loss))
    assert gradient[0].tolist() == [0.0] * 4
    assert gradient[1, 3] == 0


def test_nan_elsewhere_is_seen_in_the_loss() -> None:
    features = torch.tensor([[0.0, torch.nan, 0.0]])
    assert bool(etf_cross_entropy(features, torch.tensor([0]), 3, impl="triton").isnan())


@pytest.mark.parametrize("bad", [5, -1])
def test_targets_out_of_range_are_asserted_on(bad: int) -> None:
    features, targets = problem(6, 6, 5, torch.float32)
    targets[2] = bad
    with pytest.raises(Exception, match="targets must be class indices"):
        etf_cross_entropy(features, targets, 5, impl="triton")


def test_strided_rows_and_targets() -> None:
    features, targets = problem(12, 10, 4, torch.float32)
    for rows in (features[::2, 1:7], features.T.contiguous().T[::2]):
        found = loss_and_gradient(lambda f: etf_cross_entropy(f, targets[::2], 4, impl="triton"), rows)
        expected = loss_and_gradient(lambda f: etf_cross_entropy(f, targets[::2], 4), rows)
        torch.testing.assert_close(found, expected)
    wide = features.expand(2, 12, 10).transpose(0, 1)[:, 1]
    torch.testing.assert_close(
        etf_cross_entropy(wide, targets, 4, impl="triton"), etf_cross_entropy(features, targets, 4)
    )


def test_second_derivatives_and_forward_mode() -> None:
    features, targets = problem(4, 5, 4, torch.float32)
    direction = torch.randn(4, 5)

    def loss(impl: Any) -> Any:
        return lambda f: etf_cross_entropy(f, targets, 4, label_smoothing=0.1, impl=impl)

    kernel = torch.autograd.functional.hvp(loss("triton"), features, direction)[1]
    torch.testing.assert_close(
        kernel, torch.autograd.functional.hvp(loss("reference"), features, direction)[1]
    )
    with torch.autograd.forward_ad.dual_level():
        dual = loss("triton")(torch.autograd.forward_ad.make_dual(features, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(loss("reference"), (features,), (direction,))[1])


def test_compiles_as_one_graph() -> None:
    features, targets = problem(6, 5, 4, torch.float32)
    frame = torch.randn(4, 5)

    def losses(f: Tensor) -> Tensor:
        canonical = etf_cross_entropy(f, targets, 4, impl="triton")
        return canonical + code_cross_entropy(f, frame, targets, chunk_size=4, impl="triton")

    def plain(f: Tensor) -> Tensor:
        return F.cross_entropy(canonical_etf_logits(f, 4), targets) + F.cross_entropy(f @ frame.T, targets)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradient(plain, features)
    torch.testing.assert_close(loss_and_gradient(losses, features), expected)
    torch.testing.assert_close(loss_and_gradient(compiled, features), expected)


def test_operators_are_registered_properly() -> None:
    features, targets = problem(4, 5, 4, torch.float32)
    torch.library.opcheck(kernels.softmax_losses, (features, targets, 4, 2.0, 0.1, IGNORE))
    row = torch.randn(4)
    torch.library.opcheck(kernels.softmax_gradient, (features, targets, row, row, row, 4, 2.0, 0.1, IGNORE))
