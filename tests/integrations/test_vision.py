"""Heads in the models of torchvision and timm, with random weights and small images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.nn import NearestETFHead, find_classifiers, provide_targets, replace_classifier, restore_linear

models = pytest.importorskip("torchvision.models")
v2 = pytest.importorskip("torchvision.transforms.v2")
timm = pytest.importorskip("timm")

# What these libraries warn of is theirs; what the library itself causes is an error.
pytestmark = pytest.mark.filterwarnings("ignore", r"error:::etflayers(\.|$)")

K = 5
TARGETS = torch.arange(2 * K) % K

# Each model: the layers that make its logits, the side of its images, and what else it is made with.
TORCHVISION: dict[str, tuple[list[str], int, dict[str, Any]]] = {
    "resnet18": (["fc"], 32, {}),
    "mobilenet_v2": (["classifier.1"], 32, {}),
    "mobilenet_v3_small": (["classifier.3"], 32, {}),
    "shufflenet_v2_x0_5": (["fc"], 32, {}),
    "efficientnet_b0": (["classifier.1"], 32, {}),
    "regnet_y_400mf": (["fc"], 32, {}),
    "densenet121": (["classifier"], 32, {}),
    "convnext_tiny": (["classifier.2"], 32, {}),
    "swin_t": (["head"], 32, {}),
    "vit_b_16": (["heads.head"], 32, {"image_size": 32}),
}
TIMM: dict[str, tuple[list[str], int, dict[str, Any]]] = {
    "resnet10t": (["fc"], 32, {}),
    "mobilenetv3_small_050": (["classifier"], 32, {}),
    "efficientnet_lite0": (["classifier"], 32, {}),
    "convnext_atto": (["head.fc"], 32, {}),
    "regnetx_002": (["head.fc"], 32, {}),
    "mobilevit_xxs": (["head.fc"], 64, {}),
    "fastvit_t8": (["head.fc"], 64, {}),
    "poolformer_s12": (["head.fc"], 64, {}),
    "vit_tiny_patch16_224": (["head"], 32, {"img_size": 32}),
    "eva02_tiny_patch14_224": (["head"], 28, {"img_size": 28}),
    "mixer_s32_224": (["head"], 64, {"img_size": 64}),
    "pvt_v2_b0": (["head"], 64, {}),
    "xcit_nano_12_p16_224": (["head"], 64, {}),
    "swin_tiny_patch4_window7_224": (["head.fc"], 56, {"img_size": 56}),
    "deit_tiny_distilled_patch16_224": (["head", "head_dist"], 32, {"img_size": 32}),
    "levit_128s": (["head.linear", "head_dist.linear"], 224, {}),
    "repvit_m0_9": (["head.head.l", "head.head_dist.l"], 64, {}),
}
ALL = [
    *(
        pytest.param(getattr(models, name), *case, id=f"torchvision-{name}")
        for name, case in TORCHVISION.items()
    ),
    *(
        pytest.param(partial(timm.create_model, name), *case, id=f"timm-{name}")
        for name, case in TIMM.items()
    ),
]


def heads_of(model: nn.Module) -> list[NearestETFHead]:
    return [module for module in model.modules() if isinstance(module, NearestETFHead)]


def step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    with provide_targets(model, TARGETS):
        logits = model(images)
    torch.autograd.backward(F.cross_entropy(logits, TARGETS))
    optimizer.step()


@pytest.mark.parametrize(("make", "names", "side", "options"), ALL)
def test_a_classifier_is_found_replaced_trained_and_restored(
    make: Callable[..., nn.Module], names: list[str], side: int, options: dict[str, Any]
) -> None:
    model, images = make(num_classes=K, **options), torch.randn(2 * K, 3, side, side)
    assert list(find_classifiers(model)) == names
    assert list(find_classifiers(model, example_inputs=images[:2])) == names
    keys = model.state_dict().keys()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    replace_classifier(model, NearestETFHead)
    heads = heads_of(model)
    assert len(heads) == len(names)
    step(model.train(), images, torch.optim.SGD(model.parameters(), lr=0.1))
    for head in heads:
        assert head.averages.counts.tolist() == [2] * K
    # The gradient has come through the frame to the first layer that learns. Where a batch is normalized or
    # scaled, a parameter or two may have none, but never one that is no number.
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(bool(torch.isfinite(grad).all()) for grad in grads.values())
    first = next(name for name, parameter in model.named_parameters() if parameter.ndim > 1)
    assert not torch.equal(model.get_parameter(first), before[first])

    # Several classifiers of one model are averaged, as each of these models does with its linear layers.
    outputs: list[Tensor] = []
    hooks = [head.register_forward_hook(lambda *args: outputs.append(args[-1])) for head in heads]
    with torch.no_grad():
        expected = model.eval()(images)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(expected, torch.stack(outputs).mean(0))
    # In eval the logits of a sample do not depend on the rest of the batch, and linear layers have the same.
    size = float(expected.abs().max())
    with torch.no_grad():
        torch.testing.assert_close(model(images[:1]), expected[:1], rtol=1e-4, atol=1e-4 * size)
        torch.testing.assert_close(restore_linear(model)(images), expected, rtol=1e-4, atol=1e-4 * size)
    assert {*keys} - {f"{name}.bias" for name in names} <= {*model.state_dict()} <= {*keys}


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_an_average_of_models_ends_in_an_etf(name: str) -> None:
    _, side, options = TIMM[name]
    model = replace_classifier(timm.create_model(name, num_classes=K, **options), NearestETFHead)
    averaged = timm.utils.ModelEmaV3(model, decay=0.5)
    optimizer, images = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2 * K, 3, side, side)
    means = heads_of(averaged.module)[0].averages.means.clone()
    for _ in range(3):
        step(model.train(), images, optimizer)
        averaged.update(model)
        means.lerp_(heads_of(model)[0].averages.means, 0.5)
    (head,) = heads_of(averaged.module)
    torch.testing.assert_close(head.averages.means, means)
    with torch.no_grad():
        logits = averaged(images)  # a ModelEmaV3 is in eval mode
    assert bool(torch.isfinite(logits).all())
    # K unit vectors, each pair of them at -1 / (K - 1): no average of frames has that.
    cosines = (torch.eye(K) * K - 1) / (K - 1)
    torch.testing.assert_close(head.frame @ head.frame.T, cosines, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "backend"), [("resnet10t", "aot_eager"), ("vit_tiny_patch16_224", "inductor")]
)
def test_a_compiled_model_trains_as_it_does_eagerly(name: str, backend: str) -> None:
    _, side, options = TIMM[name]
    # float64: BatchNorm over few samples and a frame of few means make much of the last digit.
    model = replace_classifier(timm.create_model(name, num_classes=K, **options), NearestETFHead).double()
    images = torch.randn(2 * K, 3, side, side, dtype=torch.float64)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for module in (compiled, twin):
        step(module.train(), images, torch.optim.SGD(module.parameters(), lr=0.1))
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(images), twin.eval()(images), rtol=1e-6, atol=1e-8)


MIXERS = {
    "torchvision-mixup": lambda: v2.MixUp(num_classes=K),
    "torchvision-cutmix": lambda: v2.CutMix(num_classes=K),
    "timm": lambda: timm.data.Mixup(cutmix_alpha=1.0, label_smoothing=0.1, num_classes=K),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixed_images_give_each_class_its_share(mixer: str) -> None:
    _, side, options = TIMM["resnet10t"]
    model = replace_classifier(timm.create_model("resnet10t", num_classes=K, **options), NearestETFHead)
    images, shares = MIXERS[mixer]()(torch.randn(2 * K, 3, side, side), TARGETS)
    assert shares.shape == (2 * K, K)
    (head,) = heads_of(model)
    features: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: features.append(args[0].detach()))
    with provide_targets(model.train(), shares):
        logits = model(images)
    hook.remove()
    torch.autograd.backward(F.cross_entropy(logits, shares))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    # In the first batch the mean of a class is the mean of all samples, each with its share in that class.
    shares = shares.to(features[0])
    expected = shares.T @ features[0] / shares.sum(0).unsqueeze(-1)
    torch.testing.assert_close(head.averages.means, expected, rtol=1e-4, atol=1e-5)
