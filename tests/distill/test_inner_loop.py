"""Hypergradients of every adjoint: against the kept graph, against finite differences, at the edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etflayers.distill import (
    SGD,
    Adam,
    AdamW,
    InnerSolution,
    KeptGraph,
    StepAdjoint,
    UnrolledInnerLoop,
    cross_entropy,
    last_window,
    truncation_cosine,
    unrolled_inner_loop,
)
from etflayers.distill.adjoints import InnerAdjoint
from etflayers.distill.optimizers import InnerOptimizer
from etflayers.errors import InvalidArgumentError, ManifoldError, NonFiniteError
from etflayers.nn import FixedETFHead, LearnedETFHead, NearestETFHead, provide_targets
from etflayers.testing import relative_error

DTYPE = torch.float64
S, B, K, EPOCHS = 2, 5, 3, 3
STEPS = S * EPOCHS


def variable(value: float) -> Tensor:
    return torch.tensor(value, dtype=DTYPE, requires_grad=True)


OPTIMIZERS: dict[str, Callable[[], InnerOptimizer]] = {
    "sgd": lambda: SGD(weight_decay=variable(0.01)),
    "momentum": lambda: SGD(momentum=variable(0.9), weight_decay=variable(0.01)),
    "nesterov": lambda: SGD(momentum=variable(0.8), nesterov=True),
    # A large eps: next to a gradient that is rounding alone, a small one would amplify it.
    "adam": lambda: Adam(beta1=variable(0.9), beta2=variable(0.99), eps=1e-3, weight_decay=variable(0.01)),
    "adamw": lambda: AdamW(eps=1e-3, weight_decay=variable(0.1)),
}
ADJOINTS: dict[str, InnerAdjoint] = {
    "reverse": StepAdjoint(),
    "forward": StepAdjoint(mode="forward"),
    "sqrt": StepAdjoint(checkpoint_every="sqrt"),
    "every 4": StepAdjoint(checkpoint_every=4),
}


def convolutional(*extra: nn.Module) -> nn.Sequential:
    """Smooth, so that finite differences exist; no bias that a normalization would make redundant."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), *extra, nn.Softplus(), nn.Flatten(), nn.Linear(12, K)
    ).to(DTYPE)


class WithHead(nn.Module):
    """Features and a head that is also given the targets."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh())
        self.head = head

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.features(images), targets)
        return logits


def nearest(**options: object) -> NearestETFHead:
    return NearestETFHead(6, K, scale=3.0, generator=torch.Generator().manual_seed(0), **options)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "canonical": lambda: FixedETFHead(6, K, rotation="canonical", scale=3.0),
    "haar": lambda: FixedETFHead(6, K, rotation="haar", scale=3.0),
    "nearest": nearest,
    "learned": lambda: LearnedETFHead(6, K, scale=3.0, dtype=DTYPE),
}


def targets_of(labels: Tensor) -> Tensor:
    return labels.argmax(-1)


def loss_with_targets(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images, targets_of(labels)), labels)


class Data:
    """Everything that a hypergradient may be taken for."""

    def __init__(self, optimizer: InnerOptimizer) -> None:
        self.images = torch.randn(S, B, 1, 4, 4, dtype=DTYPE, requires_grad=True)
        self.labels = torch.randn(S, B, K, dtype=DTYPE).softmax(-1).requires_grad_()
        self.rates = torch.tensor([0.1, 0.2], dtype=DTYPE, requires_grad=True)
        self.optimizer = optimizer
        self.hyper = [value for value in vars(optimizer).values() if isinstance(value, Tensor)]

    def train(self, model: nn.Module, adjoint: InnerAdjoint, **options: object) -> InnerSolution:
        params = {n: p for n, p in model.named_parameters() if n != "head.rotation"}
        options.setdefault("epochs", EPOCHS)
        solution: InnerSolution = unrolled_inner_loop(
            model,
            params,
            self.images,
            self.labels,
            lr=self.rates,
            optimizer=self.optimizer,
            adjoint=adjoint,
            generator=torch.Generator().manual_seed(3),
            **options,
        )
        return solution

    def variables(self, model: nn.Module) -> list[Tensor]:
        return [
            self.images,
            self.labels,
            self.rates,
            *self.hyper,
            *(p for n, p in model.named_parameters() if n != "head.rotation"),
        ]


def outer_loss(solution: InnerSolution) -> Tensor:
    weights = torch.Generator().manual_seed(5)
    return sum(
        (torch.randn(p.shape, generator=weights, dtype=p.dtype) * p.square()).sum()
        for p in solution.params.values()
    )


def hypergradient(data: Data, model: nn.Module, adjoint: InnerAdjoint, **options: object) -> list[Tensor]:
    loss = outer_loss(data.train(model, adjoint, **options))
    found = torch.autograd.grad(loss, data.variables(model), allow_unused=True, materialize_grads=True)
    return list(found)


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert relative_error(a, b) <= tolerance if b.any() else not a.any(), place


def finite_difference(data: Data, model: nn.Module, **options: object) -> tuple[float, float]:
    """The derivative along a random direction in all variables, by the hypergradient and by differences."""
    variables = data.variables(model)
    directions = [torch.randn_like(value) for value in variables]
    directions = [d / d.norm() for d in directions]
    exact = hypergradient(data, model, StepAdjoint(), **options)
    values = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            for value, direction in zip(variables, directions, strict=True):
                value.add_(h * direction)
            values.append(float(outer_loss(data.train(model, KeptGraph(), **options))))
            for value, direction in zip(variables, directions, strict=True):
                value.sub_(h * direction)
    analytic = float(sum((g * d).sum() for g, d in zip(exact, directions, strict=True)))
    return analytic, (values[0] - values[1]) / 2e-6


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm and dropout"])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_adjoints_agree_with_the_kept_graph(rule: str, norm: bool) -> None:
    model = convolutional(nn.BatchNorm2d(3), nn.Dropout(0.3)) if norm else convolutional()
    data = Data(OPTIMIZERS[rule]())
    expected = hypergradient(data, model, KeptGraph())
    assert all(gradient.any() for gradient in expected)
    for adjoint in ADJOINTS.values():
        assert_same(hypergradient(data, model, adjoint), expected)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm and dropout"])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_finite_differences(rule: str, norm: bool) -> None:
    model = convolutional(nn.BatchNorm2d(3), nn.Dropout(0.3)) if norm else convolutional()
    analytic, difference = finite_difference(Data(OPTIMIZERS[rule]()), model)
    assert analytic == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_agree_with_the_kept_graph(kind: str) -> None:
    if kind == "learned":
        pytest.importorskip("geoopt")
    model = WithHead(HEADS[kind]()).to(DTYPE)
    data = Data(SGD(momentum=0.9))
    data.labels = F.one_hot(torch.arange(S * B).view(S, B) % K, K).to(DTYPE).requires_grad_()
    expected = hypergradient(data, model, KeptGraph(), loss=loss_with_targets)
    assert all(gradient.any() for gradient in expected)
    for adjoint in ADJOINTS.values():
        assert_same(hypergradient(data, model, adjoint, loss=loss_with_targets), expected)


@pytest.mark.parametrize("kind", HEADS)
def test_heads_by_finite_differences(kind: str) -> None:
    if kind == "learned":
        pytest.importorskip("geoopt")
    # A nearest head with these options does not read its buffers, which carry no gradient by design.
    head = nearest(momentum=1.0, anchor="initial") if kind == "nearest" else HEADS[kind]()
    model = WithHead(head).to(DTYPE)
    data = Data(SGD(momentum=0.9))
    smooth = 0.8 * F.one_hot(torch.arange(S * B).view(S, B) % K, K).to(DTYPE) + 0.2 / K
    data.labels = smooth.requires_grad_()
    analytic, difference = finite_difference(data, model, loss=loss_with_targets)
    assert analytic == pytest.approx(difference, rel=1e-6)


def test_targets_reach_a_head_inside_a_model_that_hands_on_features_only() -> None:
    features = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh())
    apart = WithHead(nearest()).to(DTYPE)
    apart.features.load_state_dict(features.state_dict())
    inside = nn.Sequential(features, nearest()).to(DTYPE)

    def loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
        with provide_targets(inside, targets_of(labels)):
            return cross_entropy(model, images, labels)

    data = Data(SGD())
    found = hypergradient(data, inside, StepAdjoint(), loss=loss)
    data.images, data.labels, data.rates = (
        v.detach().requires_grad_() for v in (data.images, data.labels, data.rates)
    )
    assert_same(found, hypergradient(data, apart, StepAdjoint(), loss=loss_with_targets), 1e-6)


@pytest.mark.parametrize("adjoint", [KeptGraph(), StepAdjoint()], ids=["kept", "step"])
def test_training_is_that_of_torch_optim(adjoint: InnerAdjoint) -> None:
    model = convolutional(nn.BatchNorm2d(3))
    data = Data(SGD(momentum=0.9))
    solution = data.train(model, adjoint)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    for t in range(STEPS):
        optimizer.param_groups[0]["lr"] = float(data.rates[t % S].detach())
        loss = cross_entropy(model, data.images[t % S].detach(), data.labels[t % S].detach())
        assert float(solution.losses[t]) == pytest.approx(float(loss.detach()), rel=1e-12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert any((value != initial[name]).any() for name, value in model.state_dict().items())
    assert set(solution.state) == set(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(solution.state[name].detach(), value, rtol=1e-12, atol=1e-12)


def test_the_model_is_not_changed() -> None:
    model = convolutional(nn.BatchNorm2d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Data(SGD()).train(model, StepAdjoint())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hard_labels_one_batch_and_a_rate_for_each_step() -> None:
    model = convolutional()
    data = Data(SGD())
    data.images = data.images[:1].detach().requires_grad_()
    data.labels = torch.arange(B)[None] % K
    data.rates = torch.linspace(0.1, 0.3, 4, dtype=DTYPE).requires_grad_()
    variables = [data.images, data.rates]
    found = {
        name: torch.autograd.grad(outer_loss(data.train(model, adjoint, epochs=4)), variables)
        for name, adjoint in {"kept": KeptGraph(), **ADJOINTS}.items()
    }
    assert found["kept"][1].all()
    for gradient in found.values():
        assert_same(gradient, found["kept"])


def test_frozen_parameters_get_no_gradient() -> None:
    model = convolutional()
    data = Data(SGD())
    for adjoint in (KeptGraph(), StepAdjoint()):
        params = {n: p for n, p in model.named_parameters() if n.startswith("3.")}
        solution = unrolled_inner_loop(
            model, params, data.images, data.labels, lr=data.rates, epochs=2, adjoint=adjoint
        )
        assert set(solution.params) == {"3.weight", "3.bias"}
        outer_loss(solution).backward()
        assert model[0].weight.grad is None
        assert model[3].weight.grad is not None


@pytest.mark.parametrize("adjoint", [KeptGraph(), *ADJOINTS.values()], ids=["kept", *ADJOINTS])
def test_a_window_is_training_from_its_start(adjoint: InnerAdjoint) -> None:
    """The hypergradient through ``range(a, b)`` is that of b - a steps from the parameters after a steps."""
    model = convolutional(nn.BatchNorm2d(3))
    data = Data(SGD(weight_decay=variable(0.01)))
    window = range(2, 5)
    found = hypergradient(data, model, adjoint, window=window)
    before = data.train(model, KeptGraph(), window=range(2, 2))
    start = {name: value.detach() for name, value in before.params.items()}
    after = unrolled_inner_loop(
        model,
        start,
        torch.cat([data.images, data.images[:1]]),
        torch.cat([data.labels, data.labels[:1]]),
        lr=torch.cat([data.rates, data.rates[:1]]),
        optimizer=data.optimizer,
        buffers=before.buffers,
        adjoint=KeptGraph(),
    )
    variables = [data.images, data.labels, data.rates, *data.hyper]
    expected = torch.autograd.grad(outer_loss(after), variables)
    assert_same(found[: len(variables)], expected)
    assert not any(gradient.any() for gradient in found[len(variables) :])


def test_a_window_tends_to_the_exact_hypergradient() -> None:
    model = convolutional()
    data = Data(SGD())

    def of(window: range | None) -> list[Tensor]:
        return hypergradient(data, model, StepAdjoint(), window=window)[:1]

    cosines = truncation_cosine(of, [last_window(w, STEPS) for w in (1, 3, STEPS)])
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] == pytest.approx(1.0, abs=1e-14)


def test_augmentation_and_subsampling_are_replayed() -> None:
    def loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
        chosen = torch.randperm(B)[:3]
        noisy = images[chosen] + 0.1 * torch.randn_like(images[chosen])
        return cross_entropy(model, noisy, labels[chosen])

    model, data = convolutional(), Data(Adam(eps=1e-3))
    expected = hypergradient(data, model, KeptGraph(), loss=loss)
    state = torch.get_rng_state()
    for adjoint in ADJOINTS.values():
        assert_same(hypergradient(data, model, adjoint, loss=loss), expected)
    assert torch.equal(torch.get_rng_state(), state)  # the seeds came from a generator of the caller


def test_autocast_is_replayed_outside_its_block() -> None:
    model = convolutional().float()
    data = Data(SGD())
    images = data.images.detach().float().requires_grad_()

    def gradient(adjoint: InnerAdjoint, enabled: bool) -> tuple[Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            solution = UnrolledInnerLoop(model, adjoint=adjoint, epochs=EPOCHS)(
                images, data.labels.detach().float(), lr=0.1
            )
        return torch.autograd.grad(outer_loss(solution), images)[0], solution.losses

    kept, losses = gradient(KeptGraph(), True)
    found, _ = gradient(StepAdjoint(), True)
    full, full_losses = gradient(StepAdjoint(), False)
    assert not torch.equal(losses, full_losses)
    assert relative_error(found, kept) < 1e-6 < relative_error(full, kept)


def test_forward_mode_falls_back_and_says_so() -> None:
    def loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.huber_loss(model(images), labels)

    model, data = convolutional(), Data(SGD())
    expected = hypergradient(data, model, KeptGraph(), loss=loss)
    with pytest.warns(RuntimeWarning, match="forward over reverse is not possible") as caught:
        found = hypergradient(data, model, StepAdjoint(mode="forward"), loss=loss)
    assert len(caught) == 1  # not once for every step
    assert_same(found, expected)


def test_a_kept_graph_can_be_differentiated_again_and_a_step_adjoint_says_no() -> None:
    model, data = convolutional(), Data(SGD())
    (gradient,) = torch.autograd.grad(
        outer_loss(data.train(model, KeptGraph())), data.images, create_graph=True
    )
    assert torch.autograd.grad(gradient.square().sum(), data.images)[0].any()
    loss = outer_loss(data.train(model, StepAdjoint()))
    with pytest.raises(InvalidArgumentError, match=r"use adjoint=KeptGraph\(\)"):
        torch.autograd.grad(loss, data.images, create_graph=True)


def test_no_gradient_is_asked_for() -> None:
    model, data = convolutional(), Data(SGD())
    with torch.no_grad():
        solution = data.train(model, StepAdjoint())
    assert not any(value.requires_grad for value in solution.params.values())
    reference = data.train(model, KeptGraph())
    assert relative_error(outer_loss(solution), outer_loss(reference)) < 1e-14


def test_inference_mode_is_an_error() -> None:
    with torch.inference_mode(), pytest.raises(InvalidArgumentError, match=r"torch\.no_grad"):
        Data(SGD()).train(convolutional(), StepAdjoint())


def test_the_module_trains_from_the_parameters_of_its_model() -> None:
    model, data = convolutional(nn.BatchNorm2d(3), nn.Dropout(0.3)), Data(SGD(momentum=0.9))
    expected = hypergradient(data, model, KeptGraph())
    loop = UnrolledInnerLoop(model, optimizer=data.optimizer, epochs=EPOCHS)
    solution = loop(data.images, data.labels, lr=data.rates, generator=torch.Generator().manual_seed(3))
    outer_loss(solution).backward()
    assert_same([variable.grad for variable in data.variables(model)], expected)


def test_a_linear_loss_has_no_curvature() -> None:
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(16, 1)).to(DTYPE), Data(SGD())

    def loss(model: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return model(torch.ones_like(images)).sum()

    expected = hypergradient(data, model, KeptGraph(), loss=loss)
    for adjoint in ADJOINTS.values():
        assert_same(hypergradient(data, model, adjoint, loss=loss), expected)


@pytest.mark.parametrize("adjoint", [KeptGraph(), StepAdjoint()], ids=["kept", "step"])
def test_a_non_finite_loss_names_its_step(adjoint: InnerAdjoint) -> None:
    model, data = convolutional(), Data(SGD())
    with torch.no_grad():
        data.images[1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"inner loss of step 1 .*lower lr"):
        data.train(model, adjoint)
    data.images = torch.randn_like(data.images)
    data.rates = torch.tensor(1e308, dtype=DTYPE)
    with pytest.raises(NonFiniteError, match="lower lr"):
        data.train(model, adjoint)


class Counting(nn.Module):
    """Keeps state where nothing can thread it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(16, K, dtype=DTYPE)
        self.kind = kind
        self.calls = 0
        self.scale = torch.ones((), dtype=DTYPE)

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "tensor":
            self.scale += 0.1
        elif self.kind == "number":
            self.calls += 1
        elif self.kind == "parameter":
            with torch.no_grad():
                self.linear.weight.mul_(0.5)
        return self.linear(images.flatten(1)) * self.scale * (1 + 0.1 * self.calls)


def test_state_changed_in_place_is_an_error() -> None:
    data = Data(SGD())
    with pytest.raises(InvalidArgumentError, match=r"'scale'.*register_buffer"):
        data.train(Counting("tensor"), KeptGraph())
    with pytest.raises(InvalidArgumentError, match="changes its parameters in place"):
        data.train(Counting("parameter"), StepAdjoint())
    with pytest.raises(InvalidArgumentError, match="another value when step 5 was re-derived"):
        hypergradient(data, Counting("number"), StepAdjoint())


def test_a_learned_rotation_leaves_its_manifold_under_an_ordinary_rule() -> None:
    pytest.importorskip("geoopt")
    model = WithHead(LearnedETFHead(6, K, manifold="geoopt", dtype=DTYPE)).to(DTYPE)
    data = Data(SGD())
    with pytest.raises(ManifoldError):
        unrolled_inner_loop(
            model, dict(model.named_parameters()), data.images, data.labels, lr=1.0, loss=loss_with_targets
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": torch.zeros(4)}, r"images must have shape \(S, B, \.\.\.\)"),
        ({"labels": torch.zeros(B, dtype=torch.int64)}, "labels must have the shape"),
        ({"images": torch.zeros(S, B, 1, 4, 4, dtype=torch.int64)}, "images must have a real"),
        ({"lr": torch.zeros(5)}, r"lr must be a number or a tensor of shape"),
        ({"epochs": 0}, "epochs must be"),
        ({"window": range(3, 99)}, "window must be"),
        ({"window": range(0, 6, 2)}, "window must be"),
        ({"images": [[0.0]]}, "images must be a tensor, got list"),
        ({"labels": [[0]]}, "labels must be a tensor, got list"),
        ({"labels": torch.ones(S, B, dtype=torch.bool)}, r"labels must be integers \(class indices\)"),
        ({"labels": torch.ones(S, B, K, dtype=torch.int64)}, r"use \.argmax\(-1\) for one-hot"),
        ({"lr": -0.1}, "lr must be finite and at least 0"),
        ({"lr": torch.tensor([0.1, -0.1])}, "lr must be finite and at least 0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"lr": None}, "lr must be a number or a tensor, got NoneType"),
        ({"model": convolutional}, "model must be a torch.nn.Module, got function"),
        ({"optimizer": torch.optim.SGD}, r"optimizer must be.*SGD\(momentum=0.9\).*the class SGD"),
        ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, "optimizer must be.*torch.optim.adam.Adam"),
        ({"optimizer": SGD}, "optimizer must be an update rule.*Got the class SGD"),
        ({"optimizer": "sgd"}, "optimizer must be an update rule"),
        ({"adjoint": StepAdjoint}, r"adjoint must be 'auto', StepAdjoint\(\)"),
        ({"adjoint": "kept"}, r"adjoint must be .*got 'kept'"),
        ({"loss": nn.CrossEntropyLoss()}, r"loss must be a function of \(model, images, labels\)"),
        ({"loss": F.cross_entropy}, r"loss must be a function of \(model, images, labels\)"),
        ({"loss": lambda logits, labels: logits.sum()}, r"loss must be a function of"),
        ({"params": {}}, "params is empty"),
        ({"params": {"5.weight": torch.zeros(2)}}, "no parameters of the model"),
        ({"params": {"3.bias": torch.zeros(2)}}, "must have shape"),
        ({"buffers": {"3.mean": torch.zeros(2)}}, "no buffer of the model"),
        ({"loss": lambda model, x, y: model(x)}, "must return a scalar"),
        ({"loss": lambda model, x, y: 1.0}, "must return a scalar tensor, got float"),
        ({"loss": lambda model, x, y: x.sum()}, "does not depend on the parameters"),
    ],
)
def test_wrong_arguments(options: dict[str, object], message: str) -> None:
    model, data = convolutional(), Data(SGD())
    arguments = {
        "model": model,
        "params": dict(model.named_parameters()),
        "images": data.images.detach(),
        "labels": data.labels.detach(),
        "lr": 0.1,
        "epochs": EPOCHS,
    }
    with pytest.raises(InvalidArgumentError, match=message):
        unrolled_inner_loop(**{**arguments, **options})
    parts = {name: options[name] for name in options if name in ("model", "optimizer", "adjoint")}
    if parts:
        with pytest.raises(InvalidArgumentError, match=message):
            UnrolledInnerLoop(**{"model": model, **parts})


def test_parameters_of_two_dtypes() -> None:
    model = convolutional()
    model[3].float()
    with pytest.raises(InvalidArgumentError, match="one dtype"):
        Data(SGD()).train(model, StepAdjoint())


def test_parameters_that_require_no_gradient_are_not_trained() -> None:
    model, data = convolutional(), Data(SGD())
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    images, labels = data.images, data.labels
    for adjoint in (KeptGraph(), StepAdjoint()):
        trained = UnrolledInnerLoop(model, adjoint=adjoint)(images, labels, lr=0.1)
        assert set(trained.params) == {"3.weight", "3.bias"}
        assert torch.equal(model[0].weight, before)
    with pytest.raises(InvalidArgumentError, match=r"frozen.*'0.weight'.*detach"):
        unrolled_inner_loop(model, dict(model.named_parameters()), images, labels, lr=0.1)
    start = {name: value.detach() for name, value in model.named_parameters()}
    assert not torch.equal(
        unrolled_inner_loop(model, start, images, labels, lr=0.1).params["0.weight"], before
    )
    with pytest.raises(InvalidArgumentError, match="no parameter of the model requires a gradient"):
        UnrolledInnerLoop(model.requires_grad_(False))(images, labels, lr=0.1)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16, dtype=DTYPE), nn.Linear(16, 16, dtype=DTYPE)
        self.two.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.two(torch.tanh(self.one(images.flatten(1))))
        return logits


def test_tied_weights_are_trained_as_one_whatever_names_they_are_given_under() -> None:
    model, data = Tied(), Data(SGD())
    labels = torch.arange(S * B).view(S, B)

    def train(**params: Tensor) -> InnerSolution:
        names = {name.replace("_", "."): value for name, value in params.items()}
        return unrolled_inner_loop(model, names, data.images, labels, lr=0.1)

    expected = UnrolledInnerLoop(model)(data.images, labels, lr=0.1)
    every = dict(model.named_parameters(remove_duplicate=False))
    found = unrolled_inner_loop(model, every, data.images, labels, lr=0.1)
    assert set(found.params) == {"one.weight", "one.bias", "two.bias"}
    for name, value in expected.params.items():
        assert torch.equal(found.params[name], value)
    weight = model.one.weight
    assert torch.equal(
        train(two_weight=weight).params["one.weight"], train(one_weight=weight).params["one.weight"]
    )
    with pytest.raises(InvalidArgumentError, match=r"two tensors for the tied parameter 'one\.weight'"):
        train(one_weight=weight, two_weight=weight.detach())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_every_integer_dtype(dtype: torch.dtype) -> None:
    model, data = convolutional(), Data(SGD())
    labels = torch.arange(S * B).view(S, B) % K
    loop = UnrolledInnerLoop(model)
    expected = loop(data.images, labels, lr=0.1)
    found = loop(data.images, labels.to(dtype), lr=0.1)
    assert torch.equal(found.params["3.weight"], expected.params["3.weight"])


@pytest.mark.parametrize("options", [{"mode": "sideways"}, {"checkpoint_every": 0}])
def test_an_adjoint_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match="must be"):
        StepAdjoint(**options)
