"""Targets for a head inside a model whose code, and whose training loop, know nothing of it."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from etflayers.errors import InvalidArgumentError, MissingTargetsError
from etflayers.nn import FixedETFHead, NearestETFHead, capture_targets, provide_targets

IMAGES = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(10) % 4


class Classifier(nn.Module):
    """A model of transformers in small: it takes labels, and its head is called without them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = NearestETFHead(6, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.body(x)))
        return (
            {"logits": logits}
            if labels is None
            else {"logits": logits, "loss": F.cross_entropy(logits, labels)}
        )


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def given_directly(model: Classifier, targets: Tensor = TARGETS) -> Tensor:
    """The logits of a training pass of a copy, whose head gets the targets as an argument."""
    twin = copy.deepcopy(model)
    logits: Tensor = twin.head(twin.norm(twin.body(IMAGES)), targets)
    return logits


# --- provide_targets --------------------------------------------------------------------------------------


def test_targets_reach_the_head_inside_the_block_only() -> None:
    model = classifier()
    expected = given_directly(model)
    with provide_targets(model, TARGETS):
        logits = model(IMAGES)["logits"]
    torch.testing.assert_close(logits, expected)
    with pytest.raises(MissingTargetsError, match=r"provide_targets\(model, targets\)"):
        model(IMAGES)


def test_targets_are_gone_after_an_error_in_the_block() -> None:
    model = classifier()
    with pytest.raises(RuntimeError, match="in the block"), provide_targets(model, TARGETS):
        raise RuntimeError("in the block")
    with pytest.raises(MissingTargetsError):
        model(IMAGES)


def test_blocks_nest_and_given_targets_win() -> None:
    head, expected = (NearestETFHead(4, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    features, outer, inner = torch.randn(6, 4), torch.arange(6) % 3, (torch.arange(6) + 1) % 3
    with provide_targets(head, outer):
        with provide_targets(head, inner):
            torch.testing.assert_close(head(features), expected(features, inner))
        torch.testing.assert_close(head(features), expected(features, outer))
        torch.testing.assert_close(head(features, inner), expected(features, inner))


def test_provided_targets_are_no_part_of_copies() -> None:
    model = classifier()
    before = model.state_dict().keys()
    with provide_targets(model, TARGETS):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert model.state_dict().keys() == before
    for other in copies:
        with pytest.raises(MissingTargetsError):
            other(IMAGES)


def test_models_without_a_nearest_head_and_targets_that_are_none_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), FixedETFHead(4, 3))
    with (
        pytest.raises(InvalidArgumentError, match="model has no head that accepts targets"),
        provide_targets(model, TARGETS),
    ):
        pass
    with pytest.raises(InvalidArgumentError, match="model has no head that accepts targets"):
        capture_targets(model)
    with (
        pytest.raises(InvalidArgumentError, match="targets must be a tensor of class indices, got list"),
        provide_targets(classifier(), [0, 1]),  # type: ignore[arg-type]
    ):
        pass


# --- capture_targets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [True, False])
def test_the_head_gets_the_labels_of_the_forward_pass(by_name: bool) -> None:
    model = classifier()
    expected = given_directly(model)
    handle = capture_targets(model)
    output = model(IMAGES, labels=TARGETS) if by_name else model(IMAGES, TARGETS)
    torch.testing.assert_close(output["logits"], expected, rtol=0, atol=0)
    torch.testing.assert_close(output["loss"], F.cross_entropy(expected, TARGETS), rtol=0, atol=0)
    assert model.head.provided_targets is None
    handle.remove()
    with pytest.raises(MissingTargetsError, match=r"capture_targets\(model\) once"):
        model(IMAGES, labels=TARGETS)


def test_eval_needs_no_labels_and_learns_from_none() -> None:
    model = classifier()
    with capture_targets(model):
        model(IMAGES, labels=TARGETS)
        before = copy.deepcopy(model.eval().state_dict())
        torch.testing.assert_close(model(IMAGES)["logits"], model(IMAGES, labels=TARGETS)["logits"])
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        with pytest.raises(MissingTargetsError):
            model.train()(IMAGES)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_failed_pass_leaves_no_targets_behind() -> None:
    model = classifier()
    with capture_targets(model):
        with pytest.raises(RuntimeError):
            model(torch.ones(10, 7), labels=TARGETS)
        with pytest.raises(InvalidArgumentError, match="targets must be a tensor of class indices, got list"):
            model(IMAGES, labels=[0] * 10)
        with pytest.raises(MissingTargetsError):
            model(IMAGES)


def test_copies_and_pickles_capture_for_themselves() -> None:
    model = classifier()
    expected = given_directly(model)
    capture_targets(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(IMAGES, labels=TARGETS)["logits"], expected, rtol=0, atol=0)
        assert int(other.head.averages.counts.sum()) == 10
    assert int(model.head.averages.counts.sum()) == 0


def test_an_argument_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"one of \['x', 'labels'\], got 'y'"):
        capture_targets(classifier(), "y")


def test_a_function_makes_the_targets_of_a_model_that_pools_after_its_head() -> None:
    class Tokens(Classifier):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.head(self.body(x[:, None] * torch.tensor([[0.1], [1.0]])))[:, -1]}

    def at_the_last_token(x: Tensor, labels: Tensor) -> Tensor:
        targets = torch.full((len(x), 2), -100)
        targets[:, -1] = labels
        return targets

    torch.manual_seed(0)
    model = Tokens()
    twin = copy.deepcopy(model)
    with (
        capture_targets(model),
        pytest.raises(InvalidArgumentError, match=r"\(10, 2\), got \(10,\)\. Where a model pools after"),
    ):
        model(IMAGES, labels=TARGETS)
    with capture_targets(model, at_the_last_token):
        logits = model(IMAGES, labels=TARGETS)["logits"]
    # Only the pooled token enters the class means.
    torch.testing.assert_close(logits, twin.head(twin.body(IMAGES), TARGETS))
    torch.testing.assert_close(model.head.averages.means, twin.head.averages.means)


def test_a_compiled_model_captures_too() -> None:
    model = classifier()
    expected = given_directly(model)
    capture_targets(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES, labels=TARGETS)["logits"], expected)
    assert model.head.provided_targets is None
    assert int(model.head.averages.counts.sum()) == 10
    torch.testing.assert_close(model.eval()(IMAGES), compiled(IMAGES))


# --- loops that do not fit --------------------------------------------------------------------------------


def test_update_bn_by_a_generator_inside_the_block() -> None:
    model = classifier()
    loader = [(IMAGES[:5], TARGETS[:5]), (IMAGES[5:], TARGETS[5:])]
    with pytest.raises(MissingTargetsError, match=r"for update_bn .* see docs/howto/models\.md"):
        update_bn(loader, model)

    def labeled() -> Any:
        for images, targets in loader:
            with provide_targets(model, targets):
                yield images

    update_bn(labeled(), model)
    with torch.no_grad():
        hidden = model.body(IMAGES)
    torch.testing.assert_close(model.norm.running_mean, hidden.mean(0))
    assert int(model.head.averages.counts.sum()) == 10
    assert model.head.provided_targets is None


def test_data_parallel_is_refused_before_anything_changes() -> None:
    head = NearestETFHead(6, 4)
    replica = head._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    with pytest.raises(InvalidArgumentError, match=r"nn\.DataParallel, .* use DistributedDataParallel"):
        replica(torch.randn(4, 6), torch.arange(4))
    assert int(head.averages.counts.sum()) == 0
    replica.training = False
    assert replica(torch.randn(4, 6)).shape == (4, 4)


@pytest.mark.parametrize("captured", [True, False])
def test_a_second_thread_is_refused_and_the_first_goes_on(captured: bool) -> None:
    model = classifier()
    expected = given_directly(model)
    errors: list[Exception] = []

    def intrude() -> None:
        try:
            if captured:
                model(IMAGES, labels=(TARGETS + 1) % 4)
            else:
                with provide_targets(model, (TARGETS + 1) % 4):
                    pass
        except InvalidArgumentError as error:
            errors.append(error)

    def meanwhile(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

    model.body.register_forward_hook(meanwhile)
    if captured:
        capture_targets(model)
        logits = model(IMAGES, labels=TARGETS)["logits"]
    else:
        with provide_targets(model, TARGETS):
            logits = model(IMAGES)["logits"]
    assert "another thread is training this head" in str(errors[0])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    # One after the other is no conflict.
    thread = threading.Thread(target=intrude)
    thread.start()
    thread.join()
    assert len(errors) == 1
