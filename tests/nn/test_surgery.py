"""ETF heads in models whose code knows nothing of them."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError, MissingTargetsError
from etflayers.nn import FixedETFHead, NearestETFHead, provide_targets, replace_classifier


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


# --- provide_targets --------------------------------------------------------------------------------------


def model_with_nearest_head() -> ResNet:
    torch.manual_seed(0)
    return replace_classifier(ResNet(), partial(NearestETFHead, generator=torch.Generator().manual_seed(0)))


def head_of(model: nn.Module) -> NearestETFHead:
    (head,) = (module for module in model.modules() if isinstance(module, NearestETFHead))
    return head


def test_targets_reach_the_head_inside_the_block_only() -> None:
    model, direct = model_with_nearest_head(), head_of(model_with_nearest_head())
    features = model.blocks(model.stem(IMAGES)).mean((2, 3))
    with provide_targets(model, TARGETS):
        logits = model(IMAGES)
    torch.testing.assert_close(logits, direct(features, TARGETS))
    with pytest.raises(MissingTargetsError, match=r"provide_targets\(model, targets\)"):
        model(IMAGES)


def test_targets_are_gone_after_an_error_in_the_block() -> None:
    model = model_with_nearest_head()
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
    model = model_with_nearest_head()
    before = model.state_dict().keys()
    with provide_targets(model, TARGETS):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert model.state_dict().keys() == before
    for other in copies:
        with pytest.raises(MissingTargetsError):
            other(IMAGES)


def test_models_without_a_nearest_head_and_targets_that_are_none_are_named() -> None:
    for model in (ResNet(), replace_classifier(ResNet(), FixedETFHead)):
        with (
            pytest.raises(InvalidArgumentError, match="model has no head that accepts targets"),
            provide_targets(model, TARGETS),
        ):
            pass
    with (
        pytest.raises(InvalidArgumentError, match="targets must be a tensor of class indices, got list"),
        provide_targets(model_with_nearest_head(), [0, 1]),  # type: ignore[arg-type]
    ):
        pass


# --- models of other libraries ----------------------------------------------------------------------------


def train_and_evaluate(model: nn.Module, num_classes: int, **inputs: Tensor) -> None:
    """One training step and one evaluation of a model that returns logits, or an output that holds them."""

    def logits_of(output: Any) -> Tensor:
        logits: Tensor = getattr(output, "logits", output)
        return logits

    size = len(next(iter(inputs.values())))
    targets = torch.arange(size) % num_classes
    with provide_targets(model.train(), targets):
        logits = logits_of(model(**inputs))
    torch.autograd.backward(F.cross_entropy(logits, targets))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert any(bool((grad != 0).any()) for grad in grads)
    with torch.no_grad():
        alone = logits_of(model.eval()(**{name: tensor[:1] for name, tensor in inputs.items()}))
    assert alone.shape == (1, num_classes)


def test_own_resnet() -> None:
    train_and_evaluate(model_with_nearest_head(), 5, x=IMAGES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"image_size": 32} if name.startswith("vit") else {}
    model = replace_classifier(getattr(models, name)(num_classes=5, **options), NearestETFHead)
    train_and_evaluate(model, 5, x=torch.randn(5, 3, 32, 32))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32} if name.startswith("vit") else {}
    model = replace_classifier(timm.create_model(name, num_classes=5, **options), NearestETFHead)
    train_and_evaluate(model, 5, x=torch.randn(5, 3, 32, 32))


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 5,
}


@pytest.mark.filterwarnings("ignore")
def test_transformers_image_classification() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SMALL)
    model = replace_classifier(transformers.ViTForImageClassification(config), NearestETFHead)
    train_and_evaluate(model, 5, pixel_values=torch.randn(5, 3, 8, 8))


@pytest.mark.filterwarnings("ignore")
def test_transformers_sequence_classification() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, **SMALL)
    model = replace_classifier(transformers.BertForSequenceClassification(config), NearestETFHead)
    train_and_evaluate(model, 5, input_ids=torch.randint(20, (5, 7)))
