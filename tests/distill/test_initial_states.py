"""Sources of initial states, many of them at once, clipping, and the mean over ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from etflayers.distill import (
    SGD,
    Adam,
    FixedInitialization,
    InitialState,
    InnerSolution,
    KeptGraph,
    OnlinePool,
    RandomInitialization,
    RunningNormClip,
    StepAdjoint,
    StoredPool,
    UnrolledInnerLoop,
    average_gradients,
    cross_entropy,
    stack_states,
    unrolled_inner_loop,
)
from etflayers.distill.adjoints import InnerAdjoint
from etflayers.distill.optimizers import InnerOptimizer
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.nn import NearestETFHead
from etflayers.testing import relative_error
from tests.ranks import run_ranks

DTYPE = torch.float64
N, S, B, K, STEPS = 3, 2, 6, 3, 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, K)).to(DTYPE)


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(12, K)
    ).to(DTYPE)


class WithNearestHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh()).to(DTYPE)
        self.head = NearestETFHead(6, K, scale=3.0, dtype=DTYPE)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.features(images), targets)
        return logits


def loss_with_targets(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images, torch.arange(len(images)) % K), labels)


def same(one: InitialState, two: InitialState) -> bool:
    return all(torch.equal(one.params[name], two.params[name]) for name in one.params)


def test_the_fixed_source_keeps_the_state_that_the_model_had() -> None:
    model = normalized()
    source, before = FixedInitialization(model), InitialState.of(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert same(source(seeded(0)), before)
    assert source().buffers["1.running_var"].eq(1).all()


def test_the_random_source_is_the_factory_under_a_seed() -> None:
    before = torch.get_rng_state()
    source = RandomInitialization(plain)
    one, two, again = (source(seeded(seed)) for seed in (1, 2, 1))
    assert same(one, again)
    assert not same(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    weights = torch.stack([source(seeded(seed)).params["1.weight"] for seed in range(50)])
    assert weights.std() == pytest.approx((1 / 16 / 3) ** 0.5, rel=0.05)  # uniform on +-1/sqrt(fan in)


def test_the_stored_pool_gives_each_of_its_states() -> None:
    states = [InitialState.of(plain()) for _ in range(4)]
    pool, generator = StoredPool(states), seeded(0)
    found = [pool(generator) for _ in range(60)]
    counts = [sum(same(state, each) for each in found) for state in states]
    assert sum(counts) == 60
    assert min(counts) > 0


def test_the_online_pool_replaces_networks_at_their_age_one_after_the_other() -> None:
    size, max_age, steps = 5, 50, 10
    pool, generator = OnlinePool(plain, size=size, max_age=max_age, generator=seeded(0)), seeded(1)
    assert pool.ages == [0, 10, 20, 30, 40]
    for _ in range(300):
        state = pool(generator)
        index = pool.drawn
        assert index is not None
        assert pool.ages[index] < max_age
        pool.put_back(InitialState({n: v + 1 for n, v in state.params.items()}, state.buffers), steps=steps)
        # Age in steps and the trace of those steps agree, so a network that is replaced starts anew: its
        # weights, within 1/4 at the start, have grown by one each time.
        grown = pool.states[index].params["1.weight"].mean().round()
        assert grown <= pool.ages[index] / steps
        assert pool.ages[index] <= max_age
    assert len(set(pool.ages)) > 1


def test_the_online_pool_goes_on_from_its_state_dict() -> None:
    def draw(pool: OnlinePool, generator: torch.Generator, times: int) -> list[Tensor]:
        drawn = []
        for _ in range(times):
            state = pool(generator)
            drawn.append(state.params["1.weight"])
            pool.put_back(InitialState({n: 0.9 * v for n, v in state.params.items()}, state.buffers), steps=7)
        return drawn

    pool, generator = OnlinePool(plain, size=3, max_age=20, generator=seeded(0)), seeded(1)
    draw(pool, generator, 10)
    saved, random = pool.state_dict(), generator.get_state()
    expected = draw(pool, generator, 20)
    other = OnlinePool(plain, size=3, max_age=20)
    other.load_state_dict(saved)
    generator.set_state(random)
    assert all(torch.equal(a, b) for a, b in zip(draw(other, generator, 20), expected, strict=True))


def test_pools_refuse_what_is_not_one_network() -> None:
    with pytest.raises(InvalidArgumentError, match="state 1 are not those of the first"):
        StoredPool([InitialState.of(plain()), InitialState.of(normalized())])
    with pytest.raises(InvalidArgumentError, match="states is empty"):
        stack_states([])
    pool = OnlinePool(plain, size=2, max_age=5)
    with pytest.raises(InvalidArgumentError, match="no network was drawn"):
        pool.put_back(InitialState.of(plain()), steps=1)
    with pytest.raises(InvalidArgumentError, match="size must be an integer >= 1, got 0"):
        OnlinePool(plain, size=0, max_age=5)
    with pytest.raises(InvalidArgumentError, match="same size"):
        OnlinePool(plain, size=3, max_age=5).load_state_dict(pool.state_dict())


class Data:
    def __init__(self) -> None:
        generator = seeded(5)
        self.images = torch.randn(S, B, 1, 4, 4, dtype=DTYPE, generator=generator).requires_grad_()
        labels = torch.randn(S, B, K, dtype=DTYPE, generator=generator)
        self.labels = labels.softmax(-1).requires_grad_()
        self.rates = torch.tensor([0.1, 0.2], dtype=DTYPE, requires_grad=True)
        self.real = torch.randn(4, 1, 4, 4, dtype=DTYPE, generator=generator)
        self.variables = [self.images, self.labels, self.rates]


# With many states the class counts of the nearest head have no forward mode, and it says so.
@pytest.mark.filterwarnings("ignore:forward over reverse is not possible:RuntimeWarning")
@pytest.mark.parametrize("rule", [SGD(momentum=0.9, weight_decay=0.01), Adam(eps=1e-3)], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    "adjoint",
    [KeptGraph(), StepAdjoint(), StepAdjoint(mode="forward"), StepAdjoint(checkpoint_every="sqrt")],
    ids=["kept", "reverse", "forward", "sqrt"],
)
@pytest.mark.parametrize("factory", [plain, normalized, WithNearestHead])
def test_many_initial_states_at_once_are_each_by_itself(
    factory: Callable[[], nn.Module], adjoint: InnerAdjoint, rule: InnerOptimizer
) -> None:
    data, model, generator = Data(), factory(), seeded(0)
    head = isinstance(model, WithNearestHead)
    states = [RandomInitialization(factory)(generator) for _ in range(N)]
    weights = [1.0, 2.0, 3.0]  # so that a mix-up of the states would show

    def outer(state: dict[str, Tensor]) -> Tensor:
        # Evaluation by the buffers of the state; the steps are re-derived in training mode all the same.
        return functional_call(model.eval(), state, (data.real,)).square().mean()

    def train(start: InitialState, n: int | None) -> InnerSolution:
        return unrolled_inner_loop(
            model.train(),
            start.params,
            data.images,
            data.labels,
            lr=data.rates,
            epochs=STEPS // S,
            loss=loss_with_targets if head else cross_entropy,
            optimizer=rule,
            adjoint=adjoint,
            buffers=start.buffers,
            generator=seeded(3),
            initializations=n,
        )

    single = [train(state, None) for state in states]
    losses = torch.stack([w * outer(one.state) for w, one in zip(weights, single, strict=True)])
    expected = torch.autograd.grad(losses.sum(), data.variables)
    expected_losses = torch.stack([one.losses for one in single]).mean(0)

    together = train(stack_states(states), N)
    each = vmap(outer)(together.state)
    found = torch.autograd.grad((each * torch.tensor(weights, dtype=DTYPE)).sum(), data.variables)
    assert relative_error(each, losses / torch.tensor(weights)) < 1e-12
    assert relative_error(together.losses, expected_losses) < 1e-12
    for mine, theirs in zip(found, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-10
    for name, value in together.buffers.items():
        for index in range(N):
            torch.testing.assert_close(value[index], single[index].buffers[name], rtol=1e-10, atol=1e-12)


def test_random_numbers_differ_between_initial_states_and_are_replayed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, K)).to(DTYPE)
    data, start = Data(), stack_states([InitialState.of(model)] * 2)
    found = []
    for adjoint in (KeptGraph(), StepAdjoint()):
        trained = unrolled_inner_loop(
            model, start.params, data.images, data.labels, lr=0.1, adjoint=adjoint, generator=seeded(1),
            initializations=2,
        )  # fmt: skip
        weight = trained.params["2.weight"]
        assert not torch.equal(weight[0], weight[1])
        found.append(torch.autograd.grad(weight.square().sum(), data.images)[0])
    assert relative_error(found[1], found[0]) < 1e-12


def test_stacks_that_do_not_fit_are_refused() -> None:
    model, data = plain(), Data()
    state = InitialState.of(model)
    with pytest.raises(InvalidArgumentError, match=r"must have shape \(2, 5, 16\), got \(5, 16\)"):
        unrolled_inner_loop(model, state.params, data.images, data.labels, lr=0.1, initializations=2)
    with pytest.raises(InvalidArgumentError, match="initializations must be None or an integer >= 1, got 0"):
        unrolled_inner_loop(model, state.params, data.images, data.labels, lr=0.1, initializations=0)


def test_clipping_is_that_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    clip = RunningNormClip(factor=1.5, momentum=0.25)
    values = [
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(2, 2, dtype=DTYPE)),
        nn.Parameter(torch.zeros(1)),
    ]
    running = None
    for step in range(30):
        gradients = [
            (10 if step % 7 == 0 else 1) * torch.randn(v.shape, dtype=v.dtype, generator=generator)
            for v in values[:2]
        ]
        for value, gradient in zip(values, gradients, strict=False):
            value.grad = gradient.clone()
        norm = torch.cat([g.flatten().double() for g in gradients]).norm().item()
        running = norm if running is None else running
        scale = min(1.0, 1.5 * running / norm)
        assert clip(values).item() == pytest.approx(norm, rel=1e-6)
        for value, gradient in zip(values, gradients, strict=False):
            torch.testing.assert_close(value.grad, scale * gradient)
        running += 0.25 * (scale * norm - running)
        assert clip.running_norm.item() == pytest.approx(running, rel=1e-6)
    assert values[2].grad is None
    assert clip.updates.item() == 30


def test_clipping_goes_on_from_its_state_dict_and_refuses_nan() -> None:
    clip, other = RunningNormClip(), RunningNormClip()
    value = nn.Parameter(torch.zeros(2))
    value.grad = torch.tensor([3.0, 4.0])
    clip([value])
    other.load_state_dict(clip.state_dict())
    value.grad = torch.tensor([30.0, 40.0])
    other([value])
    assert value.grad.tolist() == pytest.approx([6.0, 8.0])
    value.grad = torch.tensor([1.0, torch.nan])
    before = other.running_norm.clone()
    with pytest.raises(NonFiniteError, match="norm of the hypergradient"):
        other([value])
    assert torch.equal(other.running_norm, before)
    with pytest.raises(InvalidArgumentError, match="none of the parameters has a gradient"):
        other([nn.Parameter(torch.zeros(2))])


def hypergradient_of(states: list[InitialState]) -> list[Tensor]:
    data, model = Data(), plain()
    for state in states:
        trained = unrolled_inner_loop(model, state.params, data.images, data.labels, lr=data.rates)
        loss = functional_call(model, trained.params, (data.real,)).square().mean() / len(states)
        loss.backward()
    data.labels.grad = None  # a parameter that no rank has used
    average_gradients(data.variables)
    return [value.grad for value in data.variables]


def drawn(rank: int) -> list[InitialState]:
    return [RandomInitialization(plain)(seeded(rank))]


def of_one_rank(rank: int, _: Path) -> list[Tensor]:
    return hypergradient_of(drawn(rank))


@pytest.mark.slow
def test_two_ranks_with_a_state_each_are_one_with_two(tmp_path: Path) -> None:
    expected = hypergradient_of([*drawn(0), *drawn(1)])
    found = run_ranks(of_one_rank, 2, tmp_path)
    for one, two, exact in zip(*found, [*expected[:1], torch.zeros(S, B, K), *expected[2:]], strict=True):
        assert (one == two).all()
        torch.testing.assert_close(one, exact.to(DTYPE), rtol=1e-12, atol=1e-15)


def half_frozen() -> nn.Module:
    """Random features that stay as they are, with a classifier to train."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[1].requires_grad_(False)
    return model


def test_frozen_parameters_belong_to_the_state_and_are_not_trained() -> None:
    model, images = half_frozen(), torch.randn(2, 6, 4, requires_grad=True)
    labels = torch.arange(12).view(2, 6) % 3
    source = RandomInitialization(half_frozen)
    states = [source(torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert set(states[0].params) == {"3.weight", "3.bias"}
    assert set(states[0].buffers) == {"1.weight", "1.bias"}

    def train(start: InitialState, **options: object) -> InnerSolution:
        loop = UnrolledInnerLoop(model, epochs=2)
        return loop(images, labels, lr=0.1, params=start.params, buffers=start.buffers, **options)

    alone = [train(state) for state in states]
    together = train(stack_states(states), initializations=2)
    for index, (state, solution) in enumerate(zip(states, alone, strict=True)):
        for name, value in state.buffers.items():  # each network has features of its own
            assert torch.equal(solution.buffers[name], value)
            assert torch.equal(together.buffers[name][index], value)
        for name, value in solution.params.items():
            torch.testing.assert_close(together.params[name][index], value)
        copy = half_frozen()
        copy.load_state_dict(solution.state)
        before = half_frozen()
        before.load_state_dict({**state.params, **state.buffers})
        rebuilt = UnrolledInnerLoop(before, epochs=2)(images, labels, lr=0.1)
        torch.testing.assert_close(rebuilt.params["3.weight"], copy[3].weight)
    assert not torch.equal(alone[0].params["3.weight"], alone[1].params["3.weight"])
    pool = OnlinePool(half_frozen, size=2, max_age=10)
    drawn = train(pool())
    pool.put_back(InitialState(drawn.params, drawn.buffers), steps=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["states"].pop(), "1 networks, this pool 2"),
        (lambda state: state["states"][0][0].pop("weight"), "names or shapes of the tensors in state 1"),
        (lambda state: state["ages"].pop(), "an age >= 0 for each of its 2 networks"),
        (lambda state: state["ages"].__setitem__(0, -5), "an age >= 0"),
        (lambda state: state["ages"].__setitem__(0, float("nan")), "an age >= 0"),
    ],
)
def test_a_pool_refuses_the_state_of_another(
    change: Callable[[dict[str, object]], object], message: str
) -> None:
    pool = OnlinePool(lambda: nn.Linear(2, 3), size=2, max_age=10)
    state = OnlinePool(lambda: nn.Linear(2, 3), size=2, max_age=10).state_dict()
    change(state)
    before = pool.states
    with pytest.raises(InvalidArgumentError, match=message):
        pool.load_state_dict(state)
    assert pool.states is before
    assert pool.ages == [0, 5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomInitialization(nn.Linear(2, 3)), "factory must be a function that makes a network"),
        (lambda: FixedInitialization(lambda: nn.Linear(2, 3)), r"model must be a torch\.nn\.Module"),
    ],
)
def test_a_network_is_no_factory_and_a_factory_no_network(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make()
