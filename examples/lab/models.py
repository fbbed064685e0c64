"""Backbones with a head at the end: ResNets of our own, and the models of torchvision and timm."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import replace_classifier
from etflayers.checks import require
from etflayers.errors import InvalidArgumentError, MissingDependencyError
from lab.data import ImageData
from lab.heads import HeadName, ProjectedHead, make_head
from lab.settings import Settings

# (channels of the stages, blocks of the stages, stride of the stem)
RESNETS = {"small": ((16, 32, 64), (1, 1, 1), 2), "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2), 1)}
LABELS = {"small": "small ResNet", "resnet18": "ResNet-18"}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He, Zhang, Ren, Sun 2016, arXiv 1512.03385)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """A ResNet for small images: a 3x3 stem without max pooling, stages that halve the image, a global mean.

    Args:
        channels: colors of the images.
        num_classes: K.
        widths: channels of each stage; the last are the features.
        blocks: blocks in each stage.
        stem_stride: 2 halves the image at once, for speed on a CPU.
    """

    def __init__(
        self, channels: int, num_classes: int, widths: Sequence[int], blocks: Sequence[int], stem_stride: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        width = widths[0]
        for stage, (next_width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                layers.append(BasicBlock(width, next_width, stride=2 if stage > 0 and block == 0 else 1))
                width = next_width
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.layers(images).mean(dim=(2, 3)))


class GreyAsRGB(nn.Module):
    """Three equal colors, for a model that knows no grey images."""

    def forward(self, images: Tensor) -> Tensor:
        return images.expand(-1, 3, -1, -1)


def make_classifier(name: HeadName, settings: Settings, data: ImageData, seed: int) -> nn.Module:
    """A model with the head called ``name``: for one seed all heads get the same backbone.

    Raises:
        InvalidArgumentError: too few features for an ETF, or an unknown model.
        MissingDependencyError: the package of the model is not installed.
    """
    dim = data.num_classes if settings.feature_dim == "K" else settings.feature_dim
    require(
        dim is None or dim >= (1 if name in ("linear", "standard") else data.num_classes - 1),
        f"--feature-dim {dim} is too small for the {name} head and K = {data.num_classes} classes: a simplex "
        f"ETF needs at least K - 1 = {data.num_classes - 1}",
    )
    model = make_model(settings, data, dim, seed)

    def replacement(in_features: int, num_classes: int) -> nn.Module:
        if dim is None or settings.model in RESNETS:
            return make_head(name, in_features, num_classes, seed, settings.head_options)
        return ProjectedHead(in_features, make_head(name, dim, num_classes, seed, settings.head_options))

    return replace_classifier(model, replacement)


def make_model(settings: Settings, data: ImageData, feature_dim: int | None, seed: int) -> nn.Module:
    """A model with random weights and a linear classifier, the same for every call with the same arguments.

    Args:
        settings: give the model, and width and depth of those of this module.
        data: gives the number of colors and of classes.
        feature_dim: width of the last stage of a ResNet of this module; other models keep theirs.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    name, (channels, *_) = settings.model, data.shape
    package, colon, architecture = name.partition(":")
    require(
        not colon or (settings.width == 1 and settings.depth is None),
        f"--model {name} has the width and depth of its name: leave out --width and --depth",
    )
    if not colon and name in RESNETS:
        widths, blocks, stem_stride = RESNETS[name]
        widths = tuple(max(1, round(settings.width * width)) for width in widths)
        if settings.depth is not None:
            blocks = (settings.depth,) * len(widths)
        if feature_dim is not None:
            widths = (*widths[:-1], feature_dim)
        model: nn.Module = ResNet(channels, data.num_classes, widths, blocks, stem_stride)
    elif colon and package in ("torchvision", "timm"):
        module = _import(package, "torchvision.models" if package == "torchvision" else "timm", name)
        known = architecture in module.list_models()
        require(known, f"--model {name}: {module.__name__} has no {architecture!r}")
        if package == "timm":
            model = module.create_model(architecture, num_classes=data.num_classes, in_chans=channels)
        else:
            model = module.get_model(architecture, weights=None, num_classes=data.num_classes)
            model = nn.Sequential(GreyAsRGB(), model) if channels == 1 else model
    else:
        raise InvalidArgumentError(
            f"--model {name} is not known: take {', '.join(RESNETS)}, torchvision:NAME or timm:NAME"
        )
    return model.to(memory_format=torch.channels_last)


def _import(package: str, module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # a build for another PyTorch raises RuntimeError
        raise MissingDependencyError(
            f"--model {name} comes with {package}, which could not be imported ({error}): install the build "
            f"for your PyTorch, or take --model {' or '.join(RESNETS)}"
        ) from error
