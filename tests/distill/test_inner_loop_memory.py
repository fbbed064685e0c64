from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from etflayers.distill import (
    SGD,
    Adam,
    InitialState,
    KeptGraph,
    StepAdjoint,
    UnrolledInnerLoop,
    memory_forecast,
    stack_states,
)
from etflayers.distill.adjoints import InnerAdjoint
from etflayers.distill.optimizers import InnerOptimizer
from etflayers.distill.peak_memory import PeakMemory

ADJOINTS: dict[str, InnerAdjoint] = {
    "kept": KeptGraph(),
    "reverse": StepAdjoint(),
    "sqrt": StepAdjoint(checkpoint_every="sqrt"),
    "every 4": StepAdjoint(checkpoint_every=4),
}


def loop_of(adjoint: InnerAdjoint, steps: int, optimizer: InnerOptimizer | None = None) -> UnrolledInnerLoop:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return UnrolledInnerLoop(model, adjoint=adjoint, epochs=steps, optimizer=optimizer)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 20, 1, 8, 8, requires_grad=True), (torch.arange(20) % 3)[None]


def peak_of(loop: UnrolledInnerLoop) -> int:
    images, labels = data()
    with PeakMemory() as memory:
        solution = loop(images, labels, lr=0.01)
        sum(value.square().sum() for value in solution.params.values()).backward()
    return memory.peak


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("name", ADJOINTS)
def test_a_forecast_is_what_the_run_takes(name: str, steps: int) -> None:
    loop = loop_of(ADJOINTS[name], steps, Adam())
    forecast = memory_forecast(loop, *data(), lr=0.01)
    assert forecast == pytest.approx(peak_of(loop), rel=0.03)


def test_a_forecast_counts_every_initial_state() -> None:
    loop, (images, labels) = loop_of(StepAdjoint(), 9), data()
    start = stack_states([InitialState.of(loop.model)] * 3)
    forecast = memory_forecast(
        loop, images, labels, lr=0.01, params=start.params, buffers=start.buffers, initializations=3
    )
    with PeakMemory() as memory:
        trained = loop(images, labels, lr=0.01, params=start.params, buffers=start.buffers, initializations=3)
        sum(value.square().sum() for value in trained.params.values()).backward()
    assert forecast == pytest.approx(memory.peak, rel=0.03)
    assert forecast > 2 * memory_forecast(loop, images, labels, lr=0.01)


@pytest.mark.parametrize("optimizer", [SGD(), SGD(momentum=0.9), Adam()], ids=["sgd", "momentum", "adam"])
def test_memory_grows_by_the_state_of_a_step(optimizer: InnerOptimizer) -> None:
    growth = peak_of(loop_of(StepAdjoint(), 30, optimizer)) - peak_of(loop_of(StepAdjoint(), 10, optimizer))
    loop = loop_of(StepAdjoint(), 1, optimizer)
    state = (1 + optimizer.num_slots) * sum(p.nbytes for p in loop.model.parameters())
    buffers = sum(b.nbytes for b in loop.model.buffers())
    assert growth == pytest.approx(20 * (state + buffers), rel=0.03)


@pytest.mark.slow
def test_memory_grows_by_the_state_of_a_step_up_to_a_thousand_steps() -> None:
    loop = loop_of(StepAdjoint(), 1000)
    state = sum(p.nbytes for p in loop.model.parameters()) + sum(b.nbytes for b in loop.model.buffers())
    peak = peak_of(loop)
    assert peak - peak_of(loop_of(StepAdjoint(), 10)) == pytest.approx(990 * state, rel=0.03)
    assert memory_forecast(loop, *data(), lr=0.01) == pytest.approx(peak, rel=0.03)


def test_checkpoints_grow_with_the_root_of_the_steps() -> None:
    adjoint = StepAdjoint(checkpoint_every="sqrt")
    loop = loop_of(adjoint, 1)
    state = sum(p.nbytes for p in loop.model.parameters()) + sum(b.nbytes for b in loop.model.buffers())
    growth = peak_of(loop_of(adjoint, 64)) - peak_of(loop_of(adjoint, 16))
    assert growth == pytest.approx(8 * state, rel=0.05)


def test_steps_that_are_re_derived_take_a_fraction_of_the_kept_graph() -> None:
    assert 5 * peak_of(loop_of(StepAdjoint(), 20)) < peak_of(loop_of(KeptGraph(), 20))


def count(make: Callable[[], object]) -> int:
    with PeakMemory() as memory:
        kept = make()
    del kept
    return memory.peak


def test_peak_counts_what_is_alive_at_once() -> None:
    block = 8 * 1000
    assert count(lambda: torch.ones(1000, dtype=torch.float64).view(10, 100)) == block
    assert count(lambda: torch.ones(1000, dtype=torch.float64).add_(1)) == block
    assert count(lambda: [torch.ones(1000, dtype=torch.float64) for _ in range(3)]) == 3 * block


def test_a_forecast_leaves_the_random_numbers_and_the_gradients_alone() -> None:
    loop = loop_of(StepAdjoint(), 5)
    images, labels = data()
    state = torch.get_rng_state()
    memory_forecast(loop, images, labels, lr=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert images.grad is None
    assert all(p.grad is None for p in loop.parameters())
