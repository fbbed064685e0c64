"""The cross-entropy of classes that are divided among ranks, on one rank that has all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers._torch import TorchDispatchMode, tree_iter
from etflayers.errors import InvalidArgumentError
from etflayers.functional import ClassShard, class_parallel_cross_entropy, code_cross_entropy
from etflayers.nn import FeatureMovingAverage


@dataclass(frozen=True)
class Case:
    num_classes: int = 11  # 6 + 5 or 3 + 3 + 3 + 2
    options: dict[str, Any] | None = None
    bias: bool = False
    canonical: int | None = None  # the width of the features
    edges: tuple[int, ...] = ()
    size: float = 1.0
    dtype: torch.dtype = torch.float32
    atol: float = 1e-6


CASES = {
    "plain": Case(),
    "bias": Case(bias=True),
    "smoothing, in parts": Case(options={"label_smoothing": 0.2, "chunk_size": 2, "scale": 3.0}),
    "sum": Case(options={"reduction": "sum"}, atol=4e-6),
    # Losses of about 9, where one unit in the last place is 1e-6.
    "none": Case(options={"reduction": "none", "label_smoothing": 0.1}, bias=True, atol=2e-6),
    "ignored class": Case(options={"ignore_index": 4}),
    "all ignored": Case(options={"ignore_index": 1}, num_classes=2),
    "ranks without classes": Case(num_classes=5, options={"label_smoothing": 0.1}),
    "fewer classes than ranks": Case(num_classes=2),
    "uneven": Case(edges=(0, 1, 1, 8, 11), options={"label_smoothing": 0.3}),
    "large logits": Case(size=1e3, atol=1e-3),
    "float64": Case(dtype=torch.float64, atol=1e-14),
    # Products that are rounded to 8 bits.
    "bfloat16": Case(dtype=torch.bfloat16, options={"label_smoothing": 0.1}, atol=2e-2),
    "canonical": Case(canonical=13, options={"label_smoothing": 0.2, "scale": 2.0}),
    "canonical, d = K - 1": Case(canonical=10, options={"chunk_size": 2}),
}


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Features, the weight of all classes, the bias and targets, the same on every rank."""
    generator = torch.Generator().manual_seed(len(str(case)))
    width = case.canonical or 5
    features = case.size * torch.randn(2, 4, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(case.num_classes, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(case.num_classes, generator=generator, dtype=torch.float64) if case.bias else None
    targets = torch.tensor([[0, 1, 10, 6], [5, 4, 1, -100]]) % case.num_classes
    ignored = (case.options or {}).get("ignore_index", -100)
    targets[1, 3] = ignored
    if case.num_classes == 2 and ignored == 1:
        targets[:] = 1
    features, weight, *biases = (t.to(case.dtype) for t in (features, weight, bias) if t is not None)
    return features, weight, biases[0] if biases else None, targets


def test_first_derivatives_and_no_second() -> None:
    features, weight, bias, targets = problem(CASES["bias"])
    assert bias is not None
    shard = ClassShard.chunk(11)
    leaves = [t.double().requires_grad_() for t in (features, weight, bias)]

    def loss(f: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return class_parallel_cross_entropy(
            f, w, targets, shard, local_bias=b, label_smoothing=0.1, chunk_size=4, reduction="none"
        )

    assert torch.autograd.gradcheck(loss, leaves)
    with pytest.raises(InvalidArgumentError, match="first derivatives only"):
        torch.autograd.grad(loss(*leaves).sum(), leaves[0], create_graph=True)


class Sizes(TorchDispatchMode):
    """Notes the largest number of entries of a tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_iter(result) if isinstance(t, Tensor))])
        return result


def test_logits_of_all_classes_never_exist() -> None:
    features, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    targets = torch.arange(64)
    with Sizes() as sizes:
        loss = class_parallel_cross_entropy(
            features, weight, targets, ClassShard.chunk(1000), label_smoothing=0.1, chunk_size=50
        )
        loss.backward()
    assert sizes.largest == weight.numel()  # and not 64 * 1000
    with Sizes() as sizes:
        F.cross_entropy(F.linear(features, weight), targets).backward()
    assert sizes.largest == 64 * 1000  # so it sees them


def test_a_nan_comes_through_and_an_ignored_one_does_not() -> None:
    features, weight, _, targets = problem(CASES["plain"])
    features[1, 3] = torch.nan  # ignored
    shard = ClassShard.chunk(11)
    features.requires_grad_()
    loss = class_parallel_cross_entropy(features, weight, targets, shard)
    loss.backward()
    assert loss.isfinite()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    with torch.no_grad():
        features[0, 0] = torch.nan
    assert class_parallel_cross_entropy(features, weight, targets, shard).isnan()


def test_autocast_rounds_the_products_as_it_does_elsewhere() -> None:
    features, weight, _, targets = problem(CASES["plain"])
    features.requires_grad_()
    shard = ClassShard.chunk(11)
    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (
            class_parallel_cross_entropy(features, weight, targets, shard, label_smoothing=0.1),
            code_cross_entropy(features, weight, targets, label_smoothing=0.1),
        ):
            assert loss.dtype == torch.float32
            found.append((loss.detach(), torch.autograd.grad(loss, features)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_a_class_that_a_bias_excludes_has_no_share() -> None:
    features, weight, _, _ = problem(CASES["plain"])
    bias = torch.zeros(11)
    bias[:4] = -torch.inf
    targets = torch.full((2, 4), 7)
    expected = F.cross_entropy((features @ weight.mT + bias).flatten(0, 1), targets.flatten())
    loss = class_parallel_cross_entropy(
        features, weight, targets, ClassShard.chunk(11), local_bias=bias, chunk_size=2
    )
    torch.testing.assert_close(loss, expected)


def test_a_compiled_loss_is_left_to_eager_mode() -> None:
    features, weight, _, targets = problem(CASES["plain"])
    shard = ClassShard.chunk(11)

    def loss(f: Tensor) -> Tensor:
        return class_parallel_cross_entropy(2 * f, weight, targets, shard) + 1

    torch.testing.assert_close(torch.compile(loss, backend="eager")(features), loss(features))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_weight": torch.ones(4, 5)}, r"got \(8, 5\) and \(4, 5\)"),
        ({"local_weight": torch.ones(3, 5).long()}, "local_weight must have a real floating-point dtype"),
        ({"features": torch.ones(8, 5).long()}, "features must have a real floating-point dtype"),
        ({"targets": torch.zeros(7).long()}, "leading shape of features"),
        ({"targets": torch.ones(8, 3) / 3}, "soft targets would be a matrix"),
        ({"targets": torch.full((8,), 3)}, r"class indices in \[0, 3\)"),
        ({"shard": None}, "shard must say which classes"),
        ({"local_bias": torch.ones(5)}, r"local_bias must have shape \(3,\)"),
        ({"scale": 0.0}, "scale"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_bad_arguments_of_the_loss(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.ones(8, 5),
        "local_weight": torch.ones(3, 5),
        "targets": torch.zeros(8).long(),
        "shard": ClassShard.chunk(3),
    }
    with pytest.raises(InvalidArgumentError, match=message):
        class_parallel_cross_entropy(**(arguments | change))


def test_bad_shards() -> None:
    with pytest.raises(InvalidArgumentError, match="0 <= start <= stop <= num_classes = 5, got 4 and 3"):
        ClassShard(5, 4, 3)
    with pytest.raises(InvalidArgumentError, match="got 0 and 6"):
        FeatureMovingAverage(2, 5, class_range=(0, 6))
    average = FeatureMovingAverage(2, 5, class_range=(2, 4))
    with pytest.raises(InvalidArgumentError, match=r"class indices in \[0, 5\)"):
        average(torch.ones(1, 2), torch.tensor([5]))
    with pytest.raises(InvalidArgumentError, match="leave class_range out"):
        average(torch.ones(1, 2), torch.eye(5)[:1])
    assert repr(average).endswith("class_range=(2, 4))")
