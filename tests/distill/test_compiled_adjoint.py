"""Steps that are traced once and run for every t: the numbers of the kept graph, or a clear error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from etflayers.distill import SGD, Adam, AdamW, KeptGraph, StepAdjoint, compiled, unrolled_inner_loop
from etflayers.distill.adjoints import InnerAdjoint
from etflayers.distill.objective import InnerLoss, cross_entropy
from etflayers.distill.optimizers import InnerOptimizer
from etflayers.distill.peak_memory import PeakMemory
from etflayers.errors import InvalidArgumentError
from etflayers.nn import FixedETFHead, NearestETFHead
from etflayers.testing import relative_error

DTYPE = torch.float64
S, B, K, EPOCHS = 2, 5, 3, 3


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that were traced. They run as they are: what Inductor makes of them, slow tests decide."""
    graphs: list[fx.GraphModule] = []

    def interpret(graph: fx.GraphModule, examples: Sequence[Tensor]) -> fx.GraphModule:
        # Tensors without values may be laid out in another way, and Inductor lays them out anew anyhow.
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        graph.recompile()
        graphs.append(graph)
        return graph

    monkeypatch.setattr(compiled, "_inductor", interpret)
    return graphs


def variable(value: float) -> Tensor:
    return torch.tensor(value, dtype=DTYPE, requires_grad=True)


OPTIMIZERS: dict[str, Callable[[], InnerOptimizer]] = {
    "sgd": lambda: SGD(weight_decay=variable(0.01)),
    "momentum": lambda: SGD(momentum=variable(0.9), weight_decay=variable(0.01)),
    "nesterov": lambda: SGD(momentum=0.8, nesterov=True),
    # A large eps: next to a gradient that is rounding alone, a small one would amplify it.
    "adam": lambda: Adam(beta1=variable(0.9), beta2=variable(0.99), eps=1e-3, weight_decay=0.01),
    "adam of numbers": lambda: Adam(eps=1e-3),
    "adamw": lambda: AdamW(eps=1e-3, weight_decay=variable(0.1)),
}


def convolutional(*extra: nn.Module) -> nn.Sequential:
    layers = [nn.Conv2d(1, 3, 3, bias=False), *extra, nn.Softplus(), nn.Flatten(), nn.Linear(12, K)]
    return nn.Sequential(*layers).to(DTYPE)


class Data:
    """Everything that a hypergradient may be taken for."""

    def __init__(self, optimizer: InnerOptimizer | None = None, count: int = B) -> None:
        self.images = torch.randn(S, count, 1, 4, 4, dtype=DTYPE, requires_grad=True)
        self.labels = torch.randn(S, count, K, dtype=DTYPE).softmax(-1).requires_grad_()
        self.rates = torch.tensor([0.1, 0.2], dtype=DTYPE, requires_grad=True)
        self.optimizer = SGD() if optimizer is None else optimizer

    def hypergradient(self, model: nn.Module, adjoint: InnerAdjoint, **options: object) -> list[Tensor]:
        options.setdefault("params", dict(model.named_parameters()))
        solution = unrolled_inner_loop(
            model,
            images=self.images,
            labels=self.labels,
            lr=self.rates,
            epochs=EPOCHS,
            optimizer=self.optimizer,
            adjoint=adjoint,
            **options,
        )
        loss = sum(value.square().sum() for value in solution.params.values())
        hyper = [value for value in vars(self.optimizer).values() if isinstance(value, Tensor)]
        variables = [self.images, self.labels, self.rates, *hyper, *options["params"].values()]
        wanted = [value for value in variables if value.requires_grad]
        return [*torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(a, b) <= tolerance if b.any() else not a.any(), place


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_agrees_with_the_kept_graph(rule: str, norm: bool, mode: str, traces: list[fx.GraphModule]) -> None:
    model = convolutional(nn.BatchNorm2d(3)) if norm else convolutional()
    data = Data(OPTIMIZERS[rule]())
    expected = data.hypergradient(model, KeptGraph())
    assert all(gradient.any() for gradient in expected)
    assert_same(data.hypergradient(model, StepAdjoint(mode=mode, compile=True)), expected)
    assert len(traces) == 2


@pytest.mark.parametrize("options", [{"checkpoint_every": "sqrt"}, {"checkpoint_every": 4}])
def test_checkpoints_and_windows(options: dict[str, object], traces: list[fx.GraphModule]) -> None:
    model, data = convolutional(nn.BatchNorm2d(3)), Data(SGD(momentum=0.9))
    adjoint = StepAdjoint(compile=True, **options)
    for window in (None, range(2, 5), range(3, 6)):
        expected = data.hypergradient(model, KeptGraph(), window=window)
        assert_same(data.hypergradient(model, adjoint, window=window), expected)
    assert len(traces) == 2


class WithHead(nn.Module):
    """Features and a head that is also given the targets."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh())
        self.head = head

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.features(images), targets)
        return logits


def loss_with_targets(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images, labels.argmax(-1)), labels)


@pytest.mark.parametrize("head", [FixedETFHead, NearestETFHead])
def test_heads(head: Callable[..., nn.Module], traces: list[fx.GraphModule]) -> None:
    model = WithHead(head(6, K, scale=3.0, generator=torch.Generator().manual_seed(0))).to(DTYPE)
    data = Data()
    data.labels = F.one_hot(torch.arange(S * B).view(S, B) % K, K).to(DTYPE).requires_grad_()
    expected = data.hypergradient(model, KeptGraph(), loss=loss_with_targets)
    found = data.hypergradient(model, StepAdjoint(compile=True), loss=loss_with_targets)
    assert_same(found, expected)
    assert traces


def test_what_was_traced_serves_later_calls(traces: list[fx.GraphModule]) -> None:
    model, adjoint = convolutional(nn.BatchNorm2d(3)), StepAdjoint(compile=True)
    for _ in range(3):
        data = Data(SGD(momentum=variable(torch.rand(()).item())))
        assert_same(data.hypergradient(model, adjoint), data.hypergradient(model, KeptGraph()))
        with torch.no_grad():
            model[0].weight.add_(0.1)
    assert len(traces) == 2


@pytest.mark.parametrize("change", ["shape", "mode", "loss", "optimizer", "needed", "model"])
def test_what_differs_is_traced_again(change: str, traces: list[fx.GraphModule]) -> None:
    model, data, adjoint = convolutional(nn.BatchNorm2d(3)), Data(), StepAdjoint(compile=True)
    options: dict[str, object] = {}
    data.hypergradient(model, adjoint)
    if change == "shape":
        data = Data(count=B + 1)
    elif change == "mode":
        model.eval()
    elif change == "loss":
        options["loss"] = lambda model, images, labels: 2 * cross_entropy(model, images, labels)
    elif change == "optimizer":
        data.optimizer = SGD(weight_decay=0.1)
    elif change == "needed":
        data.labels = data.labels.detach()
    else:
        model = convolutional(nn.BatchNorm2d(3), nn.Tanh())
    found = data.hypergradient(model, adjoint, **options)
    assert_same(found, data.hypergradient(model, KeptGraph(), **options))
    assert len(traces) == (3 if change == "needed" else 4)


def test_parameters_in_another_order_are_traced_again(traces: list[fx.GraphModule]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 16)).to(DTYPE)
    data, adjoint = Data(), StepAdjoint(compile=True)
    data.labels = torch.randn(S, B, 16, dtype=DTYPE).softmax(-1).requires_grad_()
    params = dict(model.named_parameters())
    for order in (list(params), sorted(params, reverse=True)):
        options = {"params": {name: params[name] for name in order}}
        expected = data.hypergradient(model, KeptGraph(), **options)
        assert_same(data.hypergradient(model, adjoint, **options), expected)
    assert len(traces) == 4


def test_several_initializations_at_once(traces: list[fx.GraphModule]) -> None:
    model, data = convolutional(nn.BatchNorm2d(3)), Data(SGD(momentum=0.9))
    params = {n: torch.randn(2, *p.shape, dtype=DTYPE).requires_grad_() for n, p in model.named_parameters()}
    options = {"params": params, "initializations": 2}
    expected = data.hypergradient(model, KeptGraph(), **options)
    assert_same(data.hypergradient(model, StepAdjoint(compile=True), **options), expected)
    assert len(traces) == 2


def test_parameters_that_are_not_trained_are_read_when_the_step_runs(traces: list[fx.GraphModule]) -> None:
    model, data, adjoint = convolutional(), Data(), StepAdjoint(compile=True)
    params = {name: value for name, value in model.named_parameters() if name.startswith("3.")}
    found = []
    for _ in range(2):
        found.append(data.hypergradient(model, adjoint, params=params))
        assert_same(found[-1], data.hypergradient(model, KeptGraph(), params=params))
        model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))
    assert relative_error(found[1][0], found[0][0]) > 0.01
    assert len(traces) == 2


def test_tensors_that_the_loss_reads_may_change_in_place(traces: list[fx.GraphModule]) -> None:
    weights = torch.rand(K, dtype=DTYPE)

    def loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return -(weights * labels * model(images).log_softmax(-1)).mean()

    model, data, adjoint = convolutional(), Data(), StepAdjoint(compile=True)
    for _ in range(2):
        found = data.hypergradient(model, adjoint, loss=loss)
        assert_same(found, data.hypergradient(model, KeptGraph(), loss=loss))
        weights.add_(1.0)
    assert len(traces) == 2


class Tempered:
    """A loss with a Python number that may change, or with a count of its calls."""

    def __init__(self, growth: float = 0.0) -> None:
        self.temperature, self.growth = 1.0, growth

    def __call__(self, model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
        self.temperature += self.growth
        return cross_entropy(lambda images: model(images) / self.temperature, images, labels)


def test_numbers_that_changed_since_the_trace_are_noticed(traces: list[fx.GraphModule]) -> None:
    model, data, adjoint, loss = convolutional(), Data(), StepAdjoint(compile=True), Tempered()
    data.hypergradient(model, adjoint, loss=loss)
    loss.temperature = 2.0
    with pytest.raises(InvalidArgumentError, match="has changed since the step was traced"):
        data.hypergradient(model, adjoint, loss=loss)


def test_numbers_that_change_from_call_to_call_are_noticed(traces: list[fx.GraphModule]) -> None:
    with pytest.raises(InvalidArgumentError, match="changes from call to call"):
        Data().hypergradient(convolutional(), StepAdjoint(compile=True), loss=Tempered(0.1))


def branching(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    logits = model(images)
    return cross_entropy(lambda _: logits if logits.mean() > 0 else 2 * logits, images, labels)


def reading(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    logits = model(images)
    return F.cross_entropy(logits, labels) * logits.detach().norm().item()


def augmenting(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model, images + 0.1 * torch.randn_like(images), labels)


def subsampling(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    chosen = torch.randperm(B)[:3]
    return cross_entropy(model, images[chosen], labels[chosen])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (branching, "cannot be traced.*compile=False"),
        (reading, "convert a tensor to a number.*compile=False"),
        (augmenting, "randn_like.*cannot replay.*compile=False"),
        (subsampling, "randperm.*cannot replay.*compile=False"),
    ],
)
def test_a_loss_that_a_trace_would_get_wrong(
    loss: InnerLoss, message: str, traces: list[fx.GraphModule]
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Data().hypergradient(convolutional(), StepAdjoint(compile=True), loss=loss)
    assert not traces


def test_dropout_is_refused_in_training_only(traces: list[fx.GraphModule]) -> None:
    model, data = convolutional(nn.Dropout(0.3)), Data()
    with pytest.raises(InvalidArgumentError, match="random numbers"):
        data.hypergradient(model, StepAdjoint(compile=True))
    model.eval()
    assert_same(data.hypergradient(model, StepAdjoint(compile=True)), data.hypergradient(model, KeptGraph()))


def test_errors_of_the_model_are_its_own(traces: list[fx.GraphModule]) -> None:
    data = Data()
    data.images = torch.randn(S, B, 2, 4, 4, dtype=DTYPE, requires_grad=True)
    with pytest.raises(RuntimeError, match="channels") as caught:
        data.hypergradient(convolutional(), StepAdjoint(compile=True))
    assert not isinstance(caught.value, InvalidArgumentError)


def test_operators_without_forward_mode_fall_back(traces: list[fx.GraphModule]) -> None:
    def huber(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.huber_loss(model(images), labels)

    model, data = convolutional(), Data()
    expected = data.hypergradient(model, KeptGraph(), loss=huber)
    with pytest.warns(RuntimeWarning, match="forward over reverse is not possible"):
        found = data.hypergradient(model, StepAdjoint(mode="forward", compile=True), loss=huber)
    assert_same(found, expected)


def test_tangents_that_are_known_to_be_zero(traces: list[fx.GraphModule]) -> None:
    def squared(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(model(images), labels)

    model, data = convolutional(), Data()
    found = data.hypergradient(model, StepAdjoint(mode="forward", compile=True), loss=squared)
    assert_same(found, data.hypergradient(model, KeptGraph(), loss=squared))


def test_autocast_is_traced(traces: list[fx.GraphModule]) -> None:
    model = convolutional().float()
    data = Data()
    images, labels = data.images.detach().float().requires_grad_(), data.labels.detach().float()

    def gradient(adjoint: InnerAdjoint) -> Tensor:
        params = dict(model.named_parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            trained = unrolled_inner_loop(
                model, params, images, labels, lr=0.1, epochs=EPOCHS, adjoint=adjoint
            )
        return torch.autograd.grad(sum(p.square().sum() for p in trained.params.values()), images)[0]

    assert_same([gradient(StepAdjoint(compile=True))], [gradient(StepAdjoint())], 1e-5)
    assert any("bfloat16" in str(node.kwargs) for graph in traces for node in graph.graph.nodes)


def test_the_random_numbers_of_the_caller_are_left_alone(traces: list[fx.GraphModule]) -> None:
    model, data = convolutional(), Data()
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    data.hypergradient(model, StepAdjoint(compile=True), generator=generator)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_watches_operators_does_not_see_the_trace(traces: list[fx.GraphModule]) -> None:
    model, data = convolutional(), Data()
    with PeakMemory() as memory:
        data.hypergradient(model, StepAdjoint(compile=True))
    with PeakMemory() as plain:
        data.hypergradient(model, StepAdjoint())
    assert memory.peak <= 1.2 * plain.peak


def test_an_adjoint_is_a_value_and_copies_start_empty(traces: list[fx.GraphModule]) -> None:
    adjoint = StepAdjoint(compile=True)
    Data().hypergradient(convolutional(), adjoint)
    assert adjoint == StepAdjoint(compile=True)
    assert repr(adjoint) == "StepAdjoint(mode='reverse', checkpoint_every=1, compile=True)"
    assert len(adjoint._cache) == 2
    for other in (copy.deepcopy(adjoint), pickle.loads(pickle.dumps(adjoint))):
        assert other == adjoint
        assert len(other._cache) == 0


def test_a_cache_forgets_what_was_used_longest_ago(
    monkeypatch: pytest.MonkeyPatch, traces: list[fx.GraphModule]
) -> None:
    monkeypatch.setattr(compiled, "_LARGEST", 4)
    model, adjoint = convolutional(), StepAdjoint(compile=True)
    for count, known in ((3, 2), (4, 4), (3, 4), (5, 6), (3, 6), (4, 8)):
        Data(count=count).hypergradient(model, adjoint)
        assert len(traces) == known
        assert len(adjoint._cache) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_compiled_code_agrees_with_the_kept_graph(mode: str) -> None:
    model, data = convolutional(nn.BatchNorm2d(3)), Data(OPTIMIZERS["adam"]())
    adjoint = StepAdjoint(mode=mode, compile=True)
    expected = data.hypergradient(model, KeptGraph())
    for _ in range(2):
        assert_same(data.hypergradient(model, adjoint), expected)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise FileNotFoundError("no-such-compiler")

    monkeypatch.setattr("torch._inductor.compile", missing)
    with pytest.raises(InvalidArgumentError, match=r"could not be compiled.*no-such-compiler"):
        Data().hypergradient(convolutional(), StepAdjoint(compile=True))
