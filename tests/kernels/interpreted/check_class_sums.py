"""The class-sum kernels, interpreted, against sums in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from etflayers.functional import class_means, class_sums
from etflayers.kernels import class_sums as dispatch
from etflayers.kernels.class_sums import triton as kernels
from etflayers.nn import FeatureMovingAverage, averages

IGNORE = -100
EPS = torch.finfo(torch.float32).eps


def problem(batch: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + width + classes)
    features = (torch.randn(batch, width, generator=generator) + 3).to(dtype)
    targets = torch.randint(classes, (batch,), generator=generator)
    targets[::7] = IGNORE
    return features, targets


def members(targets: Tensor, classes: int, ignore_index: int = IGNORE) -> Tensor:
    return ((targets[:, None] == torch.arange(classes)) & (targets != ignore_index)[:, None]).double()


def within_budget(found: Tensor, eager: Tensor, exact: Tensor, floor: float) -> None:
    """The kernel may be twice as wrong as eager float32, or as wrong as rounding the answer is."""
    assert bool(torch.isfinite(found).all())
    error = (found.double() - exact).abs().max()
    budget = 2 * (eager.double() - exact).abs().max() + floor
    assert error <= budget, f"error {error:.2e} > {budget:.2e}"


@pytest.mark.parametrize(
    ("batch", "width", "classes", "dtype"),
    [
        (50, 33, 5, torch.float32),
        (50, 33, 5, torch.bfloat16),
        (50, 33, 5, torch.float16),
        (1, 1, 1, torch.float32),
        (600, 5, 3, torch.float32),  # more than one block of targets, more rows of a class than fit in a list
        (40, 130, 2, torch.bfloat16),  # more than one block of columns
        (10, 4, 20, torch.float32),  # most classes absent
    ],
)
def test_sums_counts_and_gradient(batch: int, width: int, classes: int, dtype: torch.dtype) -> None:
    features, targets = problem(batch, width, classes, dtype)
    features.requires_grad_()
    one_hot = members(targets, classes)

    sums, counts = class_sums(features, targets, classes, impl="triton")

    exact = one_hot.T @ features.detach().double()
    eager, _ = class_sums(features.detach(), targets, classes, impl="reference")
    within_budget(sums.detach(), eager, exact, floor=EPS * exact.abs().max().item())
    assert sums.dtype == torch.float32
    assert counts.dtype == torch.int64
    torch.testing.assert_close(counts, one_hot.sum(0).long())
    cotangent = torch.randn(classes, width)
    (gradient,) = torch.autograd.grad(sums, features, cotangent)
    assert gradient.dtype == dtype
    # A copy of a row, rounded once; the interpreter cuts digits off bfloat16 where a GPU rounds.
    rtol = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(gradient, (one_hot.float() @ cotangent).to(dtype), rtol=rtol, atol=0)


def test_the_same_input_gives_the_same_bits() -> None:
    features, targets = problem(70, 9, 3, torch.float32)
    first, again = (class_sums(features, targets, 3, impl="triton")[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_targets_of_any_integer_type_and_an_ignored_class(dtype: torch.dtype) -> None:
    features, targets = problem(30, 3, 4, torch.float32)
    targets = targets.clamp(min=0).to(dtype)
    for ignore_index in (IGNORE, 1):
        sums, counts = class_sums(features, targets, 4, ignore_index=ignore_index, impl="triton")
        one_hot = members(targets.long(), 4, ignore_index)
        torch.testing.assert_close(counts, one_hot.sum(0).long())
        torch.testing.assert_close(sums.double(), one_hot.T @ features.double(), rtol=1e-5, atol=1e-5)


def test_strided_rows_and_targets() -> None:
    features, targets = problem(40, 12, 3, torch.float32)
    for rows in (features[::2, :5], features.T.contiguous().T[::2, 3:]):
        sums, counts = class_sums(rows, targets[::2], 3, impl="triton")
        expected = class_sums(rows, targets[::2], 3)
        torch.testing.assert_close((sums, counts), expected, rtol=1e-5, atol=1e-5)


def test_empty_and_entirely_ignored_batches_give_zeros() -> None:
    for features, targets in [
        (torch.ones(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64)),
        (torch.full((4, 3), torch.nan, requires_grad=True), torch.full((4,), IGNORE)),
    ]:
        sums, counts = class_sums(features, targets, 2, impl="triton")
        (gradient,) = torch.autograd.grad(sums.sum(), features)
        assert sums.tolist() == [[0.0] * 3] * 2
        assert counts.tolist() == [0, 0]
        assert gradient.tolist() == [[0.0] * 3] * len(features)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_values_that_cannot_be_summed_are_asserted_on(bad: float) -> None:
    features, targets = problem(10, 4, 3, torch.float32)
    features[3, 2] = bad
    with pytest.raises(Exception, match="features must be finite"):
        class_sums(features, targets, 3, impl="triton")


@pytest.mark.parametrize("bad", [3, -1])
def test_targets_out_of_range_are_asserted_on(bad: int) -> None:
    features, targets = problem(10, 4, 3, torch.float32)
    targets[4] = bad
    with pytest.raises(Exception, match="targets must be class indices"):
        class_sums(features, targets, 3, impl="triton")


def test_derivatives_to_second_order_and_in_forward_mode() -> None:
    features, targets = problem(9, 3, 3, torch.float32)
    features.requires_grad_()
    direction, cotangent = torch.randn(9, 3), torch.randn(3, 3, requires_grad=True)

    sums, _ = class_sums(features, targets, 3, impl="triton")
    (gradient,) = torch.autograd.grad(sums, features, cotangent, create_graph=True)
    (again,) = torch.autograd.grad(gradient, cotangent, direction)
    with forward_ad.dual_level():
        dual, _ = class_sums(forward_ad.make_dual(features, direction), targets, 3, impl="triton")
        tangent = forward_ad.unpack_dual(dual).tangent

    # The sums are linear: both are the sums of the direction.
    expected, _ = class_sums(direction, targets, 3)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(tangent, expected)


def test_infinite_cotangents_pass_as_loss_scaling_needs() -> None:
    features, targets = problem(5, 2, 2, torch.float32)
    sums, _ = class_sums(features.requires_grad_(), targets, 2, impl="triton")
    (gradient,) = torch.autograd.grad(sums, features, torch.full((2, 2), torch.inf))
    assert bool((gradient[targets >= 0] == torch.inf).all())


def test_compiles_as_one_graph_and_takes_several_cotangents() -> None:
    features, targets = problem(10, 4, 3, torch.float32)
    features.requires_grad_()

    def mean(f: Tensor) -> Tensor:
        return class_means(f, targets, 3, impl="triton")[0]

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    expected = class_means(features, targets, 3)[0]
    torch.testing.assert_close(compiled(features), expected)
    for function in (compiled, mean):
        (gradient,) = torch.autograd.grad(function(features).square().sum(), features)
        torch.testing.assert_close(
            gradient, torch.autograd.grad(expected.square().sum(), features, retain_graph=True)[0]
        )
    cotangents = torch.randn(2, 3, 4)
    (batched,) = torch.autograd.grad(mean(features), features, cotangents, is_grads_batched=True)
    for one, cotangent in zip(batched, cotangents, strict=True):
        torch.testing.assert_close(
            one, torch.autograd.grad(expected, features, cotangent, retain_graph=True)[0]
        )


def fused(average: FeatureMovingAverage, monkeypatch: pytest.MonkeyPatch) -> FeatureMovingAverage:
    def forced(features: Tensor, means: Tensor) -> bool:
        return dispatch.averages_use_triton(features, means, "triton")

    monkeypatch.setattr(averages, "averages_use_triton", forced)
    return average


@pytest.mark.parametrize("momentum", [0.3, None, "2/(t+1)"])
def test_the_fused_average_follows_the_one_in_float64(monkeypatch: pytest.MonkeyPatch, momentum: Any) -> None:
    average = FeatureMovingAverage(5, 4, momentum=momentum)
    exact = FeatureMovingAverage(5, 4, momentum=momentum, dtype=torch.float64)
    eager = FeatureMovingAverage(5, 4, momentum=momentum)
    for step in range(4):
        features, targets = problem(8 + step, 5, 4 if step else 2, torch.float32)  # classes 2, 3 come later
        features.requires_grad_()
        wide = features.detach().double().requires_grad_()
        expected, plain = exact(wide, targets), eager(features.detach(), targets)
        with monkeypatch.context() as patch:
            means = fused(average, patch)(features, targets)
        within_budget(means.detach(), plain, expected.detach(), floor=4 * EPS * expected.abs().max().item())
        assert torch.equal(average.counts, exact.counts)
        assert torch.equal(average.updates, exact.updates)
        cotangent = torch.randn(4, 5)
        (gradient,) = torch.autograd.grad(means, features, cotangent)
        (expected_gradient,) = torch.autograd.grad(expected, wide, cotangent.double())
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-7)


def test_the_smallest_step_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    average = FeatureMovingAverage(1, 2, momentum="2/(t+1)")
    average.counts.fill_(1)
    average.updates.fill_(10**9)
    means = fused(average, monkeypatch)(torch.ones(1, 1), torch.tensor([0]))
    torch.testing.assert_close(means, torch.tensor([[1e-4], [0.0]]))


def test_the_fused_average_in_forward_mode_and_twice_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = problem(9, 3, 3, torch.float32)
    features.requires_grad_()
    direction, cotangent = torch.randn(9, 3), torch.randn(3, 3, requires_grad=True)
    average = FeatureMovingAverage(3, 3)
    expected = torch.func.jvp(lambda f: average.propose(f, targets).means, (features,), (direction,))[1]
    fused(average, monkeypatch)

    means = average.propose(features, targets).means
    (gradient,) = torch.autograd.grad(means, features, cotangent, create_graph=True)
    (again,) = torch.autograd.grad(gradient, cotangent, direction)
    with forward_ad.dual_level():
        dual = average.propose(forward_ad.make_dual(features, direction), targets).means
        tangent = forward_ad.unpack_dual(dual).tangent

    torch.testing.assert_close(again, expected.detach())
    torch.testing.assert_close(tangent, expected.detach())


def test_compiled_fused_average(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = problem(10, 4, 3, torch.float32)
    average = fused(FeatureMovingAverage(4, 3), monkeypatch)
    expected = average.propose(features, targets)
    compiled = torch.compile(average, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, targets), expected.means)
    torch.testing.assert_close(average.counts, expected.counts)


def test_operators_are_registered_properly() -> None:
    features, targets = problem(6, 4, 3, torch.float32)
    state = (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    torch.library.opcheck(kernels.class_sums, (features, targets, 3, IGNORE, True))
    torch.library.opcheck(kernels.class_gather, (torch.randn(3, 4), targets, IGNORE, torch.bfloat16))
    torch.library.opcheck(kernels.class_averages, (features, targets, *state, IGNORE, 0.1, "fixed"))
