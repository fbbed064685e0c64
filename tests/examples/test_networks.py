"""The small networks: their shapes by the formulas, and what is random in them."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from torch import nn

from lab.data import ImageData, load_inputs
from lab.networks import NetworkName, make_body, make_factory, own_stream, seeded
from lab.settings import DataSettings
from lab.weights import DEVIATION, WeightsName, initialize


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_inputs(DataSettings(data="digits"))


@pytest.mark.parametrize(("shape", "side"), [((3, 32, 32), 8), ((1, 28, 28), 7), ((1, 9, 9), 3)])
def test_alexnet_has_the_published_sizes(shape: tuple[int, int, int], side: int) -> None:
    """Two convolutions with 64 channels, sides halved by each pooling and rounded up, then 384 and 192."""
    body = make_body("alexnet", shape, None, "none")
    weights = [tuple(value.shape) for value in body.parameters() if value.ndim > 1]
    assert weights == [(64, shape[0], 5, 5), (64, 64, 5, 5), (384, 64 * side**2), (192, 384)]
    assert body(torch.zeros(2, *shape)).shape == (2, 192)


@pytest.mark.parametrize(("name", "count"), [("lenet", 2), ("alexnet", 2), ("mlp", 1), ("convnet", 0)])
def test_dropout_follows_every_hidden_dense_layer(name: NetworkName, count: int) -> None:
    body = make_body(name, (1, 28, 28), 8, "none", 0.25)
    layers = list(body)  # type: ignore[call-overload]
    places = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Dropout)]
    assert len(places) == count
    for place in places:
        assert layers[place].p == 0.25
        assert isinstance(layers[place - 2], nn.Linear)


def test_dropout_leaves_the_first_weights_as_they_are(digits: ImageData) -> None:
    options: dict[str, Any] = {"width": 4}
    plain, dropped = (seeded(make_factory("alexnet", digits, dropout=p, **options), 3) for p in (0.0, 0.5))
    for one, other in zip(plain.parameters(), dropped.parameters(), strict=True):
        assert torch.equal(one, other)
    images = digits.test.images[:5]
    assert torch.equal(plain.eval()(images), dropped.eval()(images))
    assert not torch.equal(plain.train()(images), dropped.train()(images))


def test_own_stream_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    with own_stream(7):
        drawn = torch.rand(3)
    with own_stream(7):
        assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(torch.get_rng_state(), before)


FAN_IN, FAN_OUT = 300, 200
VARIANCES = {"xavier": 2 / (FAN_IN + FAN_OUT), "kaiming": 2 / FAN_IN, "normal": DEVIATION**2}
VARIANCES |= {"uniform": DEVIATION**2, "default": 1 / (3 * FAN_IN), "orthogonal": 1 / FAN_IN}


@pytest.mark.parametrize("weights", get_args(WeightsName))
def test_weights_have_the_variance_of_their_paper(weights: WeightsName) -> None:
    """PyTorch's own are uniform within 1 / sqrt(fan-in); of 60,000 numbers the variance is known to 2 %."""
    with own_stream(0):
        layer = nn.Linear(FAN_IN, FAN_OUT)
        initialize(layer, weights)
    values = layer.weight.detach().double()
    assert values.square().mean().item() == pytest.approx(VARIANCES[weights.split("-")[0]], rel=0.02)
    assert bool(layer.bias.any()) == (weights == "default")
    if weights == "orthogonal":
        torch.testing.assert_close(values @ values.T, torch.eye(FAN_OUT).double(), rtol=0, atol=1e-5)
        return
    kurtosis = (values.pow(4).mean() / values.square().mean() ** 2).item()
    uniform = weights.endswith("uniform") or weights == "default"
    assert kurtosis == pytest.approx(1.8 if uniform else 3.0, rel=0.03)
    if uniform:
        assert values.abs().max() <= math.sqrt(3 * VARIANCES[weights.split("-")[0]]) * (1 + 1e-6)


def test_networks_of_a_factory_start_as_told(digits: ImageData) -> None:
    """By default from Xavier's weights, as ever; with others, from those."""
    default, named, other = (
        seeded(make_factory("mlp", digits, width=9, **options), 0)
        for options in ({}, {"weights": "xavier-normal"}, {"weights": "orthogonal"})
    )
    first, same, rows = (dict(each.named_parameters())["body.1.weight"] for each in (default, named, other))
    assert torch.equal(first, same)
    torch.testing.assert_close(rows @ rows.T, torch.eye(9))
