"""Where the weights of a network start, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn

from etflayers import UnitRowHead

WeightsName = Literal[
    "xavier-normal",
    "xavier-uniform",
    "kaiming-normal",
    "kaiming-uniform",
    "orthogonal",
    "normal",
    "uniform",
    "default",
]
DEVIATION = 0.05  # of normal and uniform weights, whatever the size of a layer
_BOUND = math.sqrt(3) * DEVIATION  # a uniform number within it has that deviation
_RULES: dict[str, Callable[..., object]] = {
    "xavier-normal": nn.init.xavier_normal_,
    "xavier-uniform": nn.init.xavier_uniform_,
    "kaiming-normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "kaiming-uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
    "normal": partial(nn.init.normal_, std=DEVIATION),
    "uniform": partial(nn.init.uniform_, a=-_BOUND, b=_BOUND),
}


def initialize(network: nn.Module, weights: WeightsName) -> None:
    """Draw the weights of all layers anew, from the global generator, and make biases zero.

    xavier: of Glorot, Bengio (2010); kaiming: of He, Zhang, Ren, Sun (2015), arXiv 1502.01852, for ReLU;
    orthogonal: of Saxe, McClelland, Ganguli (2013), arXiv 1312.6120; normal, uniform: of one deviation in
    all layers; default: nothing is changed, weights and biases are those that PyTorch's layers start with.
    """
    if weights == "default":
        return
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, UnitRowHead)):
            for parameter in module.parameters():
                rule = nn.init.zeros_ if parameter.ndim == 1 else _RULES[weights]
                rule(parameter)
