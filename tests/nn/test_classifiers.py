"""Which layer of a model makes its logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError
from etflayers.nn import FixedETFHead, find_classifiers, replace_classifier

IMAGES = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A body as transformers have it: every branch adds to what is there."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Layers in any order of registration, run by any function."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def body() -> nn.Module:
    return nn.Sequential(Residual(), Residual())


class Timm(Net):
    """The interface of timm."""

    def __init__(
        self, classifier: Callable[[Any], Any], run: Callable[[Any, Tensor], Any], **layers: Any
    ) -> None:
        super().__init__(run, **layers)
        self.classifier_of = classifier

    def get_classifier(self) -> Any:
        return self.classifier_of(self)


def linear(num_classes: int = 3, width: int = 5) -> nn.Linear:
    return nn.Linear(width, num_classes)


# What makes the logits, by the name of the layer, for models of every kind.
MODELS: dict[str, tuple[nn.Module, list[str]]] = {
    "registered last": (Net(lambda m, x: m.fc(m.body(x)), body=body(), fc=linear()), ["fc"]),
    "registered first": (Net(lambda m, x: m.fc(m.body(x)), fc=linear(), body=body()), ["fc"]),
    "sequential": (nn.Sequential(nn.Flatten(), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), ["3"]),
    "log-softmax last": (
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(-1)),
        ["2"],
    ),
    "a head of two layers": (
        Net(
            lambda m, x: m.head(m.body(x)),
            head=nn.Sequential(nn.Linear(5, 5), nn.Tanh(), linear()),
            body=body(),
        ),
        ["head.2"],
    ),
    "get_classifier": (
        Timm(lambda m: m.top, lambda m, x: m.top(m.body(x)), top=linear(), body=body()),
        ["top"],
    ),
    "two classifiers, as in deit_distilled and levit": (
        Timm(
            lambda m: (m.top, m.top_dist),
            lambda m, x: (m.top(m.body(x)) + m.top_dist(x)) / 2,
            top=linear(),
            top_dist=linear(),
            body=body(),
        ),
        ["top", "top_dist"],
    ),
    "two classifiers in one head, as in repvit": (
        Timm(
            lambda m: m.top,
            lambda m, x: (m.top.head(m.body(x)) + m.top.head_dist(x)) / 2,
            top=nn.ModuleDict({"head": nn.Sequential(nn.BatchNorm1d(5), linear()), "head_dist": linear()}),
            body=body(),
        ),
        ["top.head.1", "top.head_dist"],
    ),
    "two classifiers by name, as in transformers": (
        Net(
            lambda m, x: {
                "logits": (m.cls_classifier(x) + m.distillation_classifier(m.body(x))) / 2,
                "hidden": m.body(x),
            },
            cls_classifier=linear(),
            distillation_classifier=linear(),
            body=body(),
        ),
        ["cls_classifier", "distillation_classifier"],
    ),
    "a wrapper": (
        Net(
            lambda m, x: m.net(x), loss=nn.MSELoss(), net=Net(lambda m, x: m.fc(x), fc=linear(), body=body())
        ),
        ["net.fc"],
    ),
    "tokens pooled after the head": (
        Net(lambda m, x: m.score(m.body(x[:, None].expand(-1, 6, -1)))[:, 2], score=linear(), body=body()),
        ["score"],
    ),
    "logits beside features": (
        Net(lambda m, x: (m.body(x), m.fc(m.body(x))), fc=linear(), body=body()),
        ["fc"],
    ),
    "activation in place": (
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3)),
        ["3"],
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_the_model_declares_is_what_a_batch_shows(kind: str, frozen: bool) -> None:
    model, expected = MODELS[kind]
    model.requires_grad_(not frozen)
    assert list(find_classifiers(model)) == expected
    assert list(find_classifiers(model, example_inputs=IMAGES)) == expected
    assert list(find_classifiers(model, example_inputs=(IMAGES,), num_classes=3)) == expected


HEADLESS: dict[str, nn.Module] = {
    "residual": Net(lambda m, x: m.norm(m.body(x)), body=body(), norm=nn.LayerNorm(5)),
    "residual, frozen": Net(lambda m, x: m.body(x), stem=linear(5), body=body()).requires_grad_(False),
    "get_classifier": Timm(lambda m: m.top, lambda m, x: m.top(m.body(x)), body=body(), top=nn.Identity()),
    "named": Net(lambda m, x: m.fc(m.body(x)), body=body(), fc=nn.Identity()),
    "a pooler with an activation": Net(
        lambda m, x: (m.body(x), m.pooler(x).tanh()), body=body(), pooler=linear(5)
    ),
    "rectified": Net(lambda m, x: m.last(m.body(x)).relu(), body=body(), last=linear(5)),
    "a residual branch behind a projection": Net(
        lambda m, x: m.proj(x) + m.branch(m.inner(m.proj(x)).relu()),
        proj=linear(5),
        inner=linear(5),
        branch=linear(5),
    ),
    "another layer last": nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)),
}


@pytest.mark.parametrize("kind", HEADLESS)
def test_a_model_without_classifier_is_refused_and_not_changed(kind: str) -> None:
    model = HEADLESS[kind]
    before = [(place, id(module)) for place, module in model.named_modules()]
    with pytest.raises(InvalidArgumentError, match="model does not say which linear layer makes its logits"):
        replace_classifier(model, FixedETFHead)
    with pytest.raises(InvalidArgumentError, match=r"no nn\.Linear of the model makes its output"):
        replace_classifier(model, FixedETFHead, example_inputs=IMAGES)
    assert [(place, id(module)) for place, module in model.named_modules()] == before


def test_running_the_model_leaves_no_trace() -> None:
    model = MODELS["two classifiers in one head, as in repvit"][0].requires_grad_(True)
    model.train()
    model.get_submodule("top.head").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    find_classifiers(model, example_inputs={"x": IMAGES})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_number_of_classes_chooses_and_guards() -> None:
    both = Net(lambda m, x: m.fc(m.body(x)), body=body(), fc=linear(3), head=linear(7))
    with pytest.raises(InvalidArgumentError, match=r"several layers .* \{'fc': \(5, 3\), 'head': \(5, 7\)\}"):
        find_classifiers(both)
    assert list(find_classifiers(both, num_classes=7)) == ["head"]
    assert list(find_classifiers(both, example_inputs=IMAGES)) == ["fc"]
    with pytest.raises(InvalidArgumentError, match="num_classes=4, but what makes the logits"):
        find_classifiers(both, num_classes=4)
    unnamed = Net(lambda m, x: m.out(m.body(x)), out=linear(3), body=body())
    assert list(find_classifiers(unnamed, num_classes=3)) == ["out"]
    unnamed.config = SimpleNamespace(num_labels=3)  # type: ignore[assignment]
    assert list(find_classifiers(unnamed)) == ["out"]


def test_a_head_says_how_many_classes_there_are_where_the_model_says_nothing() -> None:
    """A network as beginners write it: fc1, fc2, and no name by which the last one is known."""
    net = Net(lambda m, x: m.fc2(m.fc1(x).relu()), fc1=linear(8), fc2=linear(3, 8))
    assert list(find_classifiers(net, example_inputs=IMAGES)) == ["fc2"]
    with pytest.raises(InvalidArgumentError, match="does not say which"):
        replace_classifier(net, FixedETFHead)  # a function of the sizes, of which it does not know any
    with pytest.raises(InvalidArgumentError, match=r"num_classes\) = \(5, 3\), but 'fc2' .* \(8, 3\)"):
        replace_classifier(net, FixedETFHead(5, 3))
    head = FixedETFHead(8, 3)
    assert replace_classifier(net, head).fc2 is head


def test_the_classes_of_a_head_neither_choose_among_several_layers_nor_find_one_that_the_model_denies() -> (
    None
):
    hidden = Net(lambda m, x: m.fc2(m.fc1(x).relu()), fc1=linear(3), fc2=linear(3, 3))
    declared = Net(lambda m, x: m.fc(m.body(x)), body=linear(5), fc=linear(3))
    denied = Net(lambda m, x: m.fc(m.body(x)), body=linear(3), fc=nn.Identity())
    configured = Net(lambda m, x: m.out(m.body(x)), body=linear(3), out=linear(4, 3))
    configured.config = SimpleNamespace(num_labels=4)  # type: ignore[assignment]
    for model, reason in (
        (hidden, "does not say which"),
        (denied, "does not say which"),
        (declared, "'fc' of the model has"),
        (configured, "'out' of the model has"),
    ):
        with pytest.raises(InvalidArgumentError, match=reason):
            replace_classifier(model, FixedETFHead(5, 3 if model is not declared else 5))


def test_a_model_that_has_heads_already_says_so() -> None:
    model = replace_classifier(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)), FixedETFHead)
    assert list(find_classifiers(nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)))) == ["1"]
    with pytest.raises(InvalidArgumentError, match=r"heads \{'1': 'FixedETFHead'\} already: restore_linear"):
        find_classifiers(model)
