"""Heads that know classes to come: the oracle is the same head's logits, cut to the classes that are here."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from etflayers import CodeCrossEntropy, SampledCrossEntropy
from etflayers.codes import OrthoplexCode
from etflayers.errors import InvalidArgumentError
from etflayers.functional.active import DROP
from etflayers.metrics import NeuralCollapse
from etflayers.metrics.classifier import answers
from etflayers.nn import (
    ClassMeanHead,
    CodeHead,
    FixedCodeHead,
    FixedETFHead,
    LearnedETFHead,
    NearestCodeHead,
    NearestETFHead,
    UnitRowHead,
)

HERE, COMING = [0, 2, 3, 5], [1, 4, 6]
HEADS: dict[str, Callable[..., CodeHead]] = {
    "canonical": lambda **o: FixedETFHead(8, 7, rotation="canonical", **o),
    "canonical, d = K - 1": lambda **o: FixedETFHead(6, 7, **o),
    "haar": lambda **o: FixedETFHead(8, 7, rotation="haar", **o),
    "learned": lambda **o: LearnedETFHead(8, 7, **o),
    "nearest": lambda **o: NearestETFHead(8, 7, momentum=0.3, **o),
    "class means": lambda **o: ClassMeanHead(5, 7, momentum=0.3, detach=False, **o),
    "unit rows": lambda **o: UnitRowHead(5, 7, **o),
    "orthoplex": lambda **o: FixedCodeHead(4, 7, code=OrthoplexCode(7, 4), **o),
    "dense code": lambda **o: FixedCodeHead(4, 7, code=F.normalize(torch.randn(7, 4).double(), dim=-1), **o),
    "nearest code": lambda **o: NearestCodeHead(4, 7, code=OrthoplexCode(7, 4), **o),
}


def make(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> CodeHead:
    torch.manual_seed(seed)
    made: CodeHead = HEADS[name](dtype=dtype, scale=2.0, **options)
    return made


@pytest.fixture(params=HEADS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def head(name: str) -> CodeHead:
    return make(name).deactivate(COMING)


def batch(head: CodeHead, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Samples of the classes that are here, two of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(12, head.in_features, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.tensor(HERE).repeat(3)
    targets[[1, 7]] = -100
    return features, targets


def among(targets: Tensor) -> Tensor:
    """The targets counted among the classes that are here."""
    places = torch.full((7,), -1).scatter(0, torch.tensor(HERE), torch.arange(4))
    return torch.where(targets < 0, targets, places[targets.clamp(min=0)])


def whole(head: CodeHead) -> CodeHead:
    """A copy for which all classes are here."""
    twin = copy.deepcopy(head)
    twin.active = None  # type: ignore[misc]  # nn.Module takes it for the buffer
    return twin


def gradients(loss: Tensor, features: Tensor, head: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [features, *head.parameters()]))


# --- logits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_a_softmax_chooses_among_the_classes_that_are_here(head: CodeHead, training: bool) -> None:
    features, targets = batch(head)
    expected = whole(head).train(training)(features, targets)[:, HERE]
    logits = head.train(training)(features, targets)
    # To rounding: a product may be summed in another order where its matrix lies elsewhere in memory.
    torch.testing.assert_close(logits[:, HERE], expected, rtol=1e-14, atol=1e-14)
    assert torch.isfinite(logits).all()
    shares = torch.softmax(logits, -1)
    torch.testing.assert_close(shares[:, HERE], torch.softmax(expected, -1), rtol=1e-13, atol=1e-14)
    assert not shares[:, COMING].any()
    assert torch.equal(logits.argmax(-1), torch.tensor(HERE)[expected.argmax(-1)])
    assert torch.equal(logits.topk(4).indices, torch.tensor(HERE)[expected.topk(4).indices])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("training", [True, False])
def test_cross_entropy_of_logits(head: CodeHead, smoothing: float, training: bool) -> None:
    """Gradients of all that learns are those of the cut logits; the value has a known constant more."""
    twin = whole(head).train(training)
    features, targets = batch(head)
    features.requires_grad_()
    cut = twin(features, targets)[:, HERE]
    expected = F.cross_entropy(cut, among(targets), label_smoothing=smoothing)
    loss = F.cross_entropy(head.train(training)(features, targets), targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected + smoothing * DROP * 3 / 7, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(loss, features, head), gradients(expected, features, twin), rtol=1e-9, atol=1e-12
    )


def test_the_derivative_of_masked_logits_is_that_of_finite_differences(head: CodeHead) -> None:
    features, _ = batch(head.eval())
    torch.autograd.gradcheck(head, features[:2].requires_grad_(), check_forward_ad=True)


def test_rows_of_classes_to_come_get_no_gradient() -> None:
    for loss in (
        lambda head, *b: F.cross_entropy(head(b[0]), b[1], label_smoothing=0.1),
        lambda head, *b: CodeCrossEntropy(head, label_smoothing=0.1)(*b),
        lambda head, *b: SampledCrossEntropy(head, 0.5, label_smoothing=0.1)(*b),
    ):
        head = make("unit rows").deactivate(COMING)
        torch.autograd.backward(loss(head, *batch(head)))
        assert isinstance(head, UnitRowHead)
        assert head.prototypes.grad is not None
        assert not head.prototypes.grad[COMING].any()
        assert (head.prototypes.grad[HERE].norm(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(name: str, dtype: torch.dtype) -> None:
    head = make(name, dtype=torch.float32).deactivate(COMING).eval()
    features, _ = batch(head, dtype=torch.float32)
    expected = torch.softmax(head(features), -1)
    with torch.autocast("cpu", dtype):
        cast = head(features)
    for logits in (cast, head(features.to(dtype)), head.to(dtype)(features.to(dtype))):
        assert logits.dtype == dtype
        assert torch.isfinite(logits).all()
        shares = torch.softmax(logits, -1)
        assert not shares[:, COMING].any()
        torch.testing.assert_close(shares.float(), expected, rtol=0, atol=0.05)


def test_the_linear_layer_has_the_same_logits(head: CodeHead) -> None:
    features, targets = batch(head)
    head.train()(features, targets)
    logits = head.eval()(features)
    torch.testing.assert_close(head.to_linear()(features), logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(F.linear(features, head.weight, head.bias), logits, rtol=1e-6, atol=1e-6)


# --- losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_from_features_is_that_of_the_classes_that_are_here(
    head: CodeHead, training: bool, smoothing: float
) -> None:
    """Its value too, and what the head learns."""
    twin = whole(head).train(training)
    features, targets = batch(head)
    features.requires_grad_()
    for kind in (CodeCrossEntropy, partial(SampledCrossEntropy, rate=1.0)):
        loss = kind(head, label_smoothing=smoothing).train(training)(features, targets)
        cut = twin(features, targets)[:, HERE]
        expected = F.cross_entropy(cut, among(targets), label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            gradients(loss, features, head), gradients(expected, features, twin), rtol=1e-9, atol=1e-12
        )
    state = head.state_dict()
    del state["active"]
    torch.testing.assert_close(dict(state), dict(twin.state_dict()), rtol=0, atol=0)


def test_a_prior_of_the_classes_that_are_here(head: CodeHead) -> None:
    """Of the others any number will do."""
    features, targets = batch(head.eval())
    prior = torch.tensor([5.0, 1e6, 3.0, 20.0, 1e-6, 1.0, 7.0], dtype=torch.float64)
    features.requires_grad_()
    cut = whole(head)(features)[:, HERE] + 0.7 * prior[HERE].log()
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(cut, among(targets), label_smoothing=smoothing)
        loss = CodeCrossEntropy(head, prior=prior, tau=0.7, label_smoothing=smoothing)(features, targets)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            torch.autograd.grad(loss, features), torch.autograd.grad(expected, features, retain_graph=True)
        )


def test_soft_targets(head: CodeHead) -> None:
    features, _ = batch(head.eval())
    shares = torch.zeros(12, 7, dtype=torch.float64)
    shares[:, HERE] = torch.softmax(torch.randn(12, 4, dtype=torch.float64), -1)
    expected = F.cross_entropy(whole(head)(features)[:, HERE], shares[:, HERE], label_smoothing=0.1)
    loss = CodeCrossEntropy(head, label_smoothing=0.1)
    torch.testing.assert_close(loss(features, shares), expected, rtol=1e-12, atol=1e-12)
    alone = F.cross_entropy(whole(head)(features[0])[HERE], shares[0, HERE], label_smoothing=0.1)
    torch.testing.assert_close(loss(features[0], shares[0]), alone, rtol=1e-12, atol=1e-12)
    bad = shares.roll(1, -1)
    with pytest.raises(InvalidArgumentError, match=r"must be active classes.*got classes \[1, 4, 6\]"):
        loss(features, bad)
    if head.accepts_targets:
        with pytest.raises(InvalidArgumentError, match="targets must be active classes"):
            head.train()(features, bad)


def test_an_ignored_target_may_be_a_class(head: CodeHead) -> None:
    features, targets = batch(head.eval())
    for ignored in (2, 4):  # one that is here, one that is not
        labels = torch.where(targets < 0, ignored, targets)
        cut = whole(head)(features)[:, HERE]
        keep = labels != ignored
        expected = F.cross_entropy(cut[keep], among(labels)[keep])
        for kind in (CodeCrossEntropy, partial(SampledCrossEntropy, rate=1.0)):
            found = kind(head, ignore_index=ignored).eval()(features, labels)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_only_active_classes_have_logits_in_the_loss() -> None:
    """Of 10^7 classes two are here: a frame would take 4e14 bytes."""
    classes = 10**7
    head = FixedETFHead(classes, classes)
    head.deactivate(torch.arange(2, classes))
    features = torch.zeros(1, classes, requires_grad=True)
    loss = CodeCrossEntropy(head)(features, torch.tensor([1]))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())


def test_a_class_that_is_not_here_is_refused_before_anything_changes(head: CodeHead) -> None:
    features, targets = batch(head)
    head.train()(features, targets)
    before = copy.deepcopy(head.state_dict())
    bad = torch.where(targets == 2, 4, targets)
    calls: list[Callable[[], Any]] = [
        lambda: head(features, bad),
        lambda: CodeCrossEntropy(head)(features, bad),
        lambda: SampledCrossEntropy(head, 0.5)(features, bad),
        lambda: CodeCrossEntropy(head).eval()(features, bad),
    ]
    for call in calls:
        with pytest.raises(InvalidArgumentError, match=r"must be active classes.*got class 4, not here"):
            call()
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
    head.activate([4]).train()(features, bad)


# --- who is here ------------------------------------------------------------------------------------------


def test_activate_and_deactivate(name: str) -> None:
    head = make(name)
    assert head.activate([1]).active is None  # it was here all along
    assert head.active_classes.tolist() == list(range(7))
    assert "active" not in head.state_dict()
    assert head.deactivate(range(2, 7)).active_classes.tolist() == [0, 1]
    assert head.activate(torch.tensor([5, 3])).active_classes.tolist() == [0, 1, 3, 5]
    assert head.deactivate([0]).active_classes.tolist() == [1, 3, 5]
    assert "active=3" in repr(head)
    features, _ = batch(head.eval())
    before = whole(head)(features)
    head.activate(range(7))
    assert torch.equal(head(features), before)
    head.deactivate([6]).reset_parameters()
    assert head.active_classes.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([7], r"classes must be in \[0, 7\), the classes of the head, got \[7\]"),
        ([-1], r"classes must be in \[0, 7\)"),
        (torch.tensor([2, 9]), r"classes must be in \[0, 7\).*got \[9\]"),
        ([1.0], "classes must be an integer, got 1.0"),
        (torch.tensor([1.0]), "classes must be numbers of classes, integers, got torch.float32"),
        (torch.ones(7, dtype=torch.bool), "classes must be numbers of classes, integers, got torch.bool"),
        (3, r"classes must be numbers of classes, such as \[3, 4\]"),
        ("3", r"classes must be numbers of classes, such as \[3, 4\]"),
        (range(7), "classes must leave at least one of the 7 classes active"),
    ],
)
def test_bad_classes_are_named_and_change_nothing(classes: Any, message: str) -> None:
    head = make("haar")
    with pytest.raises(InvalidArgumentError, match=message):
        head.deactivate(classes)
    assert head.active is None
    head.deactivate([0])
    with pytest.raises(InvalidArgumentError, match=message):
        head.deactivate(classes)
    assert head.active_classes.tolist() == list(range(1, 7))


def test_copies_and_files_know_who_is_here(name: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source = make(name).deactivate(COMING)
    features, targets = batch(source)
    source.train()(features, targets)
    expected = source.eval()(features)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    loaded = make(name, seed=1).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    safetensors.save_model(source, str(tmp_path / "head.safetensors"))
    read = make(name, seed=1).eval()
    if name not in ("dense code", "nearest code"):  # load_model finds no key missing or too many
        safetensors.load_model(read, str(tmp_path / "head.safetensors"))
    else:
        read.load_state_dict(safetensors.load_file(tmp_path / "head.safetensors"))
    for other in (loaded, read, copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert torch.equal(other(features), expected)
        assert other.active_classes.tolist() == HERE
        other.activate([4])
        assert other.active_classes.tolist() == [0, 2, 3, 4, 5]
    assert source.active_classes.tolist() == HERE


def test_a_checkpoint_from_before_says_that_all_are_here(name: str) -> None:
    source, head = make(name), make(name, seed=1).deactivate(COMING)
    head.load_state_dict(source.state_dict())
    assert head.active_classes.tolist() == list(range(7))


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (torch.zeros(7, dtype=torch.bool), "active must hold at least one class that is here"),
        (torch.ones(7), "active must be boolean, got torch.float32"),
        (torch.ones(6, dtype=torch.bool), "size mismatch for active"),
    ],
)
def test_a_state_dict_with_an_impossible_mask_is_refused(active: Tensor, message: str) -> None:
    head = make("haar").deactivate(COMING)
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict({**head.state_dict(), "active": active})
    assert head.active_classes.tolist() == HERE


def test_averages_of_models_follow() -> None:
    for options in ({}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True}):
        model = nn.Sequential(nn.Linear(3, 8), make("haar", dtype=torch.float32).deactivate(COMING))
        averaged = AveragedModel(model, **options).eval()  # type: ignore[arg-type]
        averaged.update_parameters(model)
        model[1].activate([4])
        averaged.update_parameters(model)
        assert averaged.module[1].active_classes.tolist() == [0, 2, 3, 4, 5]


def test_meta_and_moves() -> None:
    head = make("haar").deactivate(COMING).to("meta")
    assert head.active is not None
    assert head.active.is_meta
    with torch.device("meta"):
        made = FixedETFHead(8, 7).deactivate([6])
    made.to_empty(device="cpu").reset_parameters()
    assert made.active_classes.tolist() == list(range(7))


# --- torch.compile, torch.func ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "loss"),
    [("canonical", False), ("canonical", True), ("nearest", False), ("nearest", True), ("orthoplex", True)],
)
def test_compiles_as_one_graph_and_follows(head: CodeHead, loss: bool) -> None:
    def step(head: CodeHead, features: Tensor, targets: Tensor) -> Tensor:
        if loss:
            found: Tensor = CodeCrossEntropy(head, label_smoothing=0.1)(features, targets)
            return found
        return F.cross_entropy(head(features, targets), targets, label_smoothing=0.1)

    head, twin = copy.deepcopy(head), pickle.loads(pickle.dumps(head))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for classes in (HERE, [0, 2, 3, 4, 5]):
        if len(classes) > 4:
            for one in (head, twin):
                one.activate([4])
        features, targets = batch(head)
        targets = torch.where(targets == 0, classes[3], targets)
        ours, theirs = (features.clone().requires_grad_() for _ in range(2))
        mine, expected = compiled(head, ours, targets), step(twin, theirs, targets)
        torch.testing.assert_close(mine, expected)
        torch.testing.assert_close(
            torch.autograd.grad(mine, ours), torch.autograd.grad(expected, theirs), rtol=1e-7, atol=1e-9
        )


def test_the_eval_path_exports_and_takes_other_state(head: CodeHead) -> None:
    features, targets = batch(head)
    head.train()(features, targets)
    head.eval()
    shapes = {"features": {0: torch.export.Dim("batch")}}
    program = torch.export.export(head, (features,), dynamic_shapes=shapes)
    for size in (1, 12):
        torch.testing.assert_close(program.module()(features[:size]), head(features[:size]))
    state = {**head.state_dict(), "active": torch.ones(7, dtype=torch.bool)}
    assert torch.equal(torch.func.functional_call(head, state, (features,)), whole(head)(features))
    assert head.active_classes.tolist() == HERE


def test_func_grad_and_vmap_of_the_eval_path(head: CodeHead) -> None:
    features, targets = batch(head.eval())
    keep = targets >= 0
    features, targets = features[keep], targets[keep]

    def loss(row: Tensor, target: Tensor) -> Tensor:
        logits: Tensor = head(row)
        return F.cross_entropy(logits, target)

    found = torch.func.vmap(torch.func.grad(loss))(features, targets)
    features.requires_grad_()
    torch.autograd.backward(F.cross_entropy(head(features), targets, reduction="sum"))
    torch.testing.assert_close(found, features.grad)


# --- what else chooses among classes ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["orthoplex", "dense code"])
def test_predict_and_topk_of_codes(name: str) -> None:
    head = make(name).deactivate(COMING)
    assert isinstance(head, FixedCodeHead)
    features, _ = batch(head.eval())
    logits = head(features)
    assert torch.equal(head.predict(features), logits.argmax(-1))
    values, classes = head.topk(features, 4)
    torch.testing.assert_close(values, logits.topk(4).values)
    torch.testing.assert_close(logits.gather(-1, classes), values)
    with pytest.raises(InvalidArgumentError, match="number of active classes, 4, got 5"):
        head.topk(features, 5)
    head.deactivate([0, 3, 5])
    assert (head.predict(features) == 2).all()
    assert (head.topk(features, 1)[1] == 2).all()


def test_metrics_choose_among_the_classes_that_are_here(head: CodeHead) -> None:
    features, _ = batch(head.eval())
    logits, projections, lengths = answers(head, head.inputs(features))
    cosines = projections / lengths.unsqueeze(-1)
    torch.testing.assert_close(logits, head(features), rtol=1e-6, atol=1e-6)
    assert (cosines[:, COMING] == -1).all()
    assert torch.isin(cosines.argmax(-1), torch.tensor(HERE)).all()


@pytest.mark.parametrize("rotation", ["haar", "canonical"])
def test_neural_collapse_is_that_of_a_classifier_without_the_others(rotation: Any) -> None:
    head = FixedETFHead(8, 7, rotation=rotation, scale=2.0).deactivate(COMING)
    cut = nn.Linear(8, 4, bias=False)
    targets = torch.arange(80) % 4
    with torch.no_grad():
        cut.weight.copy_(2 * head.frame[HERE])
    features = 0.5 * torch.randn(80, 8) + 2 * head.frame[HERE][targets]
    metric = NeuralCollapse(7, 8, classifier=head, unseen="exclude")
    expected = NeuralCollapse(4, 8, classifier=cut)
    metric.update(features, torch.tensor(HERE)[targets])
    expected.update(features, targets)
    torch.testing.assert_close(metric.compute(), expected.compute(), rtol=1e-4, atol=1e-5, equal_nan=True)
