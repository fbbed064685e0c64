"""Networks small enough to train many thousand times: a body that makes features, and a head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from etflayers import NearestETFHead
from etflayers.checks import require
from lab.data import ImageData
from lab.heads import HeadName, make_head
from lab.weights import WeightsName, initialize

NetworkName = Literal["lenet", "alexnet", "convnet", "mlp", "linear"]
NormName = Literal["none", "instance", "batch"]
Factory = Callable[[], nn.Module]
CONVNET_WIDTH, MLP_WIDTH, ALEXNET_WIDTH = 32, 128, 64
WITH_HIDDEN_UNITS = ("lenet", "alexnet", "mlp")


class Network(nn.Module):
    """Features, then logits; the nearest-ETF head learns the class means if it is given targets."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        features = self.body(images)
        if targets is None or not isinstance(self.head, NearestETFHead):
            return self.head(features)
        return self.head(features, targets if targets.ndim == 1 else targets.argmax(1))


def hidden(in_features: int, out_features: int, dropout: float) -> list[nn.Module]:
    """A dense layer with ReLU; while the network trains, a share of its units is dropped."""
    drop = [nn.Dropout(dropout)] if dropout else []
    return [nn.Linear(in_features, out_features), nn.ReLU(), *drop]


def lenet(shape: tuple[int, int, int], dropout: float = 0.0) -> nn.Sequential:
    """LeNet-5 with ReLU and max pooling, as Wang et al. (2018) train it, without its last layer."""
    channels, height, width = shape
    require(
        min(height, width) >= 12,
        f"--network lenet needs images of at least 12x12 pixels, got {height}x{width}: add --image-size 28, "
        "or take --network convnet or mlp",
    )
    flat = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
    layers = [nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, *hidden(flat, 120, dropout), *hidden(120, 84, dropout))


def alexnet(shape: tuple[int, int, int], width: int, dropout: float = 0.0) -> nn.Sequential:
    """A small AlexNet: two 5x5 convolutions with ReLU, local response normalization and overlapping pooling.

    Two dense layers follow: with 64 channels, the default, of the 384 and 192 units of the network that
    Wang et al. (2018) train on CIFAR-10; the normalization is that of Krizhevsky, Sutskever, Hinton (2012).
    """
    channels, height, image_width = shape
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(channels, width, 5, padding=2), nn.ReLU()]
        layers += [nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0), nn.MaxPool2d(3, 2, padding=1)]
        channels, height, image_width = width, (height + 1) // 2, (image_width + 1) // 2
    flat = width * height * image_width
    dense = [*hidden(flat, 6 * width, dropout), *hidden(6 * width, 3 * width, dropout)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


def convnet(shape: tuple[int, int, int], width: int, norm: NormName) -> nn.Sequential:
    """Three blocks, 3x3 convolution, normalization, ReLU and average pooling (Gidaris, Komodakis 2018)."""
    in_channels, height, image_width = shape
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(in_channels, width, 3, padding=1), _norm(norm, width), nn.ReLU()]
        layers.append(nn.AvgPool2d(2, ceil_mode=True))
        in_channels, height, image_width = width, math.ceil(height / 2), math.ceil(image_width / 2)
    return nn.Sequential(*layers, nn.Flatten())


def _norm(name: NormName, channels: int) -> nn.Module:
    if name == "instance":
        return nn.GroupNorm(channels, channels)
    # momentum=None: after a few steps an average with momentum is still mostly what it started from.
    return nn.BatchNorm2d(channels, momentum=None) if name == "batch" else nn.Identity()


def make_body(
    name: NetworkName, shape: tuple[int, int, int], width: int | None, norm: NormName, dropout: float = 0.0
) -> nn.Module:
    """All of the network but its last layer."""
    if name == "lenet":
        return lenet(shape, dropout)
    if name == "alexnet":
        return alexnet(shape, ALEXNET_WIDTH if width is None else width, dropout)
    if name == "convnet":
        return convnet(shape, CONVNET_WIDTH if width is None else width, norm)
    if name == "mlp":
        units = MLP_WIDTH if width is None else width
        return nn.Sequential(nn.Flatten(), *hidden(math.prod(shape), units, dropout))
    return nn.Flatten()


def make_factory(
    name: NetworkName,
    data: ImageData,
    *,
    head: HeadName = "linear",
    width: int | None = None,
    norm: NormName = "instance",
    dropout: float = 0.0,
    weights: WeightsName = "xavier-normal",
) -> Factory:
    """A function that makes the network with new random weights, drawn from the global generator.

    By default weights are Xavier's (Glorot, Bengio 2010) and biases zero, as in the published system.
    Networks without hidden dense layers have no dropout.

    Raises:
        InvalidArgumentError: images too small for the network, or too few features for an ETF.
    """
    body = make_body(name, data.shape, width, norm, dropout)
    with torch.no_grad():
        features = body.eval()(torch.zeros(1, *data.shape)).shape[1]
    require(
        head in ("linear", "standard") or features >= data.num_classes - 1,
        f"--head {head} needs at least K - 1 = {data.num_classes - 1} features, the network has {features}: "
        "take a larger --width",
    )

    def factory() -> nn.Module:
        body = make_body(name, data.shape, width, norm, dropout)
        seed = int(torch.randint(2**31, ()))
        network = Network(body, make_head(head, features, data.num_classes, seed))
        initialize(network, weights)
        return network.to(data.device)

    return factory


def seeded(factory: Factory, seed: int) -> nn.Module:
    """A network from a stream of its own; the global generator stays where it was."""
    with own_stream(seed):
        return factory()


@contextmanager
def own_stream(seed: int) -> Iterator[None]:
    """Let layers and losses draw, inside the block, from a stream of this seed instead of the global one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
