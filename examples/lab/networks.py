"""Networks small enough to train many thousand times: a body that makes features, and a head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from etflayers import NearestETFHead, UnitRowHead
from etflayers.checks import require
from lab.data import ImageData
from lab.heads import HeadName, make_head

NetworkName = Literal["lenet", "convnet", "mlp", "linear"]
NormName = Literal["none", "instance", "batch"]
Factory = Callable[[], nn.Module]
CONVNET_WIDTH, MLP_WIDTH = 32, 128


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


def lenet(shape: tuple[int, int, int]) -> nn.Sequential:
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
    return nn.Sequential(*layers, nn.Linear(flat, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())


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


def make_body(name: NetworkName, shape: tuple[int, int, int], width: int | None, norm: NormName) -> nn.Module:
    """All of the network but its last layer."""
    if name == "lenet":
        return lenet(shape)
    if name == "convnet":
        return convnet(shape, CONVNET_WIDTH if width is None else width, norm)
    if name == "mlp":
        hidden = MLP_WIDTH if width is None else width
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.ReLU())
    return nn.Flatten()


def make_factory(
    name: NetworkName,
    data: ImageData,
    *,
    head: HeadName = "linear",
    width: int | None = None,
    norm: NormName = "instance",
) -> Factory:
    """A function that makes the network with new random weights, drawn from the global generator.

    Weights are Xavier's (Glorot, Bengio 2010), biases zero, as in the published system.

    Raises:
        InvalidArgumentError: images too small for the network, or too few features for an ETF.
    """
    body = make_body(name, data.shape, width, norm)
    with torch.no_grad():
        features = body.eval()(torch.zeros(1, *data.shape)).shape[1]
    require(
        head in ("linear", "standard") or features >= data.num_classes - 1,
        f"--head {head} needs at least K - 1 = {data.num_classes - 1} features, the network has {features}: "
        "take a larger --width",
    )

    def factory() -> nn.Module:
        body = make_body(name, data.shape, width, norm)
        seed = int(torch.randint(2**31, ()))
        network = Network(body, make_head(head, features, data.num_classes, seed))
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, UnitRowHead)):
                for parameter in module.parameters():
                    init = nn.init.zeros_ if parameter.ndim == 1 else nn.init.xavier_normal_
                    init(parameter)
        return network.to(data.device)

    return factory


def seeded(factory: Factory, seed: int) -> nn.Module:
    """A network from a stream of its own; the global generator stays where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory()
