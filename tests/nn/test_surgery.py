"""ETF heads in models whose code knows nothing of them."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError
from etflayers.nn import (
    CodeHead,
    FixedETFHead,
    NearestETFHead,
    provide_targets,
    replace_classifier,
    restore_linear,
)

if TYPE_CHECKING:
    from tests.nn.conftest import MakeHead


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn(self.conv(x)))


class ResNet(nn.Module):
    """A model as people write it: features only, a linear layer called fc."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


IMAGES = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(10) % 5


# --- replace_classifier -----------------------------------------------------------------------------------


def test_replaces_the_last_linear_layer_by_a_module() -> None:
    model, head = ResNet(), FixedETFHead(8, 5)
    assert replace_classifier(model, head) is model
    assert model.get_submodule("fc") is head
    assert model(IMAGES).shape == (10, 5)


def test_replaces_it_by_what_a_function_of_its_sizes_makes() -> None:
    model = replace_classifier(ResNet(num_classes=7), partial(NearestETFHead, scale=4.0))
    assert isinstance(model.fc, NearestETFHead)
    assert (model.fc.in_features, model.fc.num_classes, model.fc.scale) == (8, 7, 4.0)


def test_a_dotted_name_chooses_another_layer() -> None:
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 3)), "decoder": nn.Linear(3, 9)})
    replace_classifier(model, FixedETFHead(4, 3), name="head.0")
    head = model["head"]
    assert isinstance(head, nn.Sequential)
    assert isinstance(head[0], FixedETFHead)
    assert type(model["decoder"]) is nn.Linear


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    model = ResNet()
    model.alias = nn.ModuleList([model.fc])
    replace_classifier(model, FixedETFHead)
    assert isinstance(model.fc, FixedETFHead)
    assert model.alias[0] is model.fc


def test_the_head_goes_to_the_place_and_mode_of_the_layer() -> None:
    model = ResNet().to("meta").eval()
    head = replace_classifier(model, NearestETFHead(8, 5)).fc
    assert isinstance(head, NearestETFHead)
    assert head.frame.device.type == "meta"
    assert head.averages.means.device.type == "meta"
    assert not head.training


@pytest.mark.parametrize(
    ("model", "head", "name", "message"),
    [
        (ResNet(), FixedETFHead(9, 5), None, r"head has .* = \(9, 5\), but 'fc' of the model has \(8, 5\)"),
        (ResNet(), FixedETFHead(8, 6), None, r"head has .* = \(8, 6\), but 'fc' of the model has \(8, 5\)"),
        (ResNet(), nn.Identity(), None, r"head has .* = \(None, None\)"),
        (ResNet(), FixedETFHead, "classifier", r"one of \['fc'\]: 'classifier' is nothing"),
        (ResNet(), FixedETFHead, "stem", r"one of \['fc'\]: 'stem' is Conv2d"),
        (nn.Conv2d(3, 3, 1), FixedETFHead, None, "model has no nn.Linear to replace"),
        (nn.Linear(8, 5), FixedETFHead, None, "model is itself an nn.Linear"),
    ],
)
def test_bad_replacements_are_named_and_not_made(
    model: nn.Module, head: Any, name: str | None, message: str
) -> None:
    before = [(place, id(module)) for place, module in model.named_modules()]
    with pytest.raises(InvalidArgumentError, match=message):
        replace_classifier(model, head, name=name)
    assert [(place, id(module)) for place, module in model.named_modules()] == before


def test_every_classifier_gets_a_head_of_its_own() -> None:
    def distilled() -> nn.ModuleDict:
        return nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 3), "head_dist": nn.Linear(8, 3)})

    model = replace_classifier(distilled(), FixedETFHead)
    assert isinstance(model["head"], FixedETFHead)
    assert isinstance(model["head_dist"], FixedETFHead)
    assert model["head"] is not model["head_dist"]
    with pytest.raises(
        InvalidArgumentError, match=r"2 classifiers, \['head', 'head_dist'\]: give a function"
    ):
        replace_classifier(distilled(), FixedETFHead(8, 3))
    one = replace_classifier(distilled(), FixedETFHead(8, 3), name="head")
    assert type(one["head_dist"]) is nn.Linear
    both = replace_classifier(distilled(), FixedETFHead, name=["head_dist", "head"])
    assert not any(type(both[name]) is nn.Linear for name in ("head", "head_dist"))


def test_what_was_replaced_and_what_stays_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = ResNet()
    with caplog.at_level(logging.INFO, logger="etflayers"):
        replace_classifier(model, FixedETFHead)
    assert [record.message for record in caplog.records] == [
        "replaced 'fc', Linear(in_features=8, out_features=5, bias=True), by FixedETFHead"
    ]
    caplog.clear()
    model = ResNet()
    model.auxiliary = nn.Linear(3, 5)
    replace_classifier(model, FixedETFHead)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "linear layers with as many outputs stay: ['auxiliary']" in caplog.text


def test_a_head_that_is_a_linear_layer_is_not_said_to_stay(caplog: pytest.LogCaptureFixture) -> None:
    class LinearHead(nn.Linear):
        @property
        def num_classes(self) -> int:
            return self.out_features

    with caplog.at_level(logging.INFO, logger="etflayers"):
        replace_classifier(ResNet(), LinearHead)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_model_inside_ddp_is_refused() -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)

    for change in (lambda model: replace_classifier(model, FixedETFHead), restore_linear):
        with pytest.raises(InvalidArgumentError, match="model is inside DistributedDataParallel"):
            change(Wrapped())


# --- restore_linear ---------------------------------------------------------------------------------------


def test_a_restored_model_has_the_logits_of_eval_mode(make_head: MakeHead) -> None:
    model = nn.Sequential(nn.Linear(3, 6), make_head(scale=3.0))
    inputs = torch.randn(8, 3)
    with torch.no_grad():
        model[1](model[0](inputs), torch.arange(8) % 4)  # a training pass: means and center are not zero
    expected = model.eval()(inputs)
    assert restore_linear(model) is model
    assert type(model[1]) is nn.Linear
    torch.testing.assert_close(model(inputs), expected)
    assert not model[1].training
    with pytest.raises(InvalidArgumentError, match="model has no head"):
        restore_linear(model)


def test_restoring_undoes_replacing_under_every_name() -> None:
    model = ResNet()
    model.alias = nn.ModuleList([model.fc])
    places = [place for place, _ in model.named_modules(remove_duplicate=False)]
    restore_linear(replace_classifier(model, NearestETFHead))
    assert type(model.fc) is nn.Linear
    assert model.alias[0] is model.fc
    assert [place for place, _ in model.named_modules(remove_duplicate=False)] == places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_layer_has_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 6), NearestETFHead(6, 4)).to(dtype).eval()
    inputs = torch.randn(8, 3, dtype=dtype)
    expected = model(inputs)
    assert restore_linear(model)(inputs).dtype == dtype
    # The head computes in at least float32, the layer in the dtype of the model: one rounding of each factor.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(model(inputs), expected, rtol=tolerance, atol=tolerance)
    model = restore_linear(nn.Sequential(nn.Linear(3, 6), FixedETFHead(6, 4)), dtype=dtype)
    assert model[1].weight.dtype == dtype


def test_what_cannot_be_restored_is_named_and_nothing_changed() -> None:
    model = nn.ModuleDict({"a": FixedETFHead(6, 4), "b": FixedETFHead(6, 4, normalize=True)})
    with pytest.raises(InvalidArgumentError, match=r"heads with normalize=True, \['b'\]"):
        restore_linear(model)
    assert isinstance(model["a"], FixedETFHead)
    with pytest.raises(InvalidArgumentError, match=r"model is itself a head: head\.to_linear\(\)"):
        restore_linear(FixedETFHead(6, 4))


# --- other tracers ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_symbolic_trace_and_script_name_the_way(make_head: MakeHead) -> None:
    model = nn.Sequential(nn.Linear(3, 6), make_head()).eval()
    inputs = torch.randn(8, 3)
    with pytest.raises(InvalidArgumentError, match=r"restore_linear\(model\), or use torch\.export"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(InvalidArgumentError, match=r"use torch\.export or"):
        torch.jit.script(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, CodeHead) or super().is_leaf_module(m, module_qualified_name)

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(traced(inputs), model(inputs), rtol=0, atol=0)
    expected = model(inputs)
    traced = torch.fx.symbolic_trace(restore_linear(model))
    torch.testing.assert_close(traced(inputs), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_without_gradients(make_head: MakeHead) -> None:
    model = nn.Sequential(nn.Linear(3, 6), make_head()).eval()
    inputs = torch.randn(8, 3)
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs[:2])
        torch.testing.assert_close(traced(inputs), model(inputs), rtol=0, atol=0)


# --- a training step; tests/integrations has the models of other libraries --------------------------------


def test_own_resnet() -> None:
    model = replace_classifier(ResNet(), NearestETFHead)
    with provide_targets(model.train(), TARGETS):
        logits = model(IMAGES)
    torch.autograd.backward(F.cross_entropy(logits, TARGETS))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert any(bool((grad != 0).any()) for grad in grads)
    with torch.no_grad():
        assert model.eval()(IMAGES[:1]).shape == (1, 5)
