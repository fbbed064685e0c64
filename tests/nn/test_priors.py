"""``CodeCrossEntropy(head, prior=...)`` of every kind of head is the loss of its logits plus the prior."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from etflayers import (
    ClassMeanHead,
    CodeCrossEntropy,
    CodeHead,
    FixedCodeHead,
    FixedETFHead,
    NearestETFHead,
    UnitRowHead,
)
from etflayers.errors import InvalidArgumentError
from etflayers.functional import logit_adjustment

HEADS: dict[str, Callable[..., CodeHead]] = {
    "canonical": lambda **o: FixedETFHead(6, 4, rotation="canonical", scale=2.0, **o),
    "canonical, d = K - 1": lambda **o: FixedETFHead(3, 4, scale=2.0, **o),
    "haar": lambda **o: FixedETFHead(6, 4, rotation="haar", scale=2.0, **o),
    "nearest, with a center": lambda **o: NearestETFHead(6, 4, scale=2.0, momentum=0.3, **o),
    "class means": lambda **o: ClassMeanHead(6, 4, scale=2.0, momentum=0.3, detach=False, **o),
    "code": lambda **o: FixedCodeHead(2, 4, scale=2.0, **o),
    "learned scale": lambda **o: UnitRowHead(
        6, 4, scale=nn.Parameter(torch.tensor(2.0, dtype=torch.float64)), **o
    ),
}
COUNTS = torch.tensor([70000, 30, 8, 1])
TARGETS = torch.tensor([0, 1, 2, 3, -100, 1, 1, -100, 0])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_loss_gradients_and_state_are_those_of_the_adjusted_logits(name: str, training: bool) -> None:
    torch.manual_seed(0)
    head = HEADS[name](dtype=torch.float64, normalize=True)
    twin = copy.deepcopy(head).train(training)
    features = torch.randn(9, head.in_features, dtype=torch.float64, requires_grad=True)
    criterion = CodeCrossEntropy(head, label_smoothing=0.1, prior=COUNTS, tau=1.3, chunk_size=4)
    criterion.train(training)
    for _ in range(2):
        loss = criterion(features, TARGETS)
        logits = logit_adjustment(twin(features, TARGETS), COUNTS, tau=1.3)
        expected = F.cross_entropy(logits, TARGETS, label_smoothing=0.1)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            torch.autograd.grad(loss, [features, *head.parameters()]),
            torch.autograd.grad(expected, [features, *twin.parameters()]),
            rtol=1e-9,
            atol=1e-10,
        )
    torch.testing.assert_close(head.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_the_prior_is_a_buffer_of_the_loss_in_full_precision() -> None:
    counts = COUNTS.float()
    criterion = CodeCrossEntropy(FixedETFHead(6, 4), prior=counts, tau=0.5)
    counts.zero_()
    assert list(criterion.state_dict()) == ["prior"]
    assert criterion.half().prior is not None
    assert criterion.state_dict()["prior"].tolist() == COUNTS.tolist()  # 70000 is infinite in float16
    other = CodeCrossEntropy(FixedETFHead(6, 4), prior=torch.ones(4))
    other.load_state_dict(criterion.state_dict())
    features = torch.randn(9, 6)
    other.head.load_state_dict(criterion.head.state_dict())
    torch.testing.assert_close(
        CodeCrossEntropy(other.head, prior=other.prior, tau=0.5)(features, TARGETS),
        criterion(features, TARGETS),
    )
    assert "prior=(4,), tau=0.5" in repr(criterion)
    assert CodeCrossEntropy(FixedETFHead(6, 4)).state_dict() == {}
    assert "prior" not in repr(CodeCrossEntropy(FixedETFHead(6, 4)))


@pytest.mark.parametrize("name", ["canonical", "haar"])
def test_compiles_as_one_graph(name: str) -> None:
    criterion = CodeCrossEntropy(HEADS[name](), prior=COUNTS)
    features = torch.randn(9, 6)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, TARGETS), criterion(features, TARGETS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": torch.ones(5)}, r"prior must have one number for each class, shape \(4,\), got \(5,\)"),
        ({"prior": torch.tensor([1.0, 2.0, 0.0, 1.0])}, "prior must be positive and finite"),
        ({"prior": torch.ones(4), "tau": torch.nan}, "tau must be a finite number"),
    ],
)
def test_a_bad_prior_is_named(options: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        CodeCrossEntropy(FixedETFHead(6, 4), **options)
