"""The adjoint that keeps the graph where it fits: what it chooses, and that its numbers are those of both."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etflayers.distill import (
    SGD,
    Adam,
    AutoAdjoint,
    KeptGraph,
    StepAdjoint,
    UnrolledInnerLoop,
    memory_forecast,
    unrolled_inner_loop,
)
from etflayers.distill.adjoints import InnerAdjoint
from etflayers.distill.peak_memory import PeakMemory
from etflayers.errors import InvalidArgumentError

STEPS = 9


def loop_of(adjoint: InnerAdjoint | str, **options: Any) -> UnrolledInnerLoop:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Dropout(0.3))
    model = nn.Sequential(*layers, nn.Linear(144, 3)).double()
    return UnrolledInnerLoop(model, adjoint=adjoint, **{"epochs": STEPS, **options})  # type: ignore[arg-type]


def data(count: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return images.requires_grad_(), (torch.arange(count) % 3)[None]


def gradients(loop: UnrolledInnerLoop) -> list[Tensor]:
    images, labels = data()
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    trained = loop(images, labels, lr=rate, generator=torch.Generator().manual_seed(2))
    loss = torch.stack([value.square().sum() for value in trained.params.values()]).sum()
    return [*torch.autograd.grad(loss, [images, rate, *loop.parameters()]), *trained.buffers.values()]


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), Adam()], ids=["momentum", "adam"])
def test_both_choices_give_the_gradient_of_either(optimizer: Any) -> None:
    """Dropout is replayed, and batch norm ends with the same averages, although steps were tried before."""
    expected = gradients(loop_of(KeptGraph(), optimizer=optimizer))
    for limit, chosen in ((2**40, KeptGraph()), (1, StepAdjoint())):
        adjoint = AutoAdjoint(memory=limit)
        found = gradients(loop_of(adjoint, optimizer=optimizer))
        assert adjoint.choices == [chosen]
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_the_limit_is_that_of_the_kept_graph() -> None:
    images, labels = data()
    kept = loop_of(KeptGraph())
    with PeakMemory() as memory:
        trained = kept(images, labels, lr=0.1)
        torch.stack([value.square().sum() for value in trained.params.values()]).sum().backward()
    for factor, chosen in ((1.05, KeptGraph()), (0.95, StepAdjoint())):
        adjoint = AutoAdjoint(memory=int(factor * memory.peak))
        loop = loop_of(adjoint)
        loop(images, labels, lr=0.1)
        assert adjoint.choices == [chosen]
        alone = UnrolledInnerLoop(loop.model, adjoint=chosen, epochs=STEPS)
        assert memory_forecast(loop, images, labels, lr=0.1) == memory_forecast(alone, images, labels, lr=0.1)


def test_it_is_asked_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("etflayers.distill.auto._peak", lambda *arguments: asked.append(arguments[-1]) or 100)
    adjoint = AutoAdjoint(memory=100)
    loop = loop_of(adjoint)
    for count in (20, 20, 10):
        images, labels = data(count)
        loop(images, labels, lr=0.1)
    loop(images, labels, lr=0.1, window=range(3, 7))
    assert asked == [2, 3] * 3
    assert adjoint.choices == [KeptGraph()] * 3


def test_nothing_is_tried_where_no_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etflayers.distill.auto._peak", lambda *_: pytest.fail("tried"))
    images, labels = data()
    with torch.no_grad():
        loop_of(AutoAdjoint())(images, labels, lr=0.1)


def test_trying_draws_no_random_numbers_and_leaves_no_gradient() -> None:
    images, labels = data()
    loop = loop_of(AutoAdjoint())
    state = torch.get_rng_state()
    loop(images, labels, lr=0.1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert images.grad is None


def test_a_word_is_enough() -> None:
    assert loop_of("auto").adjoint == AutoAdjoint()
    assert pickle.loads(pickle.dumps(AutoAdjoint(memory=7))) == AutoAdjoint(memory=7)
    model = nn.Linear(2, 2)
    images, labels = torch.randn(1, 4, 2, requires_grad=True), torch.tensor([[0, 0, 1, 1]])
    trained = unrolled_inner_loop(
        model, dict(model.named_parameters()), images, labels, lr=0.1, adjoint="auto"
    )
    trained.params["weight"].sum().backward()
    assert images.grad is not None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AutoAdjoint(memory=0), "memory must be"),
        (lambda: AutoAdjoint(rederived=KeptGraph()), "rederived must be a StepAdjoint"),
        (lambda: loop_of("fast"), "adjoint must be 'auto'"),
    ],
)
def test_what_it_refuses(make: Any, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        make()
