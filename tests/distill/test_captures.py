"""Tensors that a step closes over get their gradient or are refused; settings of the loop hold later too."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from etflayers.distill import SGD, Adam, KeptGraph, StepAdjoint, UnrolledInnerLoop, unrolled_inner_loop
from etflayers.distill.adjoints import InnerAdjoint
from etflayers.distill.objective import InnerLoss
from etflayers.distill.peak_memory import PeakMemory
from etflayers.errors import InvalidArgumentError
from etflayers.testing import relative_error

DTYPE = torch.float64
S, B, K = 2, 5, 3
ADJOINTS = {
    "reverse": StepAdjoint(),
    "forward": StepAdjoint(mode="forward"),
    "checkpoints": StepAdjoint(checkpoint_every=2),
}
Model = Callable[..., Tensor]


def data(dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(S, B, 4, dtype=dtype, generator=generator, requires_grad=True)
    return images, torch.arange(S * B).view(S, B) % K


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, K)).to(DTYPE)


def gradients(
    loss: InnerLoss, adjoint: InnerAdjoint, wanted: Sequence[Tensor], **options: object
) -> tuple[Tensor | None, ...]:
    """Of an outer loss that reads the tensors too, and of the images at the end."""
    images, labels = data()
    model = network()
    options.setdefault("params", dict(model.named_parameters()))
    trained = unrolled_inner_loop(
        model,
        images=images,
        labels=labels,
        lr=0.3,
        epochs=3,
        loss=loss,
        adjoint=adjoint,
        generator=torch.Generator().manual_seed(2),
        **options,
    )
    outer = sum(value.square().sum() for value in trained.params.values())
    return torch.autograd.grad(outer, [*wanted, images], allow_unused=True, retain_graph=True)


def assert_carried(loss: InnerLoss, wanted: Sequence[Tensor], **options: object) -> None:
    expected = gradients(loss, KeptGraph(), wanted, **options)
    assert all(value is not None and value.any() for value in expected)
    for adjoint in ADJOINTS.values():
        for found, value in zip(gradients(loss, adjoint, wanted, **options), expected, strict=True):
            assert relative_error(found, value) < 1e-10


def tempered(scale: Tensor) -> InnerLoss:
    return lambda model, images, labels: F.cross_entropy(scale * model(images), labels)


def test_a_leaf_that_the_loss_closes_over() -> None:
    tau = torch.tensor(2.0, dtype=DTYPE, requires_grad=True)
    assert_carried(tempered(tau), [tau])
    assert_carried(tempered(tau), [tau], window=range(3, 6))


def test_tensors_made_before() -> None:
    logs = torch.tensor([0.5, 0.2, 0.1], dtype=DTYPE, requires_grad=True)
    scales = logs.exp()
    one, other, third = scales.unbind()  # one node with several outputs

    def loss(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return one * tempered(other)(model, images, labels)

    assert_carried(loss, [logs])
    assert_carried(loss, [one, other])
    assert third.grad_fn is one.grad_fn


def test_the_graph_behind_a_captured_tensor_outlives_the_steps() -> None:
    tau = torch.tensor(2.0, dtype=DTYPE, requires_grad=True)
    scale = tau.exp()  # which saves its result for its backward pass, and is walked back once only
    images, labels = data()
    model = network()
    trained = UnrolledInnerLoop(model, loss=tempered(scale), epochs=3)(images, labels, lr=0.1)
    (scale + trained.params["0.weight"].sum()).backward()
    assert tau.grad is not None


def test_a_proximal_term_reaches_the_initial_parameters() -> None:
    start = {name: value.detach().requires_grad_() for name, value in network().named_parameters()}
    weight = start["0.weight"]

    class Reading(nn.Sequential):
        """Gives the weight that is trained, too."""

        def forward(self, images: Tensor, weight: bool = False) -> Tensor:
            return self[0].weight if weight else super().forward(images)

    model = Reading(*network())

    def loss(of: Model, images: Tensor, labels: Tensor) -> Tensor:
        distance = (of(images, weight=True) - 2 * weight).square().sum()
        return F.cross_entropy(of(images), labels) + 0.1 * distance

    found = []
    for adjoint in (KeptGraph(), *ADJOINTS.values()):
        images, labels = data()
        trained = unrolled_inner_loop(model, start, images, labels, lr=0.3, loss=loss, adjoint=adjoint)
        found.append(torch.autograd.grad(trained.params["2.weight"].square().sum(), [weight, images]))
    for values in found[1:]:
        for value, expected in zip(values, found[0], strict=True):
            assert relative_error(value, expected) < 1e-10


def test_the_images_themselves_may_be_closed_over() -> None:
    images, labels = data()
    model = network()

    def loss(model: Model, batch: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(batch - 0.5 * images.mean((0, 1))), labels)

    def gradient(adjoint: InnerAdjoint) -> Tensor:
        trained = UnrolledInnerLoop(model, loss=loss, adjoint=adjoint, epochs=2)(images, labels, lr=0.3)
        return torch.autograd.grad(trained.params["0.weight"].square().sum(), images)[0]

    for adjoint in ADJOINTS.values():
        assert relative_error(gradient(adjoint), gradient(KeptGraph())) < 1e-10


def test_several_initial_states() -> None:
    tau = torch.tensor(2.0, dtype=DTYPE, requires_grad=True)
    scale = tau.exp()
    params = {name: torch.stack([value, 2 * value]).detach() for name, value in network().named_parameters()}
    assert_carried(tempered(scale), [tau], params=params, initializations=2)


class Scale(torch.autograd.Function):
    """A product that Python does not see the arguments of."""

    @staticmethod
    def forward(ctx, scale: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(scale, logits)
        return scale * logits

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        scale, logits = ctx.saved_tensors
        return (cotangent * logits).sum(), cotangent * scale


def test_through_a_function_with_a_backward_pass_of_its_own() -> None:
    tau = torch.tensor(2.0, dtype=DTYPE, requires_grad=True)

    def loss(scale: Tensor) -> InnerLoss:
        return lambda model, images, labels: F.cross_entropy(Scale.apply(scale, model(images)), labels)

    for scale in (tau, tau.exp()):
        expected = gradients(loss(scale), KeptGraph(), [tau])
        found = gradients(loss(scale), StepAdjoint(), [tau])
        assert relative_error(found[0], expected[0]) < 1e-10


@dataclass(frozen=True)
class Preconditioned:
    """A rule with tensors where the loop does not look for them."""

    scales: tuple[Tensor, ...]
    num_slots = 0
    affine = True

    def update(
        self, params: Tensor, grads: Tensor, slots: tuple[Tensor, ...], lr: Tensor, step: int | Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return params - lr * self.scales[0] * grads, ()


def test_a_rule_that_closes_over_a_tensor() -> None:
    scales = torch.linspace(0.5, 1.5, 51, dtype=DTYPE).requires_grad_()
    assert_carried(tempered(torch.ones((), dtype=DTYPE)), [scales], optimizer=Preconditioned((scales,)))
    both = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    assert_carried(tempered(both), [both], optimizer=Preconditioned((both,)))
    assert_carried(tempered(both), [both], optimizer=Adam(beta1=both, eps=1e-3))


def test_a_tensor_and_what_was_made_from_it_are_refused() -> None:
    tau = torch.tensor(2.0, dtype=DTYPE, requires_grad=True)
    made = tau.exp()

    def loss(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return tau * tempered(made)(model, images, labels)

    with pytest.raises(InvalidArgumentError, match=r"made from it before.*KeptGraph\(\)"):
        gradients(loss, StepAdjoint(), [tau])


def test_a_tensor_that_later_steps_read_only_is_refused() -> None:
    tau = torch.tensor(2.0, dtype=DTYPE, requires_grad=True)

    def loss(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        scale = (
            tau if int(labels[0]) else torch.ones((), dtype=DTYPE)
        )  # 0 in the first batch, 2 in the second
        return tempered(scale)(model, images, labels)

    assert gradients(loss, KeptGraph(), [tau])[0]
    for adjoint in ADJOINTS.values():
        with pytest.raises(InvalidArgumentError, match=r"in some steps only.*KeptGraph\(\)"):
            gradients(loss, adjoint, [tau])


def test_compiled_steps_refuse_captured_tensors() -> None:
    tau = torch.tensor(2.0, dtype=DTYPE, requires_grad=True)
    with pytest.raises(InvalidArgumentError, match=r"compile=True.*require a gradient.*compile=False"):
        gradients(tempered(tau), StepAdjoint(compile=True), [tau])


def test_constants_and_frozen_parameters_are_not_captured() -> None:
    constant = torch.tensor(2.0, dtype=DTYPE)
    params = {name: value for name, value in network().named_parameters() if name.startswith("2.")}
    found = gradients(tempered(constant), StepAdjoint(), [], params=params)
    assert relative_error(found[0], gradients(tempered(constant), KeptGraph(), [], params=params)[0]) < 1e-10


class Attention(nn.Module):
    """Two tokens that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.outputs = nn.Linear(4, 8), nn.Linear(8, K)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images).view(len(images), 1, 2, 4)
        attended: Tensor = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.outputs(attended.flatten(1))


@pytest.mark.parametrize("adjoint", [KeptGraph(), *ADJOINTS.values()], ids=["kept", *ADJOINTS])
def test_attention_is_differentiable_twice(adjoint: InnerAdjoint) -> None:
    torch.manual_seed(0)
    model, (images, labels) = Attention().to(DTYPE), data()
    trained = UnrolledInnerLoop(model, adjoint=adjoint, epochs=2)(images, labels, lr=0.3)
    (found,) = torch.autograd.grad(trained.params["tokens.weight"].square().sum(), images)
    with sdpa_kernel(SDPBackend.MATH):  # the whole of it, by plain autograd
        params = dict(model.named_parameters())
        for t in range(2 * S):
            logits = torch.func.functional_call(model, params, (images[t % S],))
            loss = F.cross_entropy(logits, labels[t % S])
            steps = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {
                name: value - 0.3 * step for (name, value), step in zip(params.items(), steps, strict=True)
            }
        (expected,) = torch.autograd.grad(params["tokens.weight"].square().sum(), images)
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        # One of each error that PyTorch has for it. (torch.cdist has a second derivative since 2.14.)
        (lambda logits, labels: F.multi_margin_loss(logits, labels), "multi_margin_loss_backward"),
        (lambda logits, labels: F.embedding_bag(labels[None], logits, mode="max").norm(), "_embedding_bag"),
    ],
)
def test_an_operator_without_a_second_derivative_is_named(
    operator: Callable[[Tensor, Tensor], Tensor], name: str
) -> None:
    def loss(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return operator(model(images), labels)

    for adjoint in (StepAdjoint(), StepAdjoint(checkpoint_every=2)):
        with pytest.raises(InvalidArgumentError, match=rf"cannot differentiate.*{name}"):
            gradients(loss, adjoint, [])


class DefaultDtype:
    """The default dtype inside a ``with`` block."""

    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float16)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(torch.float32)


class Deterministic:
    """Deterministic algorithms inside a ``with`` block."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


class WithoutMkldnn:
    """As ``torch.backends.mkldnn.flags``, which warns of something else."""

    def __enter__(self) -> None:
        torch.backends.mkldnn.enabled = False

    def __exit__(self, *_: object) -> None:
        torch.backends.mkldnn.enabled = True


class MatmulPrecision:
    """Products of lower precision inside a ``with`` block."""

    def __enter__(self) -> None:
        torch.set_float32_matmul_precision("high")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("context", "get"),
    [
        (DefaultDtype(), torch.get_default_dtype),
        (Deterministic(), torch.is_deterministic_algorithms_warn_only_enabled),
        (MatmulPrecision(), torch.get_float32_matmul_precision),
        (WithoutMkldnn(), lambda: torch.backends.mkldnn.enabled),
        (torch.backends.cudnn.flags(enabled=False), lambda: torch.backends.cudnn.enabled),
        (torch.device("meta"), lambda: torch.empty(0).device),
    ],
    ids=["dtype", "deterministic", "matmul", "mkldnn", "cudnn", "device"],
)
def test_settings_of_the_loop_hold_when_a_step_is_re_derived(
    context: AbstractContextManager[object], get: Callable[[], object]
) -> None:
    seen = []

    def loss(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        seen.append(get())
        return F.cross_entropy(model(images), labels)

    outside = get()
    images, labels = data()
    model = network()
    generator = torch.Generator().manual_seed(0)
    loop = UnrolledInnerLoop(model, loss=loss, epochs=2)
    with context:
        inside = get()
        trained = loop(images, labels, lr=torch.tensor(0.1, device="cpu"), generator=generator)
    assert inside != outside
    before = len(seen)
    trained.params["0.weight"].square().sum().backward()
    assert len(seen) > before
    assert set(seen) == {inside}
    assert get() == outside


def test_states_go_with_the_graph() -> None:
    """A result that is kept after its backward pass, as a list of losses keeps it, holds no states."""
    images, labels = data()
    loop = UnrolledInnerLoop(network(), optimizer=SGD(momentum=0.9), epochs=40)
    state = sum(value.nbytes for value in loop.parameters())
    kept = []
    with PeakMemory() as memory:
        for _ in range(3):
            loss = loop(images, labels, lr=0.01).params["2.bias"].sum()
            loss.backward()
            kept.append(loss)
        gc.collect()
        assert memory.peak > 80 * 2 * state  # parameters and momentum before each step
        assert memory.alive < 20 * state


def test_a_graph_that_is_retained_is_walked_twice() -> None:
    images, labels = data()
    loss = UnrolledInnerLoop(network(), epochs=3)(images, labels, lr=0.1).params["2.bias"].square().sum()
    (first,) = torch.autograd.grad(loss, images, retain_graph=True)
    (second,) = torch.autograd.grad(loss, images)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, images)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="since PyTorch 2.9")
def test_a_precision_of_one_library_alone() -> None:
    images, labels = data()
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.fp32_precision, []

    def loss(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        seen.append(matmul.fp32_precision)
        return F.cross_entropy(model(images), labels)

    matmul.fp32_precision = "tf32"  # which torch.get_float32_matmul_precision does not answer for
    try:
        trained = UnrolledInnerLoop(network(), loss=loss)(images, labels, lr=0.1)
    finally:
        matmul.fp32_precision = before
    trained.params["0.weight"].square().sum().backward()
    assert set(seen) == {"tf32"}
    assert matmul.fp32_precision == before
