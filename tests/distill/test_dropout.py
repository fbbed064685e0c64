"""Dropout in the inner loop: one mask for each step, the same whenever and however the step is re-derived."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from etflayers import distill
from etflayers.distill import InitialState, stack_states, unrolled_inner_loop

ADJOINTS: dict[str, Any] = {
    "steps": distill.StepAdjoint(),
    "forward": distill.StepAdjoint(mode="forward"),
    "root": distill.StepAdjoint(checkpoint_every="sqrt"),
    "kept": distill.KeptGraph(),
}


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)).double()


IMAGES = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = (torch.arange(10) % 3).view(2, 5)
REAL = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outer(images: Tensor, copies: int | None, adjoint: str = "kept") -> Tensor:
    """Of networks trained in four steps with dropout and judged without it."""
    model, states = network(0), [InitialState.of(network(seed)) for seed in range(copies or 1)]
    start = states[0] if copies is None else stack_states(states)
    model.train()
    generator = torch.Generator().manual_seed(5)
    options: dict[str, Any] = {"adjoint": ADJOINTS[adjoint], "initializations": copies}
    options |= {"optimizer": distill.SGD(momentum=0.9), "generator": generator, "epochs": 2}
    trained = unrolled_inner_loop(model, start.params, images, LABELS, lr=0.3, **options)
    model.eval()

    def judged(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (REAL,)).square().mean()

    return judged(trained.params) if copies is None else vmap(judged)(trained.params).sum()


def hypergradient(copies: int | None, adjoint: str) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(outer(images, copies, adjoint), images)
    return gradient


@pytest.mark.parametrize("copies", [None, 1, 3])
@pytest.mark.parametrize("adjoint", ["steps", "forward", "root"])
def test_every_adjoint_sees_the_same_masks(adjoint: str, copies: int | None) -> None:
    """One network, or several side by side by vmap."""
    found, kept = hypergradient(copies, adjoint), hypergradient(copies, "kept")
    torch.testing.assert_close(found, kept, rtol=1e-10, atol=1e-14)


def test_one_network_under_vmap_is_that_network() -> None:
    torch.testing.assert_close(hypergradient(1, "steps"), hypergradient(None, "steps"))


@pytest.mark.parametrize("copies", [None, 3])
def test_gradient_is_that_of_finite_differences(copies: int | None) -> None:
    """The masks do not depend on the images, so that the loss with one seed is a smooth function of them."""
    generator = torch.Generator().manual_seed(2)
    gradient = hypergradient(copies, "steps")
    for _ in range(3):
        way = torch.randn(IMAGES.shape, dtype=torch.float64, generator=generator)
        step = 1e-5
        with torch.no_grad():
            ends = [outer(IMAGES + sign * step * way, copies) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-6, atol=1e-9)


def test_networks_side_by_side_have_masks_of_their_own() -> None:
    """Three copies of one network part ways, which only dropout can make them do."""
    model, start = network(0), stack_states([InitialState.of(network(0)) for _ in range(3)])
    model.train()
    generator = torch.Generator().manual_seed(0)
    trained = unrolled_inner_loop(
        model, start.params, IMAGES, LABELS, lr=0.3, initializations=3, generator=generator
    )
    one, two, three = trained.params["0.weight"]
    assert not torch.allclose(one, two)
    assert not torch.allclose(two, three)
