"""What happens to a head between training passes: meta, reset, averages of models, files, foreign writes."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from etflayers.errors import ManifoldError
from etflayers.functional import nearest_etf
from etflayers.geometry import is_simplex_etf, random_stiefel, simplex_etf
from etflayers.nn import (
    ClassMeanHead,
    CodeHead,
    ETFHead,
    FixedETFHead,
    LearnedETFHead,
    NearestETFHead,
    UnitRowHead,
    provide_targets,
)

if TYPE_CHECKING:
    from tests.nn.conftest import MakeHead

TARGETS = torch.arange(12) % 4


def batch(seed: int = 0, in_features: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(12, in_features, generator=torch.Generator().manual_seed(seed)) + 2, TARGETS


def trained(head: ETFHead, seed: int = 0) -> ETFHead:
    head(*batch(seed))
    return head


def model_of(head: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), head)


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    features, targets = batch(seed, in_features=5)
    logits = model[2](model[1](model[0](features)), targets)  # type: ignore[index]
    optimizer.zero_grad()
    torch.autograd.backward(F.cross_entropy(logits, targets))
    optimizer.step()


def assert_valid(head: CodeHead) -> None:
    """An ETF, where the head is one, unit rows, and logits that are those of its own weight and bias."""
    if isinstance(head, ETFHead):
        assert is_simplex_etf(head.frame), is_simplex_etf(head.frame).reason
    torch.testing.assert_close(head.frame.norm(dim=-1), torch.ones(4), rtol=1e-5, atol=1e-5)
    features, _ = batch(5)
    logits = head.eval()(features)
    torch.testing.assert_close(logits, F.linear(features, head.weight, head.bias), rtol=1e-4, atol=1e-4)


# --- weight and bias --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_weight_and_bias_are_those_of_the_linear_layer_with_the_same_logits(
    make_head: MakeHead, scale: float
) -> None:
    head = trained(make_head(scale=scale, dtype=torch.float32)).eval()
    features, _ = batch(3)
    expected = head(features)
    torch.testing.assert_close(F.linear(features, head.weight, head.bias), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(head.weight, scale * head.frame, rtol=0, atol=0)
    assert (head.bias is None) == (head.center is None)


def test_the_bias_is_rounded_once() -> None:
    head = NearestETFHead(300, 100, scale=3.0, generator=torch.Generator().manual_seed(0))
    head(torch.randn(200, 300) + 100, torch.arange(200) % 100)
    assert head.center is not None
    assert torch.equal(head.bias, (-3 * (head.frame.double() @ head.center.double())).float())


@pytest.mark.parametrize("make", [FixedETFHead, NearestETFHead])
def test_conversion_to_double_changes_no_digit_of_the_frame(make: Any) -> None:
    head = make(6, 4, generator=torch.Generator().manual_seed(0))
    before = head.frame.clone()
    assert torch.equal(head.double().frame, before.double())


def test_an_initializer_cannot_reach_the_frame_through_weight(make_head: MakeHead) -> None:
    """``model.apply(init)`` that fills every two-dimensional ``weight`` leaves the head as it was."""

    def init(module: nn.Module) -> None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            with torch.no_grad():
                nn.init.normal_(weight)

    model = model_of(make_head())
    before = model[2].frame.detach().clone()
    linear = model[0].weight.detach().clone()
    model.apply(init)
    assert torch.equal(model[2].frame, before)
    assert not torch.equal(model[0].weight, linear)


# --- reset_parameters, meta, to_empty ---------------------------------------------------------------------


def test_reset_parameters_is_a_fresh_start(make_head: MakeHead) -> None:
    head = trained(make_head())
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    torch.manual_seed(123)
    head.reset_parameters()
    assert_valid(head)
    if isinstance(head, NearestETFHead):
        assert not head.averages.seen.any()
        assert head.center is not None
        assert not head.center.any()
    if before and "canonical" not in repr(head):
        name = next(name for name in before if "averages" not in name)
        assert not torch.allclose(head.state_dict()[name], before[name], rtol=0, atol=1e-2)
    torch.manual_seed(124)
    head.reset_parameters()
    first = head.frame.detach().clone()
    torch.manual_seed(124)
    head.reset_parameters()
    assert torch.equal(head.frame, first)
    assert_valid(trained(head.train()))


def test_reset_parameters_keeps_what_was_given() -> None:
    anchor = simplex_etf(4, 6, rotation="haar", generator=torch.Generator().manual_seed(4))
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0])
    head = NearestETFHead(6, 4, anchor=anchor, class_weights=weights)
    trained(head)
    poison(head, 7.0)
    head.to_empty(device="cpu")
    poison(head, 3.0)
    head.reset_parameters()
    assert torch.equal(head.frame, anchor)
    assert head.anchor is not None
    assert torch.equal(head.anchor, anchor)
    assert head.class_weights is not None
    assert torch.equal(head.class_weights, weights)

    fixed = FixedETFHead(6, 4, rotation=random_stiefel(6, 3))
    frame = fixed.frame.clone()
    fixed.reset_parameters()
    assert torch.equal(fixed.frame, frame)
    poison(fixed, 7.0)
    with pytest.raises(ManifoldError, match="overwritten"):
        fixed.reset_parameters()


def poison(module: nn.Module, value: float) -> None:
    """What ``torch.empty`` may have found."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(value if tensor.is_floating_point() else 7)


def on_meta(make_head: MakeHead) -> ETFHead:
    with torch.device("meta"):
        head = make_head()
    assert all(t.is_meta for t in (*head.parameters(), *head.buffers()))
    return head


def test_a_head_from_meta_is_valid_after_reset(make_head: MakeHead) -> None:
    head = on_meta(make_head)
    assert head(torch.ones(2, 6, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")).is_meta
    head.to_empty(device="cpu")
    poison(head, 3e-41)
    head.reset_parameters()
    assert_valid(head)
    assert_valid(trained(head.train()))


@pytest.mark.parametrize("value", [0.0, 3e-41, 1e30, float("nan")])
def test_a_head_from_meta_without_reset_is_refused(make_head: MakeHead, value: float) -> None:
    """Refused, or valid all the same: never memory garbage."""
    head = on_meta(make_head).to_empty(device="cpu")
    poison(head, value)
    if not list(head.state_dict()):  # canonical: nothing to lose
        assert_valid(head)
        return
    if isinstance(head, UnitRowHead):
        return  # a weight like any other: nothing tells a learned row from garbage
    if isinstance(head, ClassMeanHead) and abs(value) < 1:
        with pytest.raises(ManifoldError, match="reset_parameters"):
            head.eval()(batch()[0])
        assert_valid(trained(head.train()))  # in a batch of all classes each gets a mean
        return
    if isinstance(head, LearnedETFHead) and head.manifold is None and abs(value) < 1e38:
        assert_valid(head)  # any finite matrix has a nearest ETF
        return
    for training in (True, False):
        with pytest.raises((ManifoldError, ArithmeticError)):
            head.train(training)(*batch())


def test_a_head_from_meta_takes_a_checkpoint(make_head: MakeHead) -> None:
    source = trained(make_head(seed=3))
    for assign in (True, False):
        head = on_meta(make_head)
        if not assign:
            head.to_empty(device="cpu")
        head.load_state_dict(source.state_dict(), assign=assign)
        if head.state_dict():
            assert torch.equal(head.eval()(batch()[0]), source.eval()(batch()[0]))


# --- averages of models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "ema", "ema foreach"])
@pytest.mark.parametrize("evaluate_between", [False, True])
def test_the_frame_of_an_averaged_model_is_an_etf(
    make_head: MakeHead, kind: str, evaluate_between: bool
) -> None:
    options: dict[str, Any] = {
        "mean": {},
        "ema": {"avg_fn": lambda old, new, _: old + 0.2 * (new - old)},
        "ema foreach": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    }[kind]
    torch.manual_seed(0)
    model = model_of(make_head())
    averaged = AveragedModel(model, use_buffers=True, **options)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.5)
    head_optimizer = optimizer_of(model[2])
    stored = []
    for seed in range(6):
        step_on(model, optimizer, seed)
        head_optimizer.step()
        averaged.update_parameters(model)
        if isinstance(model[2], NearestETFHead):
            stored.append(averaged.module[2].vertices.clone())
        if evaluate_between and "geoopt" not in repr(model[2]):
            averaged.eval()(batch(1, in_features=5)[0])
    if isinstance(model[2], NearestETFHead):
        # Not vacuous: what the averaging wrote was no ETF, and the frame is the one nearest to it.
        assert not is_simplex_etf(stored[-1])
        torch.testing.assert_close(averaged.module[2].frame, nearest_etf(stored[-1]), rtol=0, atol=1e-5)
    with expected_refusal(model[2]):
        averaged.eval()(batch(1, in_features=5)[0])
        assert_valid(averaged.module[2])


def optimizer_of(head: nn.Module) -> torch.optim.Optimizer:
    if isinstance(head, LearnedETFHead) and head.manifold == "geoopt":
        optimizer: torch.optim.Optimizer = pytest.importorskip("geoopt").optim.RiemannianSGD(
            head.parameters(), lr=0.5
        )
        return optimizer
    return torch.optim.SGD([*head.parameters(), nn.Parameter(torch.zeros(1))], lr=0.5)


def expected_refusal(head: nn.Module) -> Any:
    """A point on the manifold cannot be averaged; its head says so."""
    if isinstance(head, LearnedETFHead) and head.manifold == "geoopt":
        return pytest.raises(ManifoldError, match="an average of models")
    return contextlib.nullcontext()


def test_an_average_of_state_dicts_loads(make_head: MakeHead) -> None:
    one, other = trained(make_head(seed=0), 1), trained(make_head(seed=1), 2)
    states = one.state_dict(), other.state_dict()
    mean = {
        name: (0.7 * states[0][name] + 0.3 * states[1][name]).to(states[0][name].dtype) for name in states[0]
    }
    head = make_head(seed=2)
    head.load_state_dict(mean)
    with expected_refusal(head):
        head.eval()(batch()[0])
        assert_valid(head)


def test_averages_that_nearly_cancel_in_one_direction_have_a_nearest_frame() -> None:
    rotation = random_stiefel(6, 3)
    one, other = (simplex_etf(4, 6, rotation=rotation * torch.tensor([1.0, 1.0, s])) for s in (1, -1))
    head = NearestETFHead(6, 4).eval()
    with torch.no_grad():
        head.vertices.copy_(0.55 * one + 0.45 * other)
    torch.testing.assert_close(head.frame, one, rtol=0, atol=1e-5)


def test_an_average_that_was_rounded_to_half_precision_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (simplex_etf(4, 6, rotation="haar", generator=generator) for _ in range(2))
    average = 0.8 * one + 0.2 * other
    head = NearestETFHead(6, 4).eval()
    with torch.no_grad():
        head.vertices.copy_(average.bfloat16())
    torch.testing.assert_close(head.frame, nearest_etf(average), rtol=0, atol=0.01)


def test_averages_that_cancel_are_refused() -> None:
    """The mean of a frame and its opposite is zero, to which every ETF is equally near."""
    head = NearestETFHead(6, 4)
    with torch.no_grad():
        head.vertices.mul_(1e-4)
    with pytest.raises(ManifoldError, match="nearly cancel has no nearest ETF"):
        head.eval()(batch()[0])


@pytest.mark.parametrize("make", [FixedETFHead, NearestETFHead])
def test_a_state_dict_whose_frame_is_no_etf_is_refused(make: Any) -> None:
    head = make(6, 4, generator=torch.Generator().manual_seed(0))
    good = copy.deepcopy(head.state_dict())
    frame = head.frame.clone()
    for bad in (torch.eye(4, 6), 2 * frame, 1.1 * frame, 0.9 * frame + 0.1, torch.full((4, 6), torch.nan)):
        head.load_state_dict({**good, "vertices": bad})
        for training in (True, False):
            with pytest.raises(ManifoldError, match="reset_parameters"):
                head.train(training)(*batch())
    head.load_state_dict(good)
    assert_valid(head)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("averages.counts", torch.tensor([3, -5, 1, 0]), "averages.counts must not be negative, got -5"),
        ("averages.updates", torch.full((4,), -1), "averages.updates must not be negative, got -1"),
        ("averages.counts", torch.ones(4), "averages.counts must be integers, got torch.float32"),
        ("averages.means", torch.full((4, 6), torch.nan), "averages.means must be finite"),
    ],
)
@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_with_impossible_averages_is_refused(
    name: str, value: Tensor, message: str, assign: bool
) -> None:
    head = trained(NearestETFHead(6, 4))
    good = copy.deepcopy(head.state_dict())
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict({**good, name: value}, assign=assign)
    for entry, tensor in head.averages.state_dict().items():
        assert torch.equal(tensor, good[f"averages.{entry}"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_state_dict_in_half_precision_leaves_full_precision(
    make_head: MakeHead, dtype: torch.dtype
) -> None:
    source = trained(make_head(seed=3))
    if isinstance(source, (FixedETFHead, UnitRowHead)):
        return  # which hold a weight like any other, in half precision too
    half = {name: t.to(dtype) if t.is_floating_point() else t for name, t in source.state_dict().items()}
    for assign in (True, False):
        head = make_head()
        kinds = {name: type(parameter) for name, parameter in head.named_parameters()}
        head.load_state_dict(half, assign=assign)
        assert all(t.dtype == source.state_dict()[name].dtype for name, t in head.state_dict().items())
        assert {name: type(parameter) for name, parameter in head.named_parameters()} == kinds
        if isinstance(head, LearnedETFHead) and head.manifold is not None:
            with pytest.raises(ManifoldError, match="proj_"):  # rounded off the manifold
                head(*batch())
            with torch.no_grad():
                head.rotation.proj_()  # type: ignore[operator]
        assert_valid(head)


def test_names_of_entries_of_earlier_versions_load() -> None:
    head, source = NearestETFHead(6, 4), trained(NearestETFHead(6, 4))
    renamed = {"vertices": "frame", "global_mean": "centre"}
    old = {renamed.get(name, name): tensor for name, tensor in source.state_dict().items()}
    head.load_state_dict(old)
    assert torch.equal(head.eval()(batch()[0]), source.eval()(batch()[0]))


# --- files, modes -----------------------------------------------------------------------------------------


def test_safetensors_round_trip(make_head: MakeHead, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, twin = model_of(trained(make_head(seed=0))), model_of(make_head(seed=1))
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    safetensors.load_model(twin, str(tmp_path / "model.safetensors"))
    features = batch(1, in_features=5)[0]
    assert torch.equal(twin.eval()(features), model.eval()(features))


def test_whole_models_are_saved(make_head: MakeHead) -> None:
    model = model_of(trained(make_head()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    features = batch(1, in_features=5)[0]
    assert torch.equal(twin.eval()(features), model.eval()(features))


def test_inference_mode(make_head: MakeHead) -> None:
    head = trained(make_head()).eval()
    features, targets = batch(1)
    expected = head(features)
    with torch.inference_mode():
        assert torch.equal(head(features), expected)
        fresh = make_head(seed=4)
        loaded = make_head(seed=5)
        loaded.load_state_dict(head.state_dict())
        torch.testing.assert_close(loaded.eval()(features), expected)
        assert_valid(fresh)
    with torch.inference_mode():
        head.train()(features, targets)
    assert_valid(head)


def test_parameters_and_buffers_are_contiguous(make_head: MakeHead) -> None:
    head = make_head()
    assert all(tensor.is_contiguous() for tensor in head.state_dict().values())


def test_fused_training_of_a_whole_model(make_head: MakeHead) -> None:
    """The default optimizer of large trainers; each head learns, and its frame is an ETF."""
    if "geoopt" in repr(make_head()):
        pytest.skip("its parameter is for geoopt's optimizers, and says so: see test_learned.py")
    torch.manual_seed(0)
    model = model_of(make_head())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for seed in range(30):
        step_on(model, optimizer, seed)
    assert_valid(model[2])


# --- from_pretrained --------------------------------------------------------------------------------------


def test_a_pretrained_model_without_the_keys_of_the_head(tmp_path: Path, make_head: MakeHead) -> None:
    """transformers builds the model on meta, loads what the file has, and leaves the rest empty."""
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
        model_type = "etf-test"

    class Backbone(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.body = nn.Linear(5, 6)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

    class Classifier(Backbone):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.head = make_head()
            self.post_init()

        def forward(self, features: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(features))
            return logits

    Backbone(Config()).save_pretrained(tmp_path)
    model = Classifier.from_pretrained(tmp_path)
    features, targets = batch(1, in_features=5)
    if isinstance(model.head, UnitRowHead):
        model.head.reset_parameters()  # a weight like any other, which _init_weights has to fill
    try:
        model.eval()(features)
    except (ManifoldError, ArithmeticError):  # the refusal names the remedy
        model.head.reset_parameters()
    assert_valid(model.head)
    model.train()
    with provide_targets(model, targets) if model.head.accepts_targets else torch.enable_grad():
        model(features)
    model.save_pretrained(tmp_path / "again")
    again = Classifier.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again.eval()(features), model.eval()(features))
