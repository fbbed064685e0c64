"""A head, a frame rule and a loss as a user writes them: outside the package, with nothing private."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import ETFCrossEntropy, NearestETFHead, nearest_etf, provide_targets, replace_classifier
from etflayers.errors import InvalidArgumentError, MissingTargetsError
from etflayers.geometry import is_simplex_etf
from etflayers.metrics import read_classifier
from etflayers.nn import CodeHead, HuberNearestETF, LogitTerms, MahalanobisNearestETF
from etflayers.solvers import SVD


class CosineCode(CodeHead):
    """More classes than dimensions: K fixed random directions in R^d."""

    def __init__(self, in_features: int, num_classes: int, **options: Any) -> None:
        super().__init__(in_features, num_classes, **options)
        self.register_buffer("words", torch.empty(num_classes, in_features))
        self.reset_parameters()

    @property
    def frame(self) -> Tensor:
        words: Tensor = self.words
        return words

    def reset_parameters(self) -> None:
        self.words = F.normalize(torch.randn_like(self.words), dim=-1)


class BatchMeansHead(CodeHead):
    """The frame is the directions of the class means of the batch; eval keeps the last one."""

    accepts_targets = True

    def __init__(self, in_features: int, num_classes: int, **options: Any) -> None:
        super().__init__(in_features, num_classes, **options)
        self.register_buffer("last", torch.eye(num_classes, in_features))

    @property
    def frame(self) -> Tensor:
        last: Tensor = self.last
        return last

    def logit_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        inputs = self.inputs(features)
        if not self.training:
            return LogitTerms(inputs, self.frame)
        targets = self.require_targets(targets)
        means = torch.stack([inputs[targets == k].mean(0) for k in range(self.num_classes)])
        frame = F.normalize(means, dim=-1)
        self.last = frame.detach()
        return LogitTerms(inputs, frame)


def hinge_loss(head: CodeHead, features: Tensor, targets: Tensor) -> Tensor:
    """A loss of a user's own, from the terms of the logits."""
    inputs, frame, center = head.logit_terms(features, targets)
    inputs = inputs if center is None else inputs - center
    products = head.scale * inputs @ frame.T
    own = products.gather(-1, targets[:, None])
    return F.relu(1 + products - own).sum(-1).mean() - 1


FEATURES = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((0, 3), {}, "in_features must be at least 1, got 0"),
        ((3, 0), {}, "num_classes must be at least 1, got 0"),
        ((3, 4), {"scale": float("inf")}, "scale must be a finite number > 0, got inf"),
        ((3, 4), {"scale": -1.0}, "scale must be a finite number > 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(size: tuple[int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        CosineCode(*size, **options)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_code_with_more_classes_than_dimensions(normalize: bool) -> None:
    head = CosineCode(3, 10, scale=4.0, normalize=normalize)
    inputs = F.normalize(FEATURES, dim=-1) if normalize else FEATURES
    expected = 4 * inputs @ head.frame.T
    torch.testing.assert_close(head(FEATURES), expected)
    torch.testing.assert_close(head.to_linear(normalized_inputs=normalize)(inputs), expected)
    targets = torch.arange(12) % 10
    loss = ETFCrossEntropy(head, label_smoothing=0.1)(FEATURES, targets)
    torch.testing.assert_close(loss, F.cross_entropy(expected, targets, label_smoothing=0.1))


def test_everything_else_works_on_it(tmp_path: Any) -> None:
    model = replace_classifier(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 10)), CosineCode)
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    expected = model(features)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = replace_classifier(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 10)), CosineCode)
    twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(twin(features), expected)
    torch.testing.assert_close(copy.deepcopy(model)(features), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), expected)
    classifier = read_classifier(model[1])
    torch.testing.assert_close(classifier.weight, model[1].frame)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(features).dtype == torch.bfloat16


def test_a_head_that_accepts_targets_gets_them() -> None:
    model = nn.Sequential(nn.Linear(3, 4), BatchMeansHead(4, 3, scale=2.0))
    targets = torch.arange(12) % 3
    with pytest.raises(MissingTargetsError, match=r"BatchMeansHead needs targets in training"):
        model(FEATURES)
    with provide_targets(model, targets):
        logits = model(FEATURES)
    assert logits.shape == (12, 3)
    torch.testing.assert_close(model.eval()(FEATURES), logits)
    assert copy.deepcopy(model)[1].provided_targets is None


@pytest.mark.parametrize(
    "make", [lambda: CosineCode(3, 4, scale=2.0), lambda: NearestETFHead(3, 4, scale=2.0)]
)
def test_a_loss_of_a_users_own(make: Any) -> None:
    torch.manual_seed(0)
    head = make()
    twin = copy.deepcopy(head)
    features = FEATURES.clone().requires_grad_()
    targets = torch.arange(12) % 4
    loss = hinge_loss(head, features, targets)
    loss.backward()
    logits = twin(FEATURES, targets)
    expected = F.multi_margin_loss(logits, targets, reduction="mean") * 4
    torch.testing.assert_close(loss.detach(), expected)
    assert features.grad is not None


# --- a frame rule -----------------------------------------------------------------------------------------


def sign_rule(means: Tensor, *, weights: Tensor, anchor: Tensor, proximity: float) -> Tensor:
    """The ETF nearest to the signs of the centered means, which no outlier among the features moves far."""
    present = weights > 0
    center = means[present].mean(0)
    signs = torch.where(present[:, None], torch.tanh(3 * (means - center)), torch.zeros(()).to(means))
    return nearest_etf(signs, weights=weights, anchor=anchor, proximity=proximity)


def test_a_rule_of_a_users_own() -> None:
    head = NearestETFHead(6, 4, rule=sign_rule, proximity=0.1)
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(12) % 3  # class 3 is not seen
    start = head.frame.clone()
    logits = head(features, targets)
    expected = sign_rule(
        head.averages.means,
        weights=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        anchor=start,
        proximity=0.1,
    )
    torch.testing.assert_close(head.frame, expected)
    (grad,) = torch.autograd.grad(logits.sum(), features)
    assert bool(torch.isfinite(grad).all())


def test_a_rule_that_is_none_is_named_before_anything_changes() -> None:
    features, targets = torch.randn(12, 6), torch.arange(12) % 4
    rules: list[tuple[Any, str]] = [
        (lambda means, **_: means, "rule must return a simplex ETF, but squared row norms"),
        (lambda means, **_: means[:2], r"rule must return a frame of shape .* \(4, 6\), got \(2, 6\)"),
        (lambda means, **_: None, r"rule must return a frame of shape .* \(4, 6\), got NoneType"),
    ]
    for rule, message in rules:
        head = NearestETFHead(6, 4, rule=rule)
        before = copy.deepcopy(head.state_dict())
        with pytest.raises(InvalidArgumentError, match=message):
            head(features, targets)
        torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(InvalidArgumentError, match="rule must be callable, got 'huber'"):
        NearestETFHead(6, 4, rule="huber")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="solver and adjoint belong to the default rule"):
        NearestETFHead(6, 4, rule=sign_rule, solver=SVD())


@pytest.mark.slow
@pytest.mark.parametrize("rule", [MahalanobisNearestETF(6), HuberNearestETF(threshold=0.4)])
def test_the_rules_without_a_closed_form_train_a_head(rule: nn.Module) -> None:
    """From the first batch on, with a class that is never seen, to a frame that separates the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), NearestETFHead(6, 4, rule=rule, proximity=0.05, scale=5.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    centers = torch.randn(3, 5)
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        targets = torch.tensor([2]) if step == 0 else torch.arange(12) % 3
        features = centers[targets] + 0.3 * torch.randn(len(targets), 5, generator=generator)
        with provide_targets(model, targets):
            loss = F.cross_entropy(model(features), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert is_simplex_etf(model[1].frame)
    assert (model.eval()(centers).argmax(-1) == torch.arange(3)).all()
    if isinstance(rule, MahalanobisNearestETF):
        # The metric is a parameter of the head, and has learned.
        assert "1.rule.factor" in model.state_dict()
        assert (rule.factor - torch.eye(6)).norm() > 1e-3
