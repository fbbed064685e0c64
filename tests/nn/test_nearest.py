"""The nearest head against the formulas of its docstring in numpy, its two gradient paths, and its state."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etflayers.adjoints import Detached
from etflayers.errors import (
    EtfLayersError,
    InvalidArgumentError,
    MissingTargetsError,
    NonFiniteError,
    RecomputationError,
)
from etflayers.geometry import is_simplex_etf, simplex_etf
from etflayers.nn import FeatureMovingAverage, NearestETF, NearestETFHead, provide_targets

IGNORE = -100
Array = npt.NDArray[np.float64]


@dataclass
class Reference:
    """One training pass after another, written from the docstring with loops and one SVD."""

    frame: Array
    scale: float = 1.0
    normalize: bool = False
    momentum: float = 0.1
    center: bool = True
    proximity: float = 1e-3
    anchor: Array | None = None  # None: the frame of the step before
    class_weights: Array | None = None
    means: dict[int, Array] = field(default_factory=dict)

    def __call__(self, features: Array, targets: list[int]) -> Array:
        num_classes, in_features = self.frame.shape
        rows = [row / np.linalg.norm(row) for row in features] if self.normalize else list(features)
        for k in range(num_classes):
            own = [row for row, target in zip(rows, targets, strict=True) if target == k]
            if own and k in self.means:
                self.means[k] = (1 - self.momentum) * self.means[k] + self.momentum * np.mean(own, axis=0)
            elif own:
                self.means[k] = np.mean(own, axis=0)

        weight = np.ones(num_classes) if self.class_weights is None else self.class_weights
        total = sum(weight[k] for k in self.means)
        middle = sum(weight[k] * mean for k, mean in self.means.items()) / total
        linear = np.zeros((num_classes, in_features))
        for k, mean in self.means.items():
            linear[k] = weight[k] * (mean - middle)
        if self.proximity > 0:
            with_weight = [k for k in self.means if weight[k] > 0]
            linear /= np.sqrt(np.mean([np.dot(linear[k], linear[k]) for k in with_weight]))
            linear += self.proximity * (self.frame if self.anchor is None else self.anchor)
        # The ETF with the largest inner product with `linear`: with any basis E of the space orthogonal to 1,
        # the frame c E' polar(E linear).
        basis = np.linalg.svd(np.eye(num_classes) - 1 / num_classes)[0][:, : num_classes - 1].T
        left, _, right = np.linalg.svd(basis @ linear, full_matrices=False)
        self.frame = np.sqrt(num_classes / (num_classes - 1)) * basis.T @ left @ right

        center = np.mean(list(self.means.values()), axis=0) if self.center else np.zeros(in_features)
        return np.array([[self.scale * np.dot(row - center, w) for w in self.frame] for row in rows])


def double_head(in_features: int = 6, num_classes: int = 4, **options: Any) -> NearestETFHead:
    generator = torch.Generator().manual_seed(0)
    return NearestETFHead(in_features, num_classes, generator=generator, dtype=torch.float64, **options)


def stream(
    steps: int, *, classes: list[int], in_features: int = 6, seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(9, in_features, generator=generator, dtype=torch.float64) + 2,
            torch.tensor(classes)[torch.randint(len(classes), (9,), generator=generator)],
        )
        for _ in range(steps)
    ]


WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 3.0], dtype=torch.float64)
ANCHOR = simplex_etf(4, 6, rotation="haar", generator=torch.Generator().manual_seed(7), dtype=torch.float64)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 3.0, "momentum": 0.4},
    {"normalize": True},
    {"center": False},
    {"proximity": 0.0},
    {"proximity": 0.5},
    {"proximity": 0.5, "anchor": "initial"},
    {"proximity": 0.5, "anchor": ANCHOR},
    {"class_weights": WEIGHTS},
    {"class_weights": WEIGHTS, "proximity": 0.0},
    {"class_weights": WEIGHTS, "proximity": 0.5, "momentum": 0.7, "normalize": True},
]


def as_id(options: dict[str, Any]) -> str:
    return (
        "-".join(f"{k}={'tensor' if isinstance(v, Tensor) else v}" for k, v in options.items()) or "default"
    )


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=as_id)
@pytest.mark.parametrize("size", [(6, 4), (4, 4), (3, 4)])
def test_training_agrees_with_the_formulas(options: dict[str, Any], size: tuple[int, int]) -> None:
    in_features, num_classes = size
    if isinstance(options.get("anchor"), Tensor) and in_features != 6:
        options = {**options, "anchor": simplex_etf(num_classes, in_features, dtype=torch.float64)}
    head = double_head(in_features, num_classes, **options)
    numbers: dict[str, Any] = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in options.items()}
    if isinstance(options.get("anchor"), str):
        numbers["anchor"] = head.frame.numpy().copy()
    reference = Reference(frame=head.frame.numpy().copy(), **numbers)

    # Every class from the start where nothing but the data decides (proximity 0), one late and one never
    # else.
    early, late = (
        ([0, 1, 2, 3],) * 2 if options.get("proximity") == 0 else ([0, 1, IGNORE], [0, 1, 2, IGNORE])
    )
    batches = stream(4, classes=early, in_features=in_features, seed=1)
    batches += stream(4, classes=late, in_features=in_features, seed=2)
    for features, targets in batches:
        logits = head(features, targets)
        expected = reference(features.numpy(), targets.tolist())
        np.testing.assert_allclose(logits, expected, atol=1e-9)
        np.testing.assert_allclose(head.frame, reference.frame, atol=1e-9)
    assert is_simplex_etf(head.frame, atol=1e-11)


def test_two_classes(generator: torch.Generator) -> None:
    """For K = 2 the frame is the direction between the means and its opposite."""
    head = NearestETFHead(5, 2, proximity=0.0, generator=generator)
    features = torch.randn(10, 5, generator=generator)
    targets = torch.arange(10) % 2
    head(features, targets)
    direction = F.normalize(features[::2].mean(0) - features[1::2].mean(0), dim=0)
    torch.testing.assert_close(head.frame, torch.stack((direction, -direction)))


def test_eval_works_before_training_and_after_it_uses_the_latest_frame() -> None:
    head = double_head().eval()
    features, targets = stream(1, classes=[0, 1, 2, 3])[0]
    torch.testing.assert_close(head(features), features @ head.frame.T)
    head.train()
    latest = head(features, targets)
    torch.testing.assert_close(head.eval()(features), latest)


@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
def test_the_frame_does_not_depend_on_the_unit_of_the_features(
    magnitude: float, generator: torch.Generator
) -> None:
    """In float32, where the square of 1e20 overflows and that of 1e-20 vanishes."""
    features = torch.randn(20, 6, generator=generator)
    targets = torch.arange(20) % 3  # class 3 is never seen: the proximal term matters
    frames = []
    for factor in (1.0, magnitude):
        head = NearestETFHead(6, 4, proximity=0.5, generator=torch.Generator().manual_seed(0))
        scaled = (factor * features).requires_grad_()
        logits = head(scaled, targets)
        (grad,) = torch.autograd.grad(logits.sum() / factor, scaled)
        assert bool(torch.isfinite(grad).all())
        frames.append(head.frame)
    torch.testing.assert_close(frames[1], frames[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "features",
    [torch.zeros(8, 6), torch.ones(8, 6), torch.eye(6)[torch.arange(8) % 2]],
    ids=["zero", "equal", "two-points"],
)
@pytest.mark.parametrize("proximity", [0.0, 1e-3])
def test_coinciding_means_give_a_frame_and_a_finite_gradient(features: Tensor, proximity: float) -> None:
    head = NearestETFHead(6, 4, proximity=proximity, generator=torch.Generator().manual_seed(0))
    features = features.clone().requires_grad_()
    for _ in range(2):
        logits = head(features, torch.arange(8) % 4)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(8) % 4), features)
        assert bool(torch.isfinite(logits).all() & torch.isfinite(grad).all())
        assert is_simplex_etf(head.frame)


def test_means_that_differ_by_rounding_leave_the_frame_at_the_anchor() -> None:
    """The unit of float32 means is no smaller than their rounding, in whatever dtype they are joined."""
    anchor = simplex_etf(4, 600, rotation="haar", generator=torch.Generator().manual_seed(0))
    means = torch.ones(4, 600)
    means[0, 0] += torch.finfo(torch.float32).eps
    frame = NearestETF()(means, anchor=anchor, proximity=0.5)
    assert float((frame - anchor).norm()) < 0.1
    assert frame.dtype == torch.float32


def test_never_seen_classes_have_no_say_and_ignored_samples_none_either() -> None:
    head, other = double_head(), double_head()
    features, targets = stream(1, classes=[0, 1, 2])[0]
    noise = torch.randn(3, 6, dtype=torch.float64)
    head(features, targets)
    logits = other(torch.cat((features, noise)), torch.cat((targets, torch.full((3,), IGNORE))))
    torch.testing.assert_close(other.frame, head.frame)
    assert logits.shape == (12, 4)  # ignored samples still get logits
    assert head.averages.seen.tolist() == [True, True, True, False]
    without = double_head(ignore_index=2)
    without(features, targets)
    assert without.averages.seen.tolist() == [True, True, False, False]
    expected_center = torch.stack([features[targets == k].mean(0) for k in range(3)]).mean(0)
    torch.testing.assert_close(head.center, expected_center)


def test_a_batch_of_ignored_samples_only_leaves_the_frame_at_the_anchor() -> None:
    head = double_head()
    start = head.frame.clone()
    logits = head(torch.ones(2, 6, dtype=torch.float64), torch.full((2,), IGNORE))
    torch.testing.assert_close(head.frame, start)
    torch.testing.assert_close(logits, start.sum(-1).expand(2, 4))


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=as_id)
def test_gradient_through_both_paths_agrees_with_finite_differences(options: dict[str, Any]) -> None:
    head = double_head(**{"momentum": 0.4, **options})
    # A class unseen only with a strong anchor: with a weak one the map bends too much for finite differences.
    classes = [0, 1, 2] if options.get("proximity") == 0.5 else [0, 1, 2, 3]
    *earlier, (features, targets) = stream(4, classes=classes)
    for batch in earlier:
        head(*batch)
    assert torch.autograd.gradcheck(
        lambda f: copy.deepcopy(head)(f, targets), features.requires_grad_(), rtol=1e-5, atol=1e-7
    )


def gradient(head: NearestETFHead, features: Tensor, targets: Tensor, cotangent: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(head(features, targets), features, cotangent)
    return grad


def test_detach_cuts_exactly_the_second_path(generator: torch.Generator) -> None:
    attached = double_head(scale=2.0, momentum=0.4)
    attached(*stream(1, classes=[0, 1, 2, 3])[0])
    detached = copy.deepcopy(attached)
    detached.detach = True
    features, targets = stream(1, classes=[0, 1, 2, 3], seed=5)[0]
    features.requires_grad_()
    cotangent = torch.randn(9, 4, generator=generator, dtype=torch.float64)

    both = gradient(attached, features, targets, cotangent)
    first = gradient(detached, features, targets, cotangent)

    for name, tensor in attached.state_dict().items():  # forward, detaching changes nothing
        torch.testing.assert_close(detached.state_dict()[name], tensor, rtol=0, atol=1e-14)
    # What is left is the gradient with frame and center held constant ...
    torch.testing.assert_close(first, 2 * cotangent @ attached.frame, rtol=0, atol=1e-12)
    # ... and what was cut is the gradient of the logits of constant features by way of frame and center.
    constant = features.detach()
    step = 1e-6 * torch.randn(9, 6, generator=generator, dtype=torch.float64)

    def frame_path(moved: Tensor) -> Tensor:
        """<cotangent, logits> of the constant features, with frame and center from ``moved``."""
        head = double_head(scale=2.0, momentum=0.4)
        head(*stream(1, classes=[0, 1, 2, 3])[0])
        head(moved, targets)
        logits: Tensor = head.eval()(constant)
        return (cotangent * logits).sum()

    slope = (frame_path(constant + step) - frame_path(constant - step)) / 2
    torch.testing.assert_close(((both - first) * step).sum(), slope, rtol=1e-6, atol=0)
    assert slope.abs() > 1e-7


def test_the_adjoint_is_that_of_the_frame(generator: torch.Generator) -> None:
    head = double_head(scale=2.0, center=False, adjoint=Detached())
    features, targets = stream(1, classes=[0, 1, 2, 3])[0]
    cotangent = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    found = gradient(head, features.requires_grad_(), targets, cotangent)
    torch.testing.assert_close(found, 2 * cotangent @ head.frame)


def test_two_passes_and_an_eval_pass_before_one_backward() -> None:
    head = double_head()
    batches = stream(3, classes=[0, 1, 2, 3])
    separate = copy.deepcopy(head)
    separate_grads = []
    for features, targets in batches:
        f = features.clone().requires_grad_()
        separate(f, targets).square().sum().backward()
        separate_grads.append(f.grad)
    in_eval = [f.clone().requires_grad_() for f, _ in batches]

    inputs, losses = [], []
    for (features, targets), evaluated in zip(batches, in_eval, strict=True):
        losses.append(head.eval()(evaluated).sum())
        inputs.append(features.clone().requires_grad_())
        losses.append(head.train()(inputs[-1], targets).square().sum())
    torch.autograd.backward(losses)

    for ours, expected in zip(inputs, separate_grads, strict=True):
        torch.testing.assert_close(ours.grad, expected)


def test_the_second_derivative_exists() -> None:
    head = double_head(momentum=0.4, proximity=0.5)
    head(*stream(1, classes=[0, 1, 2, 3])[0])
    features, targets = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.arange(4)
    assert torch.autograd.gradgradcheck(
        lambda f: copy.deepcopy(head)(f, targets), features, rtol=1e-4, atol=1e-6
    )


# --- state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=as_id)
def test_everything_that_matters_is_in_the_state_dict(options: dict[str, Any]) -> None:
    head = double_head(**options)
    for batch in stream(3, classes=[0, 1, 2]):
        head(*batch)
    other = NearestETFHead(6, 4, generator=torch.Generator().manual_seed(99), dtype=torch.float64, **options)
    other.load_state_dict(head.state_dict())
    for features, targets in stream(3, classes=[0, 1, 2, 3], seed=9):
        assert torch.equal(other(features, targets), head(features, targets))
        assert torch.equal(other.eval()(features), head.eval()(features))
        head.train(), other.train()


def test_given_tensors_are_copied() -> None:
    anchor, weights = ANCHOR.clone(), WEIGHTS.clone()
    head = double_head(anchor=anchor, class_weights=weights)
    anchor.zero_(), weights.zero_()
    assert torch.equal(head.frame, ANCHOR)
    assert torch.equal(head.anchor, ANCHOR)
    assert torch.equal(head.class_weights, WEIGHTS)


def test_no_grad_training_still_follows_the_batch() -> None:
    head, reference = double_head(), double_head()
    features, targets = stream(1, classes=[0, 1, 2, 3])[0]
    with torch.no_grad():
        head(features, targets)
    reference(features, targets)
    assert torch.equal(head.frame, reference.frame)


def test_a_process_group_does_not_stop_copies_and_pickles() -> None:
    head = double_head(process_group=(lambda: None))  # like a group, cannot be pickled
    assert pickle.loads(pickle.dumps(head)).averages.process_group is None
    assert copy.deepcopy(head).averages.process_group is None
    assert head.averages.process_group is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_gradient_checkpointing_around_the_head_is_refused(use_reentrant: bool, detach: bool) -> None:
    """Run again, the pass starts from the averages after it: the gradient was 12% wrong, in silence."""
    head = double_head(detach=detach)
    body = nn.Linear(6, 6, dtype=torch.float64)
    features, targets = stream(1, classes=[0, 1, 2, 3])[0]
    features.requires_grad_()

    logits = checkpoint(lambda f: head(body(f), targets), features, use_reentrant=use_reentrant)
    updates = head.averages.updates.clone()
    with pytest.raises(RecomputationError, match=r"outside of torch.utils.checkpoint"):
        logits.sum().backward()
    assert torch.equal(head.averages.updates, updates)

    # The body may be inside, and in eval mode the head as well.
    head(checkpoint(body, features, use_reentrant=use_reentrant), targets).sum().backward()
    head.eval()
    expected = torch.autograd.grad(head(body(features)).sum(), features)[0]
    features.grad = None
    checkpoint(lambda f: head(body(f)), features, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(features.grad, expected)


def test_an_average_by_itself_is_not_run_twice_either() -> None:
    average = FeatureMovingAverage(6, 4)
    features = torch.randn(8, 6, requires_grad=True)
    means = checkpoint(average, features, torch.arange(8) % 4, use_reentrant=False)
    with pytest.raises(RecomputationError):
        means.sum().backward()


def test_closures_that_run_the_pass_several_times_a_step() -> None:
    """L-BFGS evaluates its closure many times; each is a training pass of its own with its own gradient."""
    head, body = double_head(), nn.Linear(6, 6, dtype=torch.float64)
    features, targets = stream(1, classes=[0, 1, 2, 3])[0]
    optimizer = torch.optim.LBFGS(body.parameters(), max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(body(features), targets), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert int(head.averages.updates[0]) > 1


# --- bad input --------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("features", "targets", "error", "message"),
    [
        (
            torch.ones(4, 6),
            None,
            MissingTargetsError,
            r"needs targets in training: call head\(features, targets\)",
        ),
        (torch.ones(4, 5), LABELS, InvalidArgumentError, r"features must have shape .* got \(4, 5\)"),
        (torch.ones(4, 6), LABELS[:3], InvalidArgumentError, r"targets must have .* \(4,\), got \(3,\)"),
        (
            torch.ones(4, 6),
            LABELS[:, None],
            InvalidArgumentError,
            r"targets must have .* \(4,\), got \(4, 1\)",
        ),
        (torch.ones(4, 6), LABELS + 1, InvalidArgumentError, r"got 4 \(1 of 4 out of range\)"),
        (torch.ones(4, 6), LABELS - 1, InvalidArgumentError, r"got -1 \(1 of 4 out of range\)"),
        (torch.ones(4, 6), F.one_hot(LABELS), InvalidArgumentError, "targets must have"),
        (torch.ones(4, 6), LABELS.double(), InvalidArgumentError, "targets must be integers"),
        (torch.eye(4, 6) / torch.eye(4, 6), LABELS, NonFiniteError, "got 20 NaN or infinite values among 24"),
        (torch.full((4, 6), 1e38), LABELS, NonFiniteError, "small enough to be summed"),
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_bad_input_is_named_before_anything_changes(
    features: Tensor, targets: Tensor | None, error: type[EtfLayersError], message: str, started: bool
) -> None:
    head = NearestETFHead(6, 4)
    if started:
        head(torch.randn(8, 6), LABELS.repeat(2))
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(error, match=message):
        head(features, targets)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_nothing_changes_if_the_solver_fails() -> None:
    class Failing:
        def solve(self, linear: Any, precision: Any = None) -> Any:
            raise NonFiniteError("from the solver")

    head = NearestETFHead(6, 4, solver=Failing())
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(NonFiniteError, match="from the solver"):
        head(torch.randn(4, 6), LABELS)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proximity": -1.0}, "proximity must be a finite number >= 0, got -1.0"),
        ({"proximity": float("inf")}, "proximity must be a finite number"),
        ({"proximity": "1"}, "proximity must be a finite number >= 0, got '1'"),
        ({"proximity": True}, "proximity must be a finite number >= 0, got True"),
        ({"momentum": 2.0}, "momentum must be"),
        ({"momentum": True}, "momentum must be a number in .* got True"),
        ({"detach": "False"}, "detach must be True or False, got 'False'"),
        ({"center": None}, "center must be True or False, got None"),
        ({"synchronize": 1}, "synchronize must be True or False, got 1"),
        ({"ignore_index": 1.5}, "ignore_index must be an integer, got 1.5"),
        ({"class_weights": torch.ones(4) + 0j}, "class_weights must have a real floating-point dtype"),
        ({"anchor": "none"}, "anchor must be 'previous', 'initial' or a tensor, got 'none'"),
        ({"anchor": torch.eye(4)}, r"anchor must have shape \(num_classes, in_features\) = \(4, 6\)"),
        ({"anchor": torch.eye(4, 6)}, "anchor must be a simplex ETF, but inner products"),
        ({"class_weights": torch.ones(3)}, r"class_weights must have shape \(num_classes,\) = \(4,\)"),
        ({"class_weights": torch.tensor([1.0, -1, 1, 1])}, "class_weights must be finite, not negative"),
        ({"class_weights": torch.tensor([1.0, torch.inf, 1, 1])}, "class_weights must be finite"),
        ({"class_weights": torch.zeros(4)}, "class_weights must be finite, not negative and not all zero"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        NearestETFHead(6, 4, **options)


# --- targets for an unchanged model -----------------------------------------------------------------------


def test_compiled_training_reads_new_targets_in_every_pass() -> None:
    model, eager = (nn.Sequential(nn.Flatten(), NearestETFHead(6, 4)) for _ in range(2))
    eager.load_state_dict(model.state_dict())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        features, targets = torch.randn(8, 2, 3), torch.arange(seed, seed + 8) % 4
        with provide_targets(model, targets):
            logits = compiled(features)
        with provide_targets(eager, targets):
            torch.testing.assert_close(logits, eager(features), rtol=1e-5, atol=1e-5)


def test_bad_targets_are_noticed_in_compiled_training() -> None:
    compiled = torch.compile(NearestETFHead(6, 4), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="targets must be class indices"):
        compiled(torch.randn(4, 6), LABELS + 1)
