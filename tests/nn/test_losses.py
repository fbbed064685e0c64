"""A loss module is the function with its arguments remembered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from etflayers.errors import InvalidArgumentError
from etflayers.functional.losses import code_mse_loss, dot_regression_loss
from etflayers.nn import CodeMSELoss, DotRegressionLoss

LOGITS = torch.tensor([[0.5, -0.5], [-2.0, 2.0], [1.0, 1.0]])
TARGETS = torch.tensor([0, 1, 7])


@pytest.mark.parametrize("lengths", [2.0, torch.tensor([1.0, 3.0])])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_passes_its_arguments_on(lengths: float | torch.Tensor, reduction: Any) -> None:
    loss = DotRegressionLoss(lengths, ignore_index=7, reduction=reduction)
    expected = dot_regression_loss(LOGITS, TARGETS, lengths=lengths, ignore_index=7, reduction=reduction)
    assert torch.equal(loss(LOGITS, TARGETS), expected)
    assert torch.equal(copy.deepcopy(loss)(LOGITS, TARGETS), expected)


def test_lengths_for_each_class_are_state_of_its_own() -> None:
    lengths = torch.tensor([1.0, 3.0])
    loss = DotRegressionLoss(lengths)
    lengths.zero_()
    assert loss.state_dict()["lengths"].tolist() == [1.0, 3.0]
    assert loss.double().lengths.dtype == torch.float64  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        (0.0, {}, "lengths must be positive and finite"),
        (torch.tensor([1.0, 0.0]), {}, "lengths must be positive and finite"),
        (torch.tensor(2.0), {}, r"lengths must be a number or have shape \(K,\), got \(\)"),
        (torch.ones(2, 2), {}, r"lengths must be a number or have shape \(K,\), got \(2, 2\)"),
        (1.0, {"reduction": "avg"}, "reduction must be"),
    ],
)
def test_bad_arguments_are_named(lengths: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        DotRegressionLoss(lengths, **options)


def test_compiles_as_one_graph() -> None:
    loss = DotRegressionLoss(torch.tensor([1.0, 3.0]), ignore_index=7)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LOGITS, TARGETS), loss(LOGITS, TARGETS))
    with pytest.raises(RuntimeError, match="targets must be class indices"):
        compiled(LOGITS, TARGETS + 1)


# --- distance to codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [None, torch.tensor([[1.0, 0.0], [-1.0, 0.5], [2.0, 3.0]])])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distance_passes_its_arguments_on(codes: torch.Tensor | None, reduction: Any) -> None:
    loss = CodeMSELoss(codes, ignore_index=7, reduction=reduction)
    expected = code_mse_loss(LOGITS, TARGETS, codes, ignore_index=7, reduction=reduction)
    assert torch.equal(loss(LOGITS, TARGETS), expected)
    assert torch.equal(copy.deepcopy(loss)(LOGITS, TARGETS), expected)


def test_codes_are_state_of_their_own() -> None:
    codes = torch.eye(2)
    loss = CodeMSELoss(codes)
    codes.zero_()
    assert loss.state_dict()["codes"].tolist() == [[1, 0], [0, 1]]
    assert repr(loss) == "CodeMSELoss(codes=(2, 2), ignore_index=-100, reduction='mean')"
    assert CodeMSELoss().state_dict() == {}


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (torch.ones(3), {}, r"codes must have shape \(K, d\), one row for each class, got \(3,\)"),
        (torch.ones(0, 3), {}, r"codes must have shape .* got \(0, 3\)"),
        (torch.ones(3, 3).long(), {}, "codes must have a real floating-point dtype"),
        (None, {"reduction": "avg"}, "reduction must be"),
    ],
)
def test_bad_codes_are_named(codes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        CodeMSELoss(codes, **options)
