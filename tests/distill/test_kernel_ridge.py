import copy
import math

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from etflayers.distill import (
    FeatureKernel,
    KernelRidgeInnerLoop,
    LinearKernel,
    NNGPKernel,
    NTKKernel,
    RBFKernel,
    centered_one_hot,
    kernel_ridge,
    solve_labels,
)
from etflayers.errors import InvalidArgumentError, NonFiniteError

KERNELS = [LinearKernel(bias_variance=0.5), RBFKernel(2.0), NNGPKernel(1), NTKKernel(2, bias_variance=0.1)]


def problem(inputs=12, support=5, classes=3, dtype=torch.float64):
    return (
        torch.randn(inputs, 2, 2, dtype=dtype),
        torch.randn(support, 2, 2, dtype=dtype),
        torch.randn(support, classes, dtype=dtype),
    )


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("ridge", [1e-6, 0.3])
def test_agrees_with_scikit_learn(kernel, ridge):
    x, s, y = problem()
    gram = kernel(s, s)
    peer = KernelRidge(alpha=ridge * gram.trace().item() / len(s), kernel="precomputed")
    expected = peer.fit(gram.numpy(), y.numpy()).predict(kernel(x, s).numpy())
    # Backward stability: an error of some eps times the condition number, at most n / ridge.
    rtol = 1e-15 * len(s) / ridge + 1e-12
    ours = kernel_ridge(x, s, y, kernel=kernel, ridge=ridge)
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_derivatives(kernel):
    x, s, y = (tensor.requires_grad_() for tensor in problem(2, 3, 2))

    def predict(x, s, y):
        return kernel_ridge(x, s, y, kernel=kernel, ridge=0.1)

    assert gradcheck(predict, (x, s, y))
    assert gradgradcheck(predict, (x, s, y))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_derivatives_where_the_support_is_real_data(kernel):
    x, _, y = problem(3, 2, 2)
    s = x[:2].clone().requires_grad_()
    # Where samples meet, the kernel of tangents has a cone: see the tests of the kernels.
    assert gradcheck(lambda s: kernel_ridge(x, s, y, kernel=kernel, ridge=0.1), (s,), eps=1e-5, atol=1e-4)


def test_does_not_depend_on_the_scale_of_the_kernel():
    x, s, y = problem()
    torch.testing.assert_close(
        kernel_ridge(10 * x, 10 * s, y, kernel=NTKKernel(), ridge=0.1),
        kernel_ridge(x, s, y, kernel=NTKKernel(), ridge=0.1),
    )


def test_a_vanishing_ridge_interpolates():
    _, s, y = problem()
    torch.testing.assert_close(kernel_ridge(s, s, y, kernel=RBFKernel(1.0), ridge=0.0), y)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_solved_labels_are_optimal(kernel):
    x, s, _ = problem(inputs=40)
    targets = centered_one_hot(torch.arange(40) % 3, 3, dtype=torch.float64)
    labels = solve_labels(x, targets, s, kernel=kernel, ridge=1e-3).requires_grad_()

    def loss(labels):
        return (kernel_ridge(x, s, labels, kernel=kernel, ridge=1e-3) - targets).square().sum()

    best = loss(labels)
    (gradient,) = torch.autograd.grad(best, labels)
    assert gradient.abs().max() <= 1e-9 * best
    for _ in range(10):
        assert loss(labels + 0.1 * torch.randn_like(labels)) > best


def test_solved_labels_of_equally_good_ones_are_the_smallest():
    # More labels than targets: what one label does to the few targets another can undo.
    x, s, _ = problem(inputs=3, support=5)
    targets = torch.randn(3, 2, dtype=torch.float64)
    labels = solve_labels(x, targets, s, kernel=RBFKernel(2.0), ridge=0.1)
    predict = kernel_ridge(x, s, torch.eye(5, dtype=torch.float64), kernel=RBFKernel(2.0), ridge=0.1)
    torch.testing.assert_close(predict @ labels, targets)
    _, _, directions = torch.linalg.svd(predict)
    assert (directions[3:] @ labels).abs().max() < 1e-10


def test_solved_labels_are_differentiable():
    x, s, _ = problem(6, 3, 2)
    targets = torch.randn(6, 2, dtype=torch.float64)
    arguments = tuple(tensor.requires_grad_() for tensor in (x, targets, s))
    assert gradcheck(lambda x, t, s: solve_labels(x, t, s, kernel=NTKKernel(), ridge=0.1), arguments)


def test_the_gradient_at_the_best_labels_needs_none_through_them():
    x, s, _ = problem(inputs=20)
    targets = torch.randn(20, 2, dtype=torch.float64)
    s.requires_grad_()
    options = {"kernel": NTKKernel(), "ridge": 0.01}
    labels = solve_labels(x, targets, s, **options)
    through, around = (
        torch.autograd.grad(
            (kernel_ridge(x, s, y, **options) - targets).square().sum(), s, retain_graph=True
        )[0]
        for y in (labels, labels.detach())
    )
    torch.testing.assert_close(through, around)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    x, s, y = problem(dtype=dtype)
    expected = kernel_ridge(x.double(), s.double(), y.double(), kernel=NTKKernel(), ridge=0.01)
    predictions = kernel_ridge(x, s, y, kernel=NTKKernel(), ridge=0.01)
    assert predictions.dtype == dtype
    torch.testing.assert_close(predictions, expected.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = kernel_ridge(x.float(), s.float(), y.float(), kernel=NTKKernel(), ridge=0.01)
    torch.testing.assert_close(single, expected.float())


def test_float32_can_be_asked_for():
    x, s, y = problem(dtype=torch.float32)
    expected = kernel_ridge(x, s, y, kernel=NTKKernel(), ridge=0.1)
    single = kernel_ridge(x, s, y, kernel=NTKKernel(), ridge=0.1, dtype=torch.float32)
    # The condition number is at most n / ridge = 50, and eps = 1.2e-7.
    torch.testing.assert_close(single, expected, rtol=5e-5, atol=5e-5)
    assert not torch.equal(single, expected)


@pytest.mark.parametrize(("ridge", "dtype"), [(0.0, torch.float64), (1e-9, torch.float32)])
def test_says_so_when_the_system_is_singular(ridge, dtype):
    x, s, y = problem()
    s[1] = s[0]
    with pytest.raises(InvalidArgumentError, match="take a ridge above"):
        kernel_ridge(x, s, y, kernel=NTKKernel(), ridge=ridge, dtype=dtype)
    enough = kernel_ridge(x, s, y, kernel=NTKKernel(), ridge=1e-9)
    assert enough.isfinite().all()


def test_says_so_when_the_kernel_is_no_kernel():
    x, s, y = problem()
    with pytest.raises(InvalidArgumentError, match="not positive definite"):
        kernel_ridge(x, s, y, kernel=lambda a, b: -LinearKernel()(a, b))


def test_a_singular_system_inside_a_transform_is_nan_not_garbage():
    x, s, y = problem()
    repeated = s.clone()
    repeated[1] = repeated[0]
    options = {"kernel": NTKKernel(), "ridge": 1e-9, "dtype": torch.float32}
    good, bad = torch.func.vmap(lambda s: kernel_ridge(x, s, y, **options))(torch.stack((s, repeated)))
    torch.testing.assert_close(good, kernel_ridge(x, s, y, **options), rtol=1e-3, atol=1e-3)
    assert bad.isnan().all()


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_what_is_not_finite(place, value):
    arguments = problem()
    arguments[place][0] = value
    with pytest.raises(NonFiniteError, match=("inputs", "support", "labels")[place]):
        kernel_ridge(*arguments, kernel=LinearKernel(), ridge=0.1)


X, S, Y = torch.zeros(4, 3), torch.ones(2, 3), torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_ridge(X, S, torch.tensor([0, 1]), kernel=LinearKernel()), "centered_one_hot"),
        (lambda: kernel_ridge(X, S, Y[:1], kernel=LinearKernel()), "one row for each of the 2"),
        (lambda: kernel_ridge(X, S[:, :2], Y, kernel=LinearKernel()), "samples of one shape"),
        (lambda: kernel_ridge(X, S[:0], Y[:0], kernel=LinearKernel()), "at least one sample"),
        (lambda: kernel_ridge(X.long(), S, Y, kernel=LinearKernel()), "floating-point"),
        (lambda: kernel_ridge(X, S, Y, kernel=LinearKernel(), ridge=-1.0), "ridge"),
        (lambda: kernel_ridge(X, S, Y, kernel=LinearKernel(), dtype=torch.float16), "float32 or"),
        (lambda: solve_labels(X, Y, S, kernel=LinearKernel()), "one row for each of the 4"),
        (lambda: KernelRidgeInnerLoop(LinearKernel(), ridge=math.nan), "ridge"),
        (lambda: KernelRidgeInnerLoop(LinearKernel(), dtype=torch.bfloat16), "float32 or"),
        (lambda: centered_one_hot(torch.tensor([3]), 3), "num_classes"),
        (lambda: centered_one_hot(torch.tensor([0.0]), 3), "integers"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def test_centered_one_hot_sums_to_zero():
    vectors = centered_one_hot(torch.arange(6).view(2, 3) % 4, 4)
    assert vectors.shape == (2, 3, 4)
    torch.testing.assert_close(vectors.sum(-1), torch.zeros(2, 3))
    assert torch.equal(vectors.argmax(-1), torch.arange(6).view(2, 3) % 4)


def test_module_is_the_function():
    x, s, y = problem()
    module = KernelRidgeInnerLoop(NTKKernel(2), ridge=0.01)
    assert torch.equal(module(x, s, y), kernel_ridge(x, s, y, kernel=NTKKernel(2), ridge=0.01))
    targets = torch.randn(len(x), 2, dtype=torch.float64)
    expected = solve_labels(x, targets, s, kernel=NTKKernel(2), ridge=0.01)
    assert torch.equal(module.solve_labels(x, targets, s), expected)
    assert "NTKKernel(depth=2" in repr(module)


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    x, s, y = problem()
    module = KernelRidgeInnerLoop(NTKKernel(), ridge=0.01)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    gradients = []
    for predict in (module, compiled):
        support = s.clone().requires_grad_()
        predict(x, support, y).square().sum().backward()
        gradients.append(support.grad)
    torch.testing.assert_close(*gradients)


def test_module_owns_the_network_of_its_kernel():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Dropout(0.5))
    module = KernelRidgeInnerLoop(FeatureKernel(network), ridge=0.1).eval()
    assert not network.training
    assert set(module.state_dict()) == {"features.1.weight", "features.1.bias"}
    x, s, y = problem(dtype=torch.float32)
    twin = copy.deepcopy(module).double()
    # Features of a float32 network carry its rounding; the regression after them runs in float64.
    torch.testing.assert_close(module(x, s, y), twin(x, s, y), rtol=1e-4, atol=1e-5)
    module(x, s, y).sum().backward()
    assert network[1].weight.grad.norm() > 0


def test_learned_support_beats_the_one_it_started_from():
    # Two rings: a linear classifier fails, and so do two samples that were not learned.
    angles = torch.rand(200) * 2 * math.pi
    radii = 1 + torch.arange(200) % 2
    x = (radii * torch.stack((angles.cos(), angles.sin()))).T
    targets = centered_one_hot(torch.arange(200) % 2, 2)
    inner_loop = KernelRidgeInnerLoop(RBFKernel(1.0), ridge=1e-3)
    support = x[:4].clone().requires_grad_()
    labels = targets[:4].clone().requires_grad_()
    optimizer = torch.optim.Adam([support, labels], lr=0.05)

    def step():
        optimizer.zero_grad()
        loss = (inner_loop(x, support, labels) - targets).square().mean()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(step) for _ in range(60)]
    assert losses[-1] < losses[0] / 2
