"""The cross-entropy from features against the head and ``F.cross_entropy``."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from etflayers import (
    ClassMeanHead,
    CodeHead,
    ETFCrossEntropy,
    FixedETFHead,
    LearnedETFHead,
    NearestETFHead,
    UnitRowHead,
)
from etflayers.errors import InvalidArgumentError, MissingTargetsError

IGNORE = -100
HEADS = {
    "canonical": lambda **o: FixedETFHead(6, 4, rotation="canonical", scale=2.0, **o),
    "canonical, d = K - 1": lambda **o: FixedETFHead(6, 7, scale=2.0, **o),
    "haar": lambda **o: FixedETFHead(6, 4, rotation="haar", scale=2.0, **o),
    "learned": lambda **o: LearnedETFHead(6, 4, scale=2.0, **o),
    "nearest": lambda **o: NearestETFHead(6, 4, scale=2.0, momentum=0.3, **o),
    "class means": lambda **o: ClassMeanHead(6, 9, scale=2.0, momentum=0.3, detach=False, **o),
    "unit rows": lambda **o: UnitRowHead(6, 4, scale=2.0, **o),
}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> CodeHead:
    torch.manual_seed(0)
    made: CodeHead = HEADS[request.param](dtype=torch.float64, normalize=True)
    return made


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 1, 2, 3, IGNORE, 1, 1, IGNORE, 0])
    return torch.randn(9, 6, generator=generator, dtype=torch.float64).to(dtype), targets


def gradients(loss: Tensor, features: Tensor, head: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [features, *head.parameters()]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_gradients_and_state_are_those_of_the_head(
    head: CodeHead, training: bool, reduction: Any
) -> None:
    features, targets = problem()
    features.requires_grad_()
    twin = copy.deepcopy(head).train(training)
    criterion = ETFCrossEntropy(head, label_smoothing=0.1, reduction=reduction, chunk_size=4).train(training)
    for _ in range(2):
        loss = criterion(features, targets)
        expected = F.cross_entropy(twin(features, targets), targets, label_smoothing=0.1, reduction=reduction)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            gradients(loss, features, head), gradients(expected, features, twin), rtol=1e-9, atol=1e-12
        )
    torch.testing.assert_close(head.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_another_target_may_be_the_ignored_one(head: CodeHead) -> None:
    features, targets = problem()
    targets = torch.where(targets == IGNORE, 2, targets)
    head.eval()
    loss = ETFCrossEntropy(head, ignore_index=1)(features, targets)
    torch.testing.assert_close(loss, F.cross_entropy(head(features), targets, ignore_index=1))


@pytest.mark.parametrize("name", HEADS)
def test_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name]()
    features, targets = problem(torch.float32)
    features.requires_grad_()
    exact_head = copy.deepcopy(head)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ETFCrossEntropy(head)(features, targets)
    exact = F.cross_entropy(exact_head(features, targets), targets)
    assert loss.dtype == torch.float32
    # Logits of size about 5, each wrong by no more than a rounding to 8 bits.
    torch.testing.assert_close(loss, exact, rtol=0, atol=5 * 2**-8)
    (gradient,) = torch.autograd.grad(loss, features)
    (exact_gradient,) = torch.autograd.grad(exact, features)
    torch.testing.assert_close(gradient, exact_gradient, rtol=0, atol=0.03)


def test_compiles_as_one_graph(head: CodeHead) -> None:
    features, targets = problem()
    expected = ETFCrossEntropy(copy.deepcopy(head))(features, targets)
    compiled = torch.compile(ETFCrossEntropy(head), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, targets), expected)


def test_the_head_is_shared_and_follows_the_mode_of_the_loss() -> None:
    head = NearestETFHead(6, 4)
    criterion = ETFCrossEntropy(head).eval()
    assert not head.training
    assert criterion.head is head
    features, targets = problem(torch.float32)
    criterion.train()(features, targets)
    assert int(head.averages.updates.sum()) == 4


def test_the_canonical_frame_is_never_made() -> None:
    # W would take 4e14 bytes, more than a process can address.
    classes = 10**7
    criterion = ETFCrossEntropy(FixedETFHead(classes, classes))
    features = torch.zeros(1, classes, requires_grad=True)
    loss = criterion(features, torch.tensor([3]))
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(math.log(classes))
    assert features.grad is not None
    assert features.grad[0, 3].item() == pytest.approx(-1)


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest result of any operation."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_no_more_logits_exist_than_those_of_a_chunk() -> None:
    # One class more than features: all logits together would be the largest tensor, and the features are.
    samples, width, classes = 1000, 2, 3
    features = torch.randn(samples, width, requires_grad=True)
    criterion = ETFCrossEntropy(FixedETFHead(width, classes, rotation="haar"), chunk_size=10)
    with LargestTensor() as largest:
        torch.autograd.backward(criterion(features, torch.arange(samples) % classes))
    assert largest.entries == samples * width


def test_invalid_arguments_are_refused() -> None:
    head = FixedETFHead(6, 4)
    with pytest.raises(InvalidArgumentError, match="head must be a CodeHead, got Linear"):
        ETFCrossEntropy(nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=r"label_smoothing must be in \[0, 1\], got 2"):
        ETFCrossEntropy(head, label_smoothing=2)
    with pytest.raises(InvalidArgumentError, match="chunk_size must be at least 1"):
        ETFCrossEntropy(head, chunk_size=0)
    with pytest.raises(InvalidArgumentError, match="features must have shape"):
        ETFCrossEntropy(head)(torch.ones(2, 5), torch.tensor([0, 1]))
    with pytest.raises(MissingTargetsError):
        ETFCrossEntropy(NearestETFHead(6, 4))(torch.ones(2, 6), None)  # type: ignore[arg-type]


class Both(nn.Module):
    """A model that holds its head and the loss of the head."""

    def __init__(self, head: CodeHead) -> None:
        super().__init__()
        self.body = nn.Linear(3, 6)
        self.head = head
        self.loss = ETFCrossEntropy(head)


def test_a_model_with_head_and_loss_is_saved_under_one_name(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    for make in HEADS.values():
        model, other = Both(make()), Both(make())
        safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
        other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
        torch.testing.assert_close(other.head.frame, model.head.frame, rtol=0, atol=0)
        assert not any(name.startswith("loss.") for name in model.state_dict())


def test_what_is_asked_of_the_loss_reaches_the_head() -> None:
    head = LearnedETFHead(6, 4)
    criterion = ETFCrossEntropy(head)
    assert [id(p) for p in criterion.parameters()] == [id(p) for p in head.parameters()]
    before = head.prototypes.detach().clone()
    optimizer = torch.optim.SGD(criterion.parameters(), lr=1.0)
    features, targets = problem(torch.float32)
    criterion(features, targets).backward()
    optimizer.step()
    assert not torch.equal(head.prototypes, before)
    model = Both(head)
    assert sum(p is head.prototypes for p in model.parameters()) == 1
    twin = copy.deepcopy(model)
    assert twin.loss.head is twin.head
    assert twin.head is not head
    assert pickle.loads(pickle.dumps(criterion)).head.num_classes == 4
