import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from etflayers import nearest_etf
from etflayers.adjoints import Implicit
from etflayers.errors import InvalidArgumentError
from etflayers.functional import huber_nearest_etf
from etflayers.geometry import centered_basis_apply, etf_radius, is_simplex_etf, is_stiefel, project_stiefel
from etflayers.nn import HuberNearestETF, MahalanobisNearestETF, StiefelNode
from etflayers.solvers import RiemannianNewton
from etflayers.status import Status
from etflayers.testing import relative_error


class Metric(nn.Module):
    """|(EX - c Q') L|^2 with a parameter L, and a buffer that counts evaluations."""

    def __init__(self, in_features, dtype=torch.float64):
        super().__init__()
        identity = torch.eye(in_features, dtype=dtype)
        self.factor = nn.Parameter(identity + 0.2 * torch.randn(in_features, in_features, dtype=dtype))
        self.register_buffer("evaluations", torch.zeros((), dtype=torch.int64))

    def forward(self, q, means):
        self.evaluations += 1
        coordinates = centered_basis_apply(means)
        gap = coordinates - etf_radius(means.shape[-2]) * q.mT
        return (gap @ self.factor).square().sum((-2, -1))


def distance(q, target):
    return (q - target).square().sum((-2, -1))


def near_identity(batch, dtype=torch.float32):
    return torch.eye(5, 2, dtype=dtype) + 0.2 * torch.randn(batch, 5, 2, dtype=dtype)


def test_the_gradient_reaches_inputs_and_parameters_to_second_order():
    node = StiefelNode(Metric(3), 3, 2, dtype=torch.float64, solver=RiemannianNewton(tolerance=1e-13))
    means = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    node(means)  # from here on near the minimum

    def solve(means, factor):
        return torch.func.functional_call(node.eval(), {"objective.factor": factor}, (means,))

    inputs = (means, node.objective.factor.detach().clone().requires_grad_())
    assert gradcheck(solve, inputs)
    assert gradgradcheck(solve, inputs, fast_mode=True)


def test_buffers_of_the_objective_are_left_alone():
    node = StiefelNode(Metric(4), 4, 2, dtype=torch.float64)
    node(torch.randn(2, 3, 4, dtype=torch.float64)).sum().backward()
    assert int(node.objective.evaluations) == 0
    assert node.objective.factor.grad.isfinite().all()


def test_the_answer_is_a_minimum_for_every_size_of_the_batch():
    node = StiefelNode(distance, 5, 2)
    for batch in (3, 1, 4, 4):
        target = near_identity(batch)
        found = node.solve(target)
        assert found.status is Status.CONVERGED
        assert is_stiefel(found.point).ok
        torch.testing.assert_close(found.point, project_stiefel(target), atol=1e-4, rtol=0)
        assert node.start.shape == (batch, 5, 2)


def test_a_training_pass_is_a_warm_start_and_an_eval_pass_changes_nothing():
    node, target = StiefelNode(distance, 5, 2, dtype=torch.float64), near_identity(2, torch.float64)
    cold = node.eval().solve(target)
    before = node.start.clone()
    node(target)
    assert torch.equal(node.start, before)
    node.train()(target)
    assert node.solve(target).iterations < cold.iterations


def test_a_batch_of_another_size_starts_from_the_first_member():
    """The minimizers of -(q'x)^2 are x and -x: a start at one of them stays there."""
    axis = torch.eye(4, 1, dtype=torch.float64)
    node = StiefelNode(lambda q, x: -(q * x).sum((-2, -1)).square(), 4, 1, dtype=torch.float64)
    node.start = torch.stack((axis, -axis))
    torch.testing.assert_close(node(axis.expand(3, 4, 1)), axis.expand(3, 4, 1))


@pytest.mark.parametrize("gradient", [False, True])
def test_the_answer_is_the_callers_own(gradient):
    node, target = StiefelNode(distance, 5, 2), near_identity(1).requires_grad_(gradient)
    node(target).detach().zero_()
    assert is_stiefel(node.start)


def test_copies_and_checkpoints_carry_the_warm_start():
    node, target = StiefelNode(distance, 5, 2), near_identity(3)
    expected = node(target.requires_grad_())
    fresh = StiefelNode(distance, 5, 2)  # of batch size 1
    fresh.load_state_dict(node.state_dict())
    for other in (copy.deepcopy(node), pickle.loads(pickle.dumps(node)), fresh):
        assert torch.equal(other.start, node.start)
        assert other.solve(target).iterations == 0
        torch.testing.assert_close(other(target), expected)


def test_half_precision():
    node = StiefelNode(distance, 5, 2).bfloat16()
    assert node.start.dtype == torch.float32
    target = near_identity(1).bfloat16().requires_grad_()
    point = node(target)
    point.float().sum().backward()
    assert point.dtype == target.grad.dtype == torch.bfloat16
    assert is_stiefel(node.start).ok
    torch.testing.assert_close(point.float(), project_stiefel(target.detach().float()), atol=0.02, rtol=0)


def test_the_dtype_may_change_between_passes():
    node = StiefelNode(distance, 5, 2)
    target = near_identity(1, torch.float64)
    for _ in range(2):
        point = node(target)
        assert point.dtype == torch.float64
        torch.testing.assert_close(point, project_stiefel(target), atol=1e-9, rtol=0)


# Dynamo looks at .grad of every tensor at which a graph resumes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile_leaves_the_node_to_eager_mode():
    node, target = StiefelNode(distance, 5, 2), near_identity(2).requires_grad_()
    compiled = torch.compile(lambda x: 2 * node(x), backend="eager")
    torch.testing.assert_close(compiled(target), 2 * project_stiefel(target), atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", [torch.tensor(1.0), torch.zeros(0, 5, 2)])
def test_the_first_input_leads_with_the_batch(target):
    with pytest.raises(InvalidArgumentError, match="batch dimension"):
        StiefelNode(distance, 5, 2)(target)


def test_the_generator_decides_where_the_first_solve_starts():
    one, other = (StiefelNode(distance, 5, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.start, other.start)


def test_an_answer_that_is_not_finite_is_no_start():
    node = StiefelNode(distance, 5, 2)
    before = node.start.clone()
    assert node.solve(torch.full((1, 5, 2), math.nan)).status is Status.NON_FINITE
    assert torch.equal(node.start, before)


def test_a_checkpoint_of_another_size_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for start"):
        StiefelNode(distance, 5, 2).load_state_dict(StiefelNode(distance, 4, 2).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_learned_metric_starts_at_the_plain_nearest_etf_and_learns(dtype):
    layer = MahalanobisNearestETF(6, dtype=dtype)
    means = torch.randn(4, 6, dtype=dtype)
    assert relative_error(layer(means), nearest_etf(means)) < 1e-4
    goal = nearest_etf(means @ torch.diag(torch.linspace(0.5, 2, 6, dtype=dtype)))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        loss = (layer(means) - goal).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_layers_copy():
    means = torch.randn(4, 6)
    for layer in (MahalanobisNearestETF(6), HuberNearestETF(threshold=0.4)):
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            torch.testing.assert_close(other(means), layer(means))
        assert is_simplex_etf(layer(means)).ok


def test_the_huber_layer_is_its_function():
    means = torch.randn(2, 4, 6)
    expected = huber_nearest_etf(means.double(), threshold=0.4).float()  # a layer computes in float64
    torch.testing.assert_close(HuberNearestETF(threshold=0.4)(means), expected)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_a_threshold_of_the_huber_layer_is_checked_when_it_is_made(threshold):
    with pytest.raises(InvalidArgumentError, match="threshold must be a finite number > 0"):
        HuberNearestETF(threshold=threshold)


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: MahalanobisNearestETF(6, **options),
        lambda **options: HuberNearestETF(**options),
        lambda **options: StiefelNode(lambda q: q.sum((-2, -1)), 4, 2, **options),
    ],
    ids=["Mahalanobis", "Huber", "node"],
)
def test_a_solver_or_an_adjoint_that_is_none_is_named_where_it_is_given(make):
    with pytest.raises(InvalidArgumentError, match=r"solver must .* got 'newton'"):
        make(solver="newton")
    with pytest.raises(InvalidArgumentError, match=r"adjoint must have a method attach.*the class Implicit"):
        make(adjoint=Implicit)
