"""Running class means against a slow loop of the definition."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from etflayers.errors import EtfLayersError, InvalidArgumentError, MissingTargetsError, NonFiniteError
from etflayers.nn import FeatureMovingAverage
from etflayers.nn.averages import Momentum

IGNORE = -100
MOMENTA: list[Momentum] = [0.1, 0.9, 1, None, "2/(t+1)"]


class LoopAverage:
    """The definition, class by class and sample by sample."""

    def __init__(self, num_classes: int, in_features: int, momentum: Momentum) -> None:
        self.momentum = momentum
        self.means = np.zeros((num_classes, in_features))
        self.samples: list[list[npt.NDArray[np.float64]]] = [[] for _ in range(num_classes)]
        self.updates = [0] * num_classes

    def update(self, features: Tensor, targets: Tensor) -> None:
        rows = features.double().numpy()
        for k, samples in enumerate(self.samples):
            new = [row for row, target in zip(rows, targets.tolist(), strict=True) if target == k]
            if not new:
                continue
            first = not samples
            samples.extend(new)
            self.updates[k] += 1
            batch_mean = np.mean(new, axis=0)
            if self.momentum is None:
                self.means[k] = np.mean(samples, axis=0)
            elif first:
                self.means[k] = batch_mean
            elif isinstance(self.momentum, str):
                alpha = max(2 / (self.updates[k] + 1), 1e-4)
                self.means[k] = alpha * batch_mean + (1 - alpha) * self.means[k]
            else:
                self.means[k] = self.momentum * batch_mean + (1 - self.momentum) * self.means[k]


def stream(
    steps: int, seed: int = 0, num_classes: int = 5, in_features: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """Batches with absent, ignored and late classes; the last class never occurs."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(steps):
        size = int(torch.randint(1, 8, (), generator=generator))
        features = torch.randn(size, in_features, generator=generator, dtype=torch.float64) + step
        targets = torch.randint(num_classes - 1 if step > 3 else 2, (size,), generator=generator)
        targets[torch.rand(size, generator=generator) < 0.2] = IGNORE
        batches.append((features, targets))
    return batches


@pytest.mark.parametrize("momentum", MOMENTA)
def test_agrees_with_the_definition(momentum: Momentum) -> None:
    average = FeatureMovingAverage(3, 5, momentum=momentum, dtype=torch.float64)
    loop = LoopAverage(5, 3, momentum)
    for features, targets in stream(30):
        means = average(features, targets)
        loop.update(features, targets)
        np.testing.assert_allclose(means, loop.means, atol=1e-12)
        assert torch.equal(average.means, means)
    assert average.updates.tolist() == loop.updates
    assert average.counts.tolist() == [len(samples) for samples in loop.samples]
    assert average.seen.tolist() == [True] * 4 + [False]
    assert average.means[4].tolist() == [0.0] * 3


def test_the_published_schedule_stops_at_its_floor() -> None:
    average = FeatureMovingAverage(1, 1, momentum="2/(t+1)", dtype=torch.float64)
    average(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0]))
    average.updates.fill_(1_000_000)
    means = average(torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]))
    assert means.item() == pytest.approx(1e-4, rel=1e-9)


def test_the_cumulative_mean_does_not_depend_on_the_batching() -> None:
    features = torch.cat([f for f, _ in stream(20)])
    targets = torch.cat([t for _, t in stream(20)])
    whole, parts = (FeatureMovingAverage(3, 5, momentum=None, dtype=torch.float64) for _ in range(2))
    whole(features, targets)
    for f, t in stream(20):
        parts(f, t)
    torch.testing.assert_close(parts.means, whole.means, rtol=0, atol=1e-12)
    assert torch.equal(parts.counts, whole.counts)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_gradient_reaches_the_batch_and_not_the_past(momentum: Momentum) -> None:
    average = FeatureMovingAverage(3, 5, momentum=momentum, dtype=torch.float64)
    batches = stream(8)
    earlier = []
    for features, targets in batches[:-1]:
        earlier.append(features.requires_grad_())
        average(features, targets)
    features, targets = batches[-1]

    assert torch.autograd.gradcheck(
        lambda f: copy.deepcopy(average)(f, targets), features.clone().requires_grad_()
    )
    average(features.requires_grad_(), targets).sum().backward()
    assert all(past.grad is None for past in earlier)
    assert not average.means.requires_grad


def test_eval_returns_the_stored_means_and_changes_nothing() -> None:
    average = FeatureMovingAverage(3, 5)
    average(*[tensor.float() if tensor.is_floating_point() else tensor for tensor in stream(1)[0]])
    average.eval()
    before = copy.deepcopy(average.state_dict())
    features = torch.full((2, 3), torch.nan)
    for means in (average(features), average(features, torch.tensor([0, 1]))):
        assert torch.equal(means, before["means"])
        means.zero_()  # the caller's own tensor
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.state_dict().items())


def test_no_grad_training_still_updates_as_batch_norm_does() -> None:
    average = FeatureMovingAverage(1, 2)
    with torch.no_grad():
        average(torch.ones(1, 1), torch.tensor([0]))
    assert average.means.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("momentum", MOMENTA)
def test_reset_parameters_forgets_everything(momentum: Momentum) -> None:
    average, fresh = (FeatureMovingAverage(3, 5, momentum=momentum, dtype=torch.float64) for _ in range(2))
    for features, targets in stream(5):
        average(features, targets)
    average.reset_parameters()
    for features, targets in stream(2):
        torch.testing.assert_close(average(features, targets), fresh(features, targets), rtol=0, atol=0)
    torch.testing.assert_close(average.state_dict(), fresh.state_dict(), rtol=0, atol=0)


def test_two_passes_before_one_backward() -> None:
    average = FeatureMovingAverage(2, 2, momentum=0.5)
    targets = torch.tensor([0, 1])
    one, two = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    (average(one, targets).square().sum() + average(two, targets).square().sum()).backward()
    assert one.grad is not None
    assert two.grad is not None
    assert one.grad.tolist() == [[2.0, 2.0]] * 2  # d/dx of (x)^2 at 1, step 1
    assert two.grad.tolist() == [[1.0, 1.0]] * 2  # d/dx of (x/2 + 1/2)^2 at 1, step 1/2


def test_another_target_may_be_the_ignored_one() -> None:
    average = FeatureMovingAverage(1, 2, ignore_index=1)
    average(torch.tensor([[2.0], [4.0]]), torch.tensor([0, 1]))
    assert average.means.tolist() == [[2.0], [0.0]]


def test_leading_dimensions_are_flattened() -> None:
    cube, flat = (FeatureMovingAverage(3, 4) for _ in range(2))
    features, targets = torch.randn(2, 5, 3), torch.randint(4, (2, 5))
    torch.testing.assert_close(cube(features, targets), flat(features.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversion_to_half_keeps_every_bit_of_the_state(dtype: torch.dtype) -> None:
    average = FeatureMovingAverage(3, 5)
    for features, targets in stream(5):
        average(features.float(), targets)
    before = copy.deepcopy(average.state_dict())

    average = average.to(dtype)

    for name, tensor in average.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert average(torch.ones(1, 3, dtype=dtype), torch.tensor([0])).dtype == torch.float32
    assert FeatureMovingAverage(3, 5, dtype=dtype).means.dtype == torch.float32
    assert average.double().means.dtype == torch.float64
    assert average.to("meta").means.device.type == "meta"


def test_state_dict_deepcopy_and_pickle_continue_alike() -> None:
    average = FeatureMovingAverage(3, 5, momentum="2/(t+1)", dtype=torch.float64)
    for features, targets in stream(10):
        average(features, targets)
    loaded = FeatureMovingAverage(3, 5, momentum="2/(t+1)", dtype=torch.float64)
    loaded.load_state_dict(average.state_dict())
    copies = [loaded, copy.deepcopy(average), pickle.loads(pickle.dumps(average))]
    features, targets = stream(1, seed=1)[0]
    expected = average(features, targets)
    for other in copies:
        assert torch.equal(other(features, targets), expected)
        assert torch.equal(other.updates, average.updates)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_compiles_as_one_graph(momentum: Momentum) -> None:
    eager, average = (FeatureMovingAverage(3, 5, momentum=momentum, dtype=torch.float64) for _ in range(2))
    compiled = torch.compile(average, fullgraph=True, backend="aot_eager")
    features, targets = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, IGNORE, 1])
    for _ in range(3):
        torch.testing.assert_close(compiled(features, targets), eager(features, targets))
    assert torch.equal(average.updates, eager.updates)


LABELS = torch.tensor([0, 1, 1, 4])


@pytest.mark.parametrize(
    ("features", "targets", "error", "message"),
    [
        (
            torch.ones(4, 3),
            None,
            MissingTargetsError,
            r"needs targets in training: call average\(features, targets\)",
        ),
        (
            torch.ones(4, 2),
            LABELS,
            InvalidArgumentError,
            r"features must have shape .* \(..., 3\), got \(4, 2\)",
        ),
        (torch.ones(4, 6), LABELS, InvalidArgumentError, r"features must have .* \(..., 3\), got \(4, 6\)"),
        (torch.ones(4, 3), LABELS[:2], InvalidArgumentError, r"targets must have .* \(4,\), got \(2,\)"),
        (torch.ones(4, 3), LABELS + 1, InvalidArgumentError, r"\[0, 5\) .* got 5 \(1 of 4 out of range\)"),
        (torch.ones(4, 3), LABELS.float(), InvalidArgumentError, "targets must be integers"),
        (torch.ones(4, 3) / 0, LABELS, NonFiniteError, "features must be finite.* got 12 NaN or infinite"),
        (torch.full((4, 3), 1e38), LABELS, NonFiniteError, "small enough to be summed"),
    ],
)
def test_bad_input_is_named_before_anything_changes(
    features: Tensor, targets: Tensor | None, error: type[EtfLayersError], message: str
) -> None:
    average = FeatureMovingAverage(3, 5)
    average(torch.randn(4, 3), LABELS)
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(error, match=message):
        average(features, targets)
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.state_dict().items())


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.1, float("nan"), "3/(t+2)", (0.1,)])
def test_unknown_momentum_is_named(momentum: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="momentum must be a number in"):
        FeatureMovingAverage(3, 5, momentum=momentum)


@pytest.mark.parametrize(("size", "message"), [((0, 5), "in_features"), ((3, 0), "num_classes")])
def test_bad_sizes_are_named(size: tuple[int, int], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{message} must be at least 1, got 0"):
        FeatureMovingAverage(*size)
