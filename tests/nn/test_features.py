"""What the classifier of a model receives, of a model that returns logits only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etflayers.errors import InvalidArgumentError
from etflayers.nn import FixedETFHead, NearestETFHead, capture_features, provide_targets

IMAGES = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))


def model_with(head: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), head)


@pytest.mark.parametrize("head", [NearestETFHead(6, 4, normalize=True), nn.Linear(6, 4)])
def test_features_are_what_the_backbone_makes_and_carry_its_graph(head: nn.Module) -> None:
    model = model_with(head).eval()
    with capture_features(model) as features:
        model(IMAGES)
        model(IMAGES[:3])
    model(IMAGES)  # after the block nothing is collected
    first, second = features
    torch.testing.assert_close(first, model[:2](IMAGES), rtol=0, atol=0)
    assert second.shape == (3, 6)
    torch.autograd.backward(first.square().sum())
    assert model[0].weight.grad is not None


def test_a_layer_is_chosen_by_itself_or_by_name() -> None:
    model = nn.ModuleDict({"a": FixedETFHead(6, 4), "b": FixedETFHead(6, 3)})
    for layer in ("b", model["b"]):
        with capture_features(model, layer) as features:
            model["a"](torch.zeros(1, 6)), model["b"](features=torch.ones(1, 6))
        assert [rows.tolist() for rows in features] == [[[1.0] * 6]]


def test_it_works_beside_targets_that_are_provided() -> None:
    model = model_with(NearestETFHead(6, 4))
    with provide_targets(model, torch.arange(10) % 4), capture_features(model) as features:
        logits: Tensor = model(IMAGES)
    assert len(features[0]) == len(logits) == 10


def test_an_exception_takes_the_hook_away() -> None:
    model = model_with(FixedETFHead(6, 4))
    with pytest.raises(RuntimeError, match="shapes"), capture_features(model):
        model(IMAGES[:, :2])
    assert not model[2]._forward_pre_hooks


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (None, r"model has several classifiers, \['0', '1'\]: choose one by layer="),
        ("2", r"layer must be a module of the model, one of \['', '0', '1'\]: '2'"),
        (nn.Linear(2, 3), r"which does not contain this Linear\(in_features=2"),
    ],
)
def test_a_layer_that_is_not_there_is_named(layer: Any, message: str) -> None:
    model = nn.Sequential(FixedETFHead(4, 4), FixedETFHead(4, 3))
    with pytest.raises(InvalidArgumentError, match=message), capture_features(model, layer):
        pass
