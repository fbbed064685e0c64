"""Heads whose frame is a spherical code: a constant, and one arranged by the class means."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers import (
    ClassMeanHead,
    CodeCrossEntropy,
    ETFCrossEntropy,
    FixedCodeHead,
    FixedETFHead,
    NearestCodeHead,
)
from etflayers.codes import DenseCode, KerdockCode, OrthoplexCode, coherence
from etflayers.errors import InvalidArgumentError

# Kinds with a formula, and a matrix.
FIXED: dict[str, dict[str, Any]] = {
    "simplex": {"in_features": 8, "num_classes": 9},
    "orthoplex": {"in_features": 8, "num_classes": 13},
    "kerdock": {"in_features": 16, "num_classes": 250},
    "roots": {"in_features": 8, "num_classes": 50, "code": "roots"},
    "optimized": {"in_features": 3, "num_classes": 8, "code": "optimized"},
}


def make(kind: str, **options: Any) -> FixedCodeHead:
    return FixedCodeHead(**FIXED[kind], generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("kind", FIXED)
def test_auto_takes_what_it_says(kind: str) -> None:
    head = make(kind)
    assert head.describe().startswith(f"{kind}: {head.num_classes} unit vectors in R^{head.in_features}")
    assert f"code='{kind}'" in repr(head)
    assert (head.code is None) == (kind == "optimized")
    assert not list(head.parameters())
    assert list(head.state_dict()) == (["words"] if kind == "optimized" else [])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", FIXED)
def test_logits_and_loss_are_those_of_the_matrix(kind: str, normalize: bool) -> None:
    head = make(kind, scale=7.0, normalize=normalize, dtype=torch.float64)
    features = torch.randn(5, head.in_features, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(5)
    inputs = F.normalize(features, dim=-1) if normalize else features
    expected = 7 * inputs @ head.frame.mT
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head.to_linear(normalized_inputs=True)(inputs), expected)
    loss = CodeCrossEntropy(head, label_smoothing=0.1)(features, targets)
    reference = F.cross_entropy(expected, targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(
        torch.autograd.grad(loss, features)[0], torch.autograd.grad(reference, features)[0]
    )


def test_a_learned_scale_gets_its_gradient_from_the_loss() -> None:
    head = make("kerdock", scale=torch.nn.Parameter(torch.tensor(3.0)))
    features, targets = torch.randn(5, 16), torch.arange(5)
    loss = CodeCrossEntropy(head)(features, targets)
    reference = F.cross_entropy(head(features), targets)
    torch.testing.assert_close(loss, reference)
    (ours,), (theirs,) = (torch.autograd.grad(x, list(head.parameters())) for x in (loss, reference))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", FIXED)
def test_predictions_without_all_logits(kind: str) -> None:
    head = make(kind, scale=4.0)
    features = torch.randn(6, 2, head.in_features)
    logits = head(features)
    assert torch.equal(head.predict(features), logits.argmax(-1))
    values, classes = head.topk(features, 3)
    expected = logits.topk(3)
    torch.testing.assert_close(values, expected.values)
    torch.testing.assert_close(logits.gather(-1, classes), expected.values)
    with pytest.raises(InvalidArgumentError, match="k must be at most"):
        head.topk(features, head.num_classes + 1)


def test_the_words_of_a_checkpoint_count() -> None:
    head, other = make("optimized"), make("optimized")
    other.load_state_dict({"words": head.frame.roll(1, 0)})
    features = torch.randn(4, 3)
    torch.testing.assert_close(other(features), head(features).roll(1, -1))
    assert torch.equal(other.predict(features), (head.predict(features) + 1) % 8)
    other.reset_parameters()
    assert torch.equal(other.frame, head.frame)


@pytest.mark.parametrize("kind", ["kerdock", "optimized"])
def test_meta_copies_and_pickles(kind: str) -> None:
    head = make(kind)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    meta = make(kind, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    features = torch.randn(3, head.in_features)
    for other in (copy.deepcopy(head), torch.load(buffer, weights_only=False), meta):
        assert torch.equal(other(features), head(features))
    assert head.half()(features.half()).dtype == torch.float16


def test_a_code_can_be_given() -> None:
    code = KerdockCode(40, 16)
    assert FixedCodeHead(16, 40, code=code).code is code
    rows = code.dense()
    assert torch.equal(FixedCodeHead(16, 40, code=rows).frame, rows)
    assert torch.equal(FixedCodeHead(16, 40, code=DenseCode(rows)).frame, rows)


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("kerdok", "kind must be one of"),
        (KerdockCode(41, 16), "code must have num_classes = 40"),
        (torch.eye(16), r"code must have shape \(num_classes, in_features\) = \(40, 16\)"),
        (torch.ones(40, 16), "rows must be unit vectors"),
        (None, "code must be the name of a kind, a SphericalCode or a matrix, got None"),
        ("simplex", "in_features must be at least num_classes - 1 = 39"),
    ],
)
def test_bad_codes_are_named(code: Any, match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        FixedCodeHead(16, 40, code=code)


def test_too_many_classes_for_a_simplex_are_sent_here() -> None:
    with pytest.raises(InvalidArgumentError, match=r"etflayers\.FixedCodeHead"):
        FixedETFHead(16, 40)


def test_the_old_name_of_the_loss_is_the_new_one() -> None:
    assert ETFCrossEntropy is CodeCrossEntropy


# --- NearestCodeHead ---


def nearest(num_classes: int = 5, in_features: int = 3, **options: Any) -> NearestCodeHead:
    generator = torch.Generator().manual_seed(0)
    options = {"code": "optimized", "momentum": 1.0} | options
    return NearestCodeHead(in_features, num_classes, generator=generator, dtype=torch.float64, **options)


def shown(head: NearestCodeHead, means: Tensor) -> NearestCodeHead:
    """The head after a batch of one sample for each class."""
    head(means, torch.arange(len(means)))
    return head


def test_a_code_that_was_turned_and_shuffled_is_found_again() -> None:
    head = nearest(9, 4)
    generator = torch.Generator().manual_seed(1)
    words = head.words.clone()
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    # Near to the identity, from where the turns find the way back.
    rotation = torch.matrix_exp(0.2 * (rotation - rotation.mT))
    order = torch.randperm(9, generator=generator)
    means = (words @ rotation)[order]
    means = 3 * (means - means.mean(0)) + 5
    cosine = shown(head, means).refit()
    assert cosine > 0.99
    assert torch.equal(head.eval()(means - means.mean(0)).argmax(-1), torch.arange(9))


def test_a_refit_is_an_arrangement_that_no_exchange_improves() -> None:
    head = nearest()
    means = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    cosine = shown(head, means).refit()
    rows = F.normalize(means - means.mean(0), dim=-1)
    assert cosine == pytest.approx(float((rows * head.frame).sum(-1).mean()))
    for order in itertools.permutations(range(5)):
        assert float((rows * head.frame[list(order)]).sum()) <= float((rows * head.frame).sum()) + 1e-12
    inner = rows.mT @ head.frame
    torch.testing.assert_close(inner, inner.mT)  # no rotation improves it: inner is symmetric,
    assert float(torch.linalg.eigvalsh(inner)[0]) > -1e-12  # and positive
    again = head.frame.clone()
    assert head.refit() == pytest.approx(cosine)
    torch.testing.assert_close(head.frame, again)


def test_it_stays_the_same_code() -> None:
    head = nearest(12, 3)
    before = coherence(head.words)
    shown(head, torch.randn(12, 3, dtype=torch.float64)).refit()
    torch.testing.assert_close(coherence(head.frame), before)
    torch.testing.assert_close(head.frame.norm(dim=-1), torch.ones(12, dtype=torch.float64))


def test_before_the_first_refit_the_rows_are_the_class_means() -> None:
    head, means = nearest(), ClassMeanHead(3, 5, momentum=1.0, dtype=torch.float64)
    features, targets = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    torch.testing.assert_close(head(features, targets), means(features, targets))
    assert not head.arranged
    head.eval()
    torch.testing.assert_close(head(features), means.eval()(features))
    head.refit()
    assert head.arranged
    torch.testing.assert_close(head(features), features @ head.words.mT)


def test_after_a_refit_training_changes_the_means_and_a_graph_keeps_its_frame() -> None:
    head = nearest()
    features = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    head(features, targets)
    head.refit()
    frame = head.frame.clone()
    loss = F.cross_entropy(head(features.flip(0), targets), targets)
    assert torch.equal(head.frame, frame)
    head.refit()
    assert not torch.equal(head.frame, frame)
    (gradient,) = torch.autograd.grad(loss, features)  # of the frame that made the logits
    other = features.detach().flip(0).requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(other @ frame.mT, targets), other)[0].flip(0)
    torch.testing.assert_close(gradient, expected)


def test_classes_not_seen_get_the_words_that_are_left() -> None:
    head = nearest()
    assert head.refit() == 0.0
    head(torch.randn(2, 3, dtype=torch.float64), torch.tensor([1, 3]))
    assert head.refit() > 0
    gram = head.frame @ head.frame.mT
    assert float(gram.fill_diagonal_(-1).max()) < 0.99  # five different words


def test_it_is_reset_and_copied() -> None:
    head = nearest()
    start = head.words.clone()
    shown(head, torch.randn(5, 3, dtype=torch.float64)).refit()
    other = copy.deepcopy(head)
    assert torch.equal(other.frame, head.frame)
    loaded = nearest()
    loaded.load_state_dict(head.state_dict())
    assert loaded.arranged
    assert torch.equal(loaded.frame, head.frame)
    head.reset_parameters()
    assert not head.arranged
    # Of classes not seen, whose words are divided by their lengths once more.
    torch.testing.assert_close(head.frame, start, rtol=0, atol=1e-15)
    assert not bool(head.averages.seen.any())


def test_an_orthoplex_finds_pairs_of_opposites() -> None:
    head = NearestCodeHead(8, 16, code=OrthoplexCode(16, 8), momentum=1.0)
    means = OrthoplexCode(16, 8).dense()[torch.randperm(16, generator=torch.Generator().manual_seed(3))]
    head(4 * means, torch.arange(16))
    assert head.refit() == pytest.approx(1.0, abs=1e-5)
