"""Where the inner loop starts: sources of initial parameters and buffers.

A distilled set that is learned from one start serves that start alone; one that is learned from many serves
starts it has not seen. A source is a function of a generator, so that a run that is resumed draws what it
would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from etflayers.checks import require
from etflayers.distill.layout import trainable_parameters
from etflayers.distill.objective import Buffers
from etflayers.errors import InvalidArgumentError

__all__ = [
    "FixedInitialization",
    "InitialState",
    "Initialization",
    "OnlinePool",
    "RandomInitialization",
    "StoredPool",
    "stack_states",
]


class InitialState(NamedTuple):
    """Parameters and buffers by name, no part of a graph.

    Attributes:
        params: what is trained.
        buffers: what is not: buffers, and parameters with ``requires_grad=False``.

    >>> state = InitialState.of(nn.Linear(2, 3))
    >>> {name: tuple(value.shape) for name, value in state.params.items()}
    {'weight': (3, 2), 'bias': (3,)}
    """

    params: dict[str, Tensor]
    buffers: Buffers

    @classmethod
    def of(cls, model: nn.Module) -> InitialState:
        """A copy of the state that a model has now."""
        require(isinstance(model, nn.Module), f"model must be a torch.nn.Module, got {type(model).__name__}")
        params = trainable_parameters(model)
        constants = {name: value for name, value in model.named_parameters() if name not in params}
        return cls(_copied(params), _copied({**dict(model.named_buffers()), **constants}))


class Initialization(Protocol):
    """A source of initial states, random by the generator, or the global one for ``None``."""

    def __call__(self, generator: torch.Generator | None = None) -> InitialState:
        """An initial state."""
        ...


class FixedInitialization:
    """Always the state that the model has when this is made: a fixed start, or a pretrained network.

    Args:
        model: any module.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959.

    >>> model = nn.Linear(2, 3)
    >>> torch.equal(FixedInitialization(model)().params["weight"], model.weight)
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self.state = InitialState.of(model)

    def __call__(self, generator: torch.Generator | None = None) -> InitialState:
        """The state."""
        return self.state


class RandomInitialization:
    """The state of a new network each time, made by ``factory`` under a seed drawn from the generator.

    The global generators are left as they were.

    Args:
        factory: makes the network as its user would, ``lambda: Network(...)``.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959.

    >>> source = RandomInitialization(lambda: nn.Linear(2, 3))
    >>> one, two = (source(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    >>> torch.equal(one.params["weight"], two.params["weight"])
    False
    """

    def __init__(self, factory: Callable[[], nn.Module]) -> None:
        require(
            callable(factory) and not isinstance(factory, nn.Module),
            f"factory must be a function that makes a network, such as lambda: Network(...), got {factory!r}",
        )
        self.factory = factory

    def __call__(self, generator: torch.Generator | None = None) -> InitialState:
        """The state of a new network."""
        with _seeded(_draw(2**62, generator)):
            return InitialState.of(self.factory())


class StoredPool:
    """One of the given states each time, uniformly: networks that were trained, or made, before.

    Args:
        states: at least one, all of the same network.

    Raises:
        InvalidArgumentError: no states, or states of different networks.

    Reference:
        Cazenavette, Wang, Torralba, Efros, Zhu (2022), arXiv 2203.11932.

    >>> pool = StoredPool([InitialState.of(nn.Linear(2, 3)) for _ in range(5)])
    >>> pool(torch.Generator().manual_seed(0)).params["bias"].shape
    torch.Size([3])
    """

    def __init__(self, states: Sequence[InitialState]) -> None:
        _require_alike(states)
        self.states = list(states)

    def __call__(self, generator: torch.Generator | None = None) -> InitialState:
        """One of the states."""
        return self.states[_draw(len(self.states), generator)]


class OnlinePool:
    """Networks of all ages that are trained on the distilled set while it is learned.

    Each is drawn, trained on the set as it is now, and put back with what came out. At ``max_age`` steps it
    is replaced by a new one. The ages start staggered, so that the networks are not all replaced at once and
    at any time the pool holds young and old ones.

    Args:
        factory: makes a network, as for :class:`RandomInitialization`.
        size: how many networks.
        max_age: steps of training after which a network is replaced.
        generator: of the seeds of the first networks.

    Raises:
        InvalidArgumentError: a size or an age below 1.

    Reference:
        Zhou, Nezhadarya, Ba (2022), arXiv 2206.00719.

    >>> pool = OnlinePool(lambda: nn.Linear(2, 3), size=4, max_age=100)
    >>> pool.ages
    [0, 25, 50, 75]
    >>> start = pool()
    >>> trained = {name: value - 0.1 for name, value in start.params.items()}
    >>> pool.put_back(InitialState(trained, start.buffers), steps=10)
    >>> sum(pool.ages)
    160
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        *,
        size: int,
        max_age: int,
        generator: torch.Generator | None = None,
    ) -> None:
        require(isinstance(size, int) and size >= 1, f"size must be an integer >= 1, got {size!r}")
        require(
            isinstance(max_age, int) and max_age >= 1, f"max_age must be an integer >= 1, got {max_age!r}"
        )
        self.new = RandomInitialization(factory)
        self.max_age = max_age
        self.states = [self.new(generator) for _ in range(size)]
        self.ages = [index * max_age // size for index in range(size)]
        self.drawn: int | None = None

    def __call__(self, generator: torch.Generator | None = None) -> InitialState:
        """The state of one of the networks; one that has come to its age is replaced first."""
        self.drawn = _draw(len(self.states), generator)
        if self.ages[self.drawn] >= self.max_age:
            self.states[self.drawn], self.ages[self.drawn] = self.new(generator), 0
        return self.states[self.drawn]

    def put_back(self, state: InitialState, *, steps: int) -> None:
        """Keep the network that was drawn last as it is after ``steps`` more steps of training.

        Args:
            state: its parameters and buffers, copied.
            steps: how many steps older it is, at least 0.

        Raises:
            InvalidArgumentError: none was drawn, or it is the state of another network.
        """
        if self.drawn is None:
            raise InvalidArgumentError("no network was drawn from the pool since the last was put back")
        require(steps >= 0, f"steps must be at least 0, got {steps}")
        _require_alike([self.states[self.drawn], state])
        self.states[self.drawn] = InitialState(
            *({n: v.detach().clone() for n, v in d.items()} for d in state)
        )
        self.ages[self.drawn] += steps
        self.drawn = None

    def state_dict(self) -> dict[str, Any]:
        """All networks and their ages, as ``torch.save`` takes them."""
        return {"states": [tuple(state) for state in self.states], "ages": list(self.ages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned.

        Raises:
            InvalidArgumentError: another number of networks, networks of another kind, or ages that are none.
        """
        require(
            len(state["states"]) == len(self.states),
            f"state_dict has {len(state['states'])} networks, this pool {len(self.states)}: make it with the "
            "same size",
        )
        states, ages = [InitialState(*each) for each in state["states"]], list(state["ages"])
        _require_alike([self.states[0], *states])
        require(
            len(ages) == len(states) and all(isinstance(age, int) and age >= 0 for age in ages),
            f"state_dict must have an age >= 0 for each of its {len(states)} networks, got {ages}",
        )
        self.states, self.ages, self.drawn = states, ages, None


def stack_states(states: Sequence[InitialState]) -> InitialState:
    """n states as one, each tensor ``(n, ...)``: what ``initializations=n`` of the inner loop takes.

    Args:
        states: n >= 1 of them, all of the same network.

    Returns:
        The stacked state.

    Raises:
        InvalidArgumentError: no states, or states of different networks.

    >>> stack_states([InitialState.of(nn.Linear(2, 3)) for _ in range(5)]).params["weight"].shape
    torch.Size([5, 3, 2])
    """
    _require_alike(states)
    first = states[0]
    return InitialState(
        {name: torch.stack([state.params[name] for state in states]) for name in first.params},
        {name: torch.stack([state.buffers[name] for state in states]) for name in first.buffers},
    )


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def _require_alike(states: Sequence[InitialState]) -> None:
    require(len(states) > 0, "states is empty: give at least one")

    def shapes(state: InitialState) -> list[dict[str, torch.Size]]:
        return [{name: value.shape for name, value in part.items()} for part in state]

    for index, state in enumerate(states):
        require(
            shapes(state) == shapes(states[0]),
            f"the names or shapes of the tensors in state {index} are not those of the first: states of one "
            "pool belong to one network",
        )


def _draw(limit: int, generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(limit, (), generator=generator, device=device))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators, of the CPU and of the accelerator in use, start at ``seed`` and come back."""
    # A build for an accelerator names it as the current one on a machine that has none, too.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        devices, kind = [], "cuda"
    else:
        devices, kind = [torch.get_device_module(accelerator).current_device()], accelerator.type
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        yield
