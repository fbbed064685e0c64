"""Dot regression of imbalanced classes: both published forms, lengths from counts, mixed labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from etflayers import (
    DotRegressionLoss,
    FixedCodeHead,
    FixedETFHead,
    LearnedETFHead,
    NearestETFHead,
    UnitRowHead,
    simplex_etf,
)
from etflayers.errors import InvalidArgumentError
from etflayers.functional import directions, dot_regression_loss, lengths_from_counts

K, D = 4, 6
COUNTS = torch.tensor([60, 20, 12, 4])
TARGETS = torch.tensor([0, 0, 0, 1, 1, 2, 3, -100])


def problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = directions(torch.randn(8, D, generator=generator, dtype=torch.float64))
    return features, simplex_etf(K, D, rotation="haar", generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_both_forms_for_classifier_vectors_of_unequal_lengths(divide: bool, reduction: Any) -> None:
    features, frame = problem()
    lengths = lengths_from_counts(COUNTS.double())
    loss = dot_regression_loss(
        lengths * (features @ frame.T),
        TARGETS,
        lengths=lengths,
        divide_by_length=divide,
        reduction=reduction,
    )
    expected = np.zeros(8)
    for i, y in enumerate(TARGETS.tolist()):
        if y >= 0:
            # Features of length 1, a classifier vector of length sqrt(N / (K n_y)).
            w = np.sqrt(COUNTS.sum().item() / K / COUNTS[y].item()) * frame[y].numpy()
            length = np.linalg.norm(w) * 1
            expected[i] = (w @ features[i].numpy() - length) ** 2 / 2 / (length if divide else 1)
    if reduction != "none":
        expected = expected.sum() / (7 if reduction == "mean" else 1)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_without_division_all_classes_weigh_the_same_in_an_epoch() -> None:
    lengths = lengths_from_counts(COUNTS.double())
    targets = torch.repeat_interleave(torch.arange(K), COUNTS)
    logits = torch.zeros(len(targets), K, dtype=torch.float64)  # <u_y, h> = 0 for all samples
    parts = {}
    for divide in (True, False):
        losses = dot_regression_loss(
            logits, targets, lengths=lengths, divide_by_length=divide, reduction="none"
        )
        parts[divide] = torch.zeros(K, dtype=torch.float64).index_add_(0, targets, losses)
    # l^2 / 2 for n samples is N / 2K; l / 2 is more for the frequent classes.
    torch.testing.assert_close(parts[False], torch.full_like(lengths, COUNTS.sum() / (2 * K)))
    assert bool((parts[True].diff() < 0).all())


def test_at_length_1_both_forms_are_one() -> None:
    features, frame = problem()
    logits = features @ frame.T
    whole = dot_regression_loss(logits, TARGETS)
    assert torch.equal(dot_regression_loss(logits, TARGETS, divide_by_length=False), whole)


@pytest.mark.parametrize("divide", [True, False])
def test_gradients(divide: bool) -> None:
    features, frame = problem()
    logits = (features @ frame.T).requires_grad_()
    lengths = lengths_from_counts(COUNTS.double()).requires_grad_()
    soft = torch.softmax(logits.detach().sin(), -1)
    for targets in (TARGETS, soft):
        assert torch.autograd.gradcheck(
            lambda z, n, y=targets: dot_regression_loss(z, y, lengths=n, divide_by_length=divide),
            (logits, lengths),
        )


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_targets_are_the_mixture_of_the_losses_of_two_labels(divide: bool, reduction: Any) -> None:
    features, frame = problem()
    options: Any = {
        "lengths": lengths_from_counts(COUNTS.double()),
        "divide_by_length": divide,
        "reduction": reduction,
    }
    first, second, share = torch.arange(8) % K, torch.arange(8).flip(0) % K, 0.3
    eye = torch.eye(K, dtype=torch.float64)
    mixed = dot_regression_loss(features @ frame.T, share * eye[first] + (1 - share) * eye[second], **options)
    one = dot_regression_loss(features @ frame.T, first, **options)
    other = dot_regression_loss(features @ frame.T, second, **options)
    torch.testing.assert_close(mixed, share * one + (1 - share) * other, rtol=1e-12, atol=1e-14)


def test_lengths_from_counts_is_the_published_formula() -> None:
    expected = np.sqrt(COUNTS.sum().item() / K / COUNTS.numpy())
    np.testing.assert_allclose(lengths_from_counts(COUNTS.double()), expected, rtol=1e-14)
    assert lengths_from_counts(COUNTS).dtype == torch.float32
    assert lengths_from_counts(torch.full((3,), 8)).tolist() == [1, 1, 1]
    assert torch.autograd.gradcheck(lengths_from_counts, (COUNTS.double().requires_grad_(),))


HEADS = {
    "canonical": lambda: FixedETFHead(D, K, rotation="canonical", normalize=True),
    "haar": lambda: FixedETFHead(D, K, rotation="haar", normalize=True),
    "nearest": lambda: NearestETFHead(D, K, normalize=True).eval(),
    "learned": lambda: LearnedETFHead(D, K, normalize=True),
    "unit rows": lambda: UnitRowHead(D, K, normalize=True),
    "code": lambda: FixedCodeHead(D, 2 * D, normalize=True),
}


@pytest.mark.parametrize("name", HEADS)
def test_features_of_length_zero_get_a_bounded_gradient(name: str) -> None:
    head = HEADS[name]()
    features = torch.randn(4, D)
    features[0] = 0
    features[1] = torch.full((D,), 1e-30)  # dead, too; F.normalize would multiply its gradient by 1e12
    features[2] *= 1e-3 / features[2].norm()
    features.requires_grad_()
    loss = DotRegressionLoss(torch.arange(1.0, head.num_classes + 1))(head(features), torch.arange(4))
    (gradient,) = torch.autograd.grad(loss, features)
    assert bool(torch.isfinite(loss))
    assert gradient[:2].tolist() == [[0.0] * D] * 2
    # Of length r the derivative of a direction is 1 / r, here 1000, times |dl/dz| <= 2 / 4.
    assert 0 < float(gradient[2].norm()) < 2 * 1000 / 4


def test_the_module_passes_its_form_on() -> None:
    features, frame = problem()
    logits, lengths = features @ frame.T, lengths_from_counts(COUNTS)
    module = DotRegressionLoss(lengths, divide_by_length=False)
    assert torch.equal(
        module(logits, TARGETS),
        dot_regression_loss(logits, TARGETS, lengths=lengths, divide_by_length=False),
    )
    assert "divide_by_length=False" in repr(module)
    soft = torch.full((8, K), 1 / K, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, soft), module(logits, soft))


def test_bad_arguments_are_named() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(InvalidArgumentError, match="divide_by_length must be True or False, got 'no'"):
        dot_regression_loss(logits, torch.tensor([0, 1]), divide_by_length="no")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="divide_by_length must be True or False"):
        DotRegressionLoss(divide_by_length=None)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="targets with a floating-point dtype must be prob"):
        dot_regression_loss(logits, torch.ones(2, 3))
    for counts, message in (
        (torch.tensor([3, 0]), r"counts must be positive and finite.*counts.clamp\(min=1\)"),
        (torch.tensor([3.0, torch.nan]), "counts must be positive and finite"),
        (torch.tensor([-3, 1]), "counts must be positive and finite"),
        (torch.ones(2, 2), r"counts must have one number for each class, shape \(K,\), got \(2, 2\)"),
        ([3, 4], r"counts must be a tensor .* got list: pass torch.as_tensor"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            lengths_from_counts(counts)  # type: ignore[arg-type]
