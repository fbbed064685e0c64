from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from etflayers.distill import SGD, Adam, AdamW
from etflayers.distill.optimizers import InnerOptimizer
from etflayers.errors import InvalidArgumentError

Peer = Callable[[list[Tensor]], torch.optim.Optimizer]
RULES: dict[str, tuple[InnerOptimizer, Peer]] = {
    "sgd": (SGD(), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        SGD(momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
    "nesterov": (
        SGD(momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    "adam": (
        Adam(beta1=0.8, beta2=0.95, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), weight_decay=0.1),
    ),
    "adamw": (AdamW(weight_decay=0.2), lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2)),
}


@pytest.mark.parametrize("name", RULES)
def test_agrees_with_torch_optim_step_by_step(name: str) -> None:
    rule, make_peer = RULES[name]
    lr = torch.tensor(0.1, dtype=torch.float64)
    theta = torch.randn(7, dtype=torch.float64)
    peer_theta = theta.clone().requires_grad_()
    peer = make_peer([peer_theta])
    slots = tuple(torch.zeros_like(theta) for _ in range(rule.num_slots))
    for step in range(1, 7):
        gradient = torch.randn(7, dtype=torch.float64)
        gradient[0] = 0.0  # a second moment that stays zero
        theta, slots = rule.update(theta, gradient, slots, lr, step)
        peer_theta.grad = gradient.clone()
        peer.step()
        torch.testing.assert_close(theta, peer_theta.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rule", [Adam(eps=1e-2), AdamW(eps=1e-2)], ids=["adam", "adamw"])
def test_adam_has_the_right_derivative_at_zero_second_moment(rule: Adam) -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64)

    def moved(gradient: Tensor) -> Tensor:
        return rule.update(zero, gradient, (zero, zero), lr, 1)[0]

    jacobian = torch.autograd.functional.jacobian(moved, zero)
    h = 1e-9
    difference = (moved(zero + h) - moved(zero - h)) / (2 * h)
    assert torch.isfinite(jacobian).all()
    torch.testing.assert_close(jacobian.diagonal(), difference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name][0].affine])
def test_an_affine_rule_has_the_same_derivative_everywhere(name: str) -> None:
    rule, _ = RULES[name]
    lr, theta = torch.tensor(0.1), torch.randn(5)
    slots = tuple(torch.randn(5) for _ in range(rule.num_slots))

    def pulled(gradient: Tensor) -> Tensor:
        gradient = gradient.requires_grad_()
        moved, after = rule.update(theta, gradient, slots, lr, 2)
        return torch.autograd.grad(sum(after, moved).sum(), gradient)[0]

    torch.testing.assert_close(pulled(torch.randn(5)), pulled(torch.zeros(5)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(momentum=1.0),
        lambda: SGD(momentum=torch.tensor(1.5)),
        lambda: SGD(momentum=torch.tensor([0.9])),
        lambda: SGD(momentum=True),
        lambda: SGD(momentum="0.9"),
        lambda: SGD(nesterov=True),
        lambda: SGD(weight_decay=-1.0),
        lambda: Adam(beta2=1.0),
        lambda: Adam(eps=0.0),
        lambda: AdamW(weight_decay=float("nan")),
    ],
)
def test_values_out_of_range(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"must be|nesterov"):
        make()
