"""The sampled loss of a head: the whole loss at rate 1 and in eval mode, and a loss that trains."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import ClassMeanHead, CodeHead, NearestETFHead, SampledCrossEntropy, UnitRowHead
from etflayers.errors import InvalidArgumentError, MissingTargetsError
from etflayers.functional import sampled_cross_entropy

K = 40
HEADS = {
    "class means": lambda: ClassMeanHead(6, K, scale=2.0, detach=False, dtype=torch.float64),
    "unit rows": lambda: UnitRowHead(6, K, scale=2.0, normalize=True, dtype=torch.float64),
    "centered": lambda: NearestETFHead(K, K, scale=2.0, dtype=torch.float64),
    "learned scale": lambda: UnitRowHead(
        6, K, scale=nn.Parameter(torch.tensor(2.0, dtype=torch.float64)), dtype=torch.float64
    ),
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> CodeHead:
    torch.manual_seed(0)
    made: CodeHead = HEADS[request.param]()
    return made


def problem(head: CodeHead) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(7, head.in_features, generator=generator, dtype=torch.float64)
    return features.requires_grad_(), torch.tensor([0, 1, 2, 3, -100, 1, 39])


@pytest.mark.parametrize("training", [True, False])
def test_with_all_classes_it_is_the_loss_of_the_logits(head: CodeHead, training: bool) -> None:
    """At rate 1, and at any rate in eval mode; with the gradients and the state of the head."""
    features, targets = problem(head)
    twin = copy.deepcopy(head)
    criterion = SampledCrossEntropy(head, 1 if training else 0.1, label_smoothing=0.1).train(training)
    assert head.training is training
    twin.train(training)
    loss = criterion(features, targets)
    expected = F.cross_entropy(twin(features, targets), targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(loss, [features, *criterion.parameters()])
    others = torch.autograd.grad(expected, [features, *twin.parameters()])
    torch.testing.assert_close(found, others, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_in_training_it_is_the_function_of_the_terms_of_the_logits(head: CodeHead) -> None:
    features, targets = problem(head)
    twin = copy.deepcopy(head)
    loss = SampledCrossEntropy(head, 0.2)(features, targets, generator=torch.Generator().manual_seed(4))
    inputs, frame, center = twin.logit_terms(features, targets)
    inputs = twin.scale * (inputs if center is None else inputs - center)
    expected = sampled_cross_entropy(
        inputs, frame, targets, rate=0.2, generator=torch.Generator().manual_seed(4)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    whole = F.cross_entropy(copy.deepcopy(head).eval()(features), targets)
    assert not torch.allclose(loss, whole)


def test_the_head_stays_with_the_model(head: CodeHead) -> None:
    criterion = SampledCrossEntropy(head, 0.25, reduction="sum")
    model = nn.ModuleDict({"head": head, "loss": criterion})
    assert all(name.startswith("head.") for name in model.state_dict())
    assert repr(criterion).startswith("SampledCrossEntropy(rate=0.25, label_smoothing=0.0")


def test_free_features_and_rows_of_many_classes_are_trained() -> None:
    """More classes than dimensions, of which a step sees a part: the accuracy over all classes becomes 1."""
    torch.manual_seed(0)
    num_classes = 100
    head = UnitRowHead(8, num_classes, scale=12.0, normalize=True)
    features = nn.Parameter(torch.randn(num_classes, 8))
    criterion = SampledCrossEntropy(head, 0.1)
    optimizer = torch.optim.Adam([features, *criterion.parameters()], lr=0.05)
    targets = torch.arange(num_classes)
    before = float(criterion.eval()(features, targets).detach())
    criterion.train()
    for _ in range(150):
        samples = torch.randperm(num_classes)[:20]
        optimizer.zero_grad()
        torch.autograd.backward(criterion(features[samples], targets[samples]))
        optimizer.step()
    assert float(criterion.eval()(features, targets).detach()) < 0.25 * before
    assert bool((head(features).argmax(1) == targets).all())


def test_what_it_cannot_take_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="head must be a CodeHead, got Linear"):
        SampledCrossEntropy(nn.Linear(3, 4), 0.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"rate must be a number in \(0, 1\]"):
        SampledCrossEntropy(UnitRowHead(3, 4), 1.5)
    with pytest.raises(InvalidArgumentError, match="label_smoothing"):
        SampledCrossEntropy(UnitRowHead(3, 4), 0.5, label_smoothing=2.0)
    with pytest.raises(MissingTargetsError):
        SampledCrossEntropy(ClassMeanHead(3, 4), 0.5)(torch.ones(2, 3), None)
