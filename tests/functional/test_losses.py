"""Losses against the published formulas in a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError
from etflayers.functional.losses import code_mse_loss, dot_regression_loss
from etflayers.geometry import simplex_etf

IGNORE = -100


def published(features: Tensor, frame: Tensor, targets: Tensor, e_w: float, e_h: Tensor) -> np.ndarray:
    """1 / (2 sqrt(E_W E_H)) (w* . h - sqrt(E_W E_H))^2 with classifier vectors of squared length E_W."""
    losses = np.zeros(len(targets))
    for i, y in enumerate(targets.tolist()):
        if y != IGNORE:
            target_length = np.sqrt(e_w * e_h[y].item())
            product = np.sqrt(e_w) * float(np.dot(frame[y].numpy(), features[i].numpy()))
            losses[i] = (product - target_length) ** 2 / (2 * target_length)
    return losses


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    frame = simplex_etf(4, 6, rotation="haar", generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, IGNORE, 1, 1, IGNORE, 0])
    return features, frame, targets


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_the_published_formula(
    problem: tuple[Tensor, Tensor, Tensor], scale: float, per_class: bool, reduction: Any
) -> None:
    features, frame, targets = problem
    e_h = torch.tensor([1.0, 2.0, 0.5, 3.0] if per_class else [2.0] * 4, dtype=torch.float64)
    lengths = scale * e_h.sqrt()

    loss = dot_regression_loss(
        scale * features @ frame.T,
        targets,
        lengths=lengths if per_class else float(lengths[0]),
        reduction=reduction,
    )

    expected = published(features, frame, targets, scale**2, e_h)
    if reduction != "none":
        expected = expected.sum() / (7 if reduction == "mean" else 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_gradient_pulls_along_the_own_vertex_only(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    features, frame, targets = problem
    logits = (features @ frame.T).requires_grad_()
    lengths = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, n: dot_regression_loss(x, targets, lengths=n), (logits, lengths)
    )

    torch.autograd.backward(dot_regression_loss(logits, targets))
    assert logits.grad is not None
    own = torch.zeros(9, 4, dtype=torch.bool)
    own[targets != IGNORE, targets[targets != IGNORE]] = True
    assert bool((logits.grad[own] != 0).all())
    assert bool((logits.grad[~own] == 0).all())


def test_leading_dimensions_and_their_flattening_agree(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    features, frame, targets = problem
    logits = features @ frame.T
    cube = dot_regression_loss(logits.view(3, 3, 4), targets.view(3, 3), reduction="none")
    torch.testing.assert_close(cube.flatten(), dot_regression_loss(logits, targets, reduction="none"))


def test_all_ignored_is_zero_with_a_zero_gradient() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = dot_regression_loss(logits, torch.full((3,), IGNORE))
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0] * 4] * 3


def test_nan_in_an_ignored_row_reaches_neither_loss_nor_gradient() -> None:
    logits = torch.tensor([[torch.nan, torch.nan], [0.5, 0.0]], requires_grad=True)
    loss = dot_regression_loss(logits, torch.tensor([IGNORE, 0]))
    torch.autograd.backward(loss)
    assert loss.item() == 0.125
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0], [-0.5, 0.0]]


def test_half_precision_logits_give_a_float32_loss() -> None:
    logits = torch.full((1000, 2), 0.9, dtype=torch.bfloat16)
    loss = dot_regression_loss(logits, torch.zeros(1000, dtype=torch.int64), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1000 * 0.5 * (logits[0, 0].item() - 1) ** 2, rel=1e-5)


TARGETS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (torch.ones(()), TARGETS, {}, "got a scalar"),
        (torch.ones(4, 3), TARGETS, {}, r"targets must have the shape of logits .* \(4,\), got \(3,\)"),
        (torch.ones(3, 3).long(), TARGETS, {}, "logits must have a real floating-point dtype"),
        (torch.ones(3, 2), TARGETS, {}, r"in \[0, 2\).* got 2 \(1 of 3"),
        (torch.ones(3, 3), TARGETS.float(), {}, "targets must be integers"),
        (torch.ones(3, 3), TARGETS, {"reduction": "avg"}, "reduction must be .* got 'avg'"),
        (torch.ones(3, 3), TARGETS, {"lengths": 0.0}, "lengths must be positive"),
        (torch.ones(3, 3), TARGETS, {"lengths": torch.tensor([1.0, -1.0, 1.0])}, "lengths must be positive"),
        (
            torch.ones(3, 3),
            TARGETS,
            {"lengths": float("inf")},
            "lengths must be positive .* got inf",
        ),
        (
            torch.ones(3, 3),
            TARGETS,
            {"lengths": torch.tensor([1.0, torch.inf, 1.0])},
            "lengths must be positive and finite",
        ),
        (
            torch.ones(3, 3),
            TARGETS,
            {"lengths": torch.ones(3).long()},
            "lengths must have a real",
        ),
        (torch.ones(3, 3), TARGETS, {"lengths": torch.ones(4)}, r"\(num_classes,\) = \(3,\), got \(4,\)"),
        (torch.ones(3, 3), TARGETS, {"lengths": torch.ones(2)}, r"\(num_classes,\) = \(3,\), got \(2,\)"),
    ],
)
def test_bad_input_is_named(logits: Tensor, targets: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        dot_regression_loss(logits, targets, **options)


# --- distance to codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distance_agrees_with_a_loop(
    problem: tuple[Tensor, Tensor, Tensor], coded: bool, reduction: Any
) -> None:
    features, frame, targets = problem
    outputs, codes = (features, frame) if coded else (features @ frame.T, torch.eye(4))
    loss = code_mse_loss(outputs, targets, frame if coded else None, reduction=reduction)
    expected = np.zeros(len(targets))
    for i, y in enumerate(targets.tolist()):
        if y != IGNORE:
            expected[i] = sum((a - b) ** 2 for a, b in zip(outputs[i], codes[y], strict=True)) / 2
    if reduction != "none":
        expected = expected.sum() / (7 if reduction == "mean" else 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_distance_is_the_mean_squared_error_of_pytorch_times_half_the_classes() -> None:
    logits, targets = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 4
    theirs = torch.nn.functional.mse_loss(logits, torch.eye(4, dtype=torch.float64)[targets])
    torch.testing.assert_close(code_mse_loss(logits, targets), 2 * theirs)


def test_distance_is_differentiable_in_outputs_and_codes(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    features, frame, targets = problem
    inputs = (features.requires_grad_(), frame.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda x, c: code_mse_loss(x, targets, c), inputs)


def test_an_ignored_output_may_be_nan(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    features, frame, targets = problem
    outputs = (features @ frame.T).clone()
    expected = code_mse_loss(outputs, targets)
    outputs[targets == IGNORE] = torch.nan
    outputs.requires_grad_()
    loss = code_mse_loss(outputs, targets)
    torch.testing.assert_close(loss, expected)
    torch.autograd.backward(loss)
    assert outputs.grad is not None
    assert bool(torch.isfinite(outputs.grad).all())
    assert code_mse_loss(outputs, torch.full_like(targets, IGNORE)) == 0


@pytest.mark.parametrize(
    ("outputs", "targets", "codes", "message"),
    [
        (torch.ones(3, 4).long(), torch.zeros(3).long(), None, "outputs must have a real floating-point"),
        (torch.ones(()), torch.zeros(()).long(), None, "outputs must have shape .* got a scalar"),
        (torch.ones(3, 4), torch.zeros(2).long(), None, r"targets must have the shape of outputs .* \(3,\)"),
        (torch.ones(3, 4), torch.full((3,), 4), None, r"targets must be class indices in \[0, 4\)"),
        (torch.ones(3, 4), torch.zeros(3).long(), torch.ones(2, 5), r"codes must have the width of outputs"),
        (torch.ones(3, 4), torch.full((3,), 2), torch.ones(2, 4), r"targets must be .* in \[0, 2\)"),
    ],
)
def test_bad_arguments_of_the_distance_are_named(
    outputs: Tensor, targets: Tensor, codes: Tensor | None, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        code_mse_loss(outputs, targets, codes)
