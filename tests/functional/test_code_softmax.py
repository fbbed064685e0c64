"""The softmax over a spherical code, a few pieces at a time, against all logits at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.codes import (
    DenseCode,
    KerdockCode,
    OrthoplexCode,
    RootCode,
    SimplexCode,
    SphericalCode,
    spherical_code,
)
from etflayers.errors import InvalidArgumentError
from etflayers.functional import code_cross_entropy
from etflayers.functional import code_softmax as module
from etflayers.functional.code_softmax import code_logsumexp

CODES: list[SphericalCode] = [
    SimplexCode(9, 8),
    OrthoplexCode(16, 8),
    OrthoplexCode(11, 8),  # a piece that is cut
    KerdockCode(288, 16),
    KerdockCode(275, 16),
    KerdockCode(40, 16),
    RootCode(30, 8),
    DenseCode(F.normalize(torch.randn(23, 5, generator=torch.Generator().manual_seed(0)).double(), dim=-1)),
]
IDS = [f"{code.kind}-{code.num_classes}" for code in CODES]


@pytest.fixture(params=[40, 2**18], ids=["piece by piece", "at once"])
def _entries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many logits exist at a time: so few that batches are cut, too, or all."""
    monkeypatch.setattr(module, "_CPU_ENTRIES", request.param)


def batch(code: SphericalCode, length: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(code.num_classes)
    features = torch.randn(7, code.in_features, generator=generator, dtype=torch.float64)
    targets = torch.randint(code.num_classes, (7,), generator=generator)
    return (length * F.normalize(features, dim=-1)).to(dtype).requires_grad_(), targets


@pytest.mark.usefixtures("_entries")
@pytest.mark.parametrize("length", [1.0, 39.0, 41.0, 600.0])  # both sides of what needs no maximum
@pytest.mark.parametrize("code", CODES, ids=IDS)
def test_value_and_gradient_are_those_of_all_logits(code: SphericalCode, length: float) -> None:
    rows, _ = batch(code, length)
    found = code_logsumexp(rows, code)
    exact = torch.logsumexp(rows @ code.dense(dtype=torch.float64).mT, -1)
    torch.testing.assert_close(found, exact, rtol=1e-13, atol=1e-13)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    (ours,) = torch.autograd.grad(found, rows, weights)
    (theirs,) = torch.autograd.grad(exact, rows, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("_entries")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"reduction": "none", "scale": 5.0}])
@pytest.mark.parametrize("code", CODES, ids=IDS)
def test_the_loss_is_that_of_pytorch(code: SphericalCode, options: dict[str, Any]) -> None:
    features, targets = batch(code, 3.0)
    targets[2] = -100
    ours = code_cross_entropy(features, code, targets, **options)
    scale = options.get("scale", 1.0)
    rest = {name: value for name, value in options.items() if name != "scale"}
    theirs = F.cross_entropy(scale * features @ code.dense(dtype=torch.float64).mT, targets, **rest)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), features)[0], torch.autograd.grad(theirs.sum(), features)[0]
    )


def test_float32_is_as_good_as_all_logits_in_float32() -> None:
    code = KerdockCode(4224, 64)
    features, targets = batch(code, 30.0)
    exact = F.cross_entropy(features @ code.dense(dtype=torch.float64).mT, targets)
    (gradient,) = torch.autograd.grad(exact, features)
    single = features.detach().float().requires_grad_()
    loss = code_cross_entropy(single, code, targets)
    assert abs(loss.item() - exact.item()) < 1e-6 * max(1.0, exact.item())
    found = torch.autograd.grad(loss, single)[0].double()
    assert float((found - gradient).norm() / gradient.norm()) < 2e-6


@pytest.mark.parametrize("code", [CODES[1], CODES[4], CODES[6]], ids=["orthoplex", "kerdock", "roots"])
def test_derivatives_of_every_order_and_mode(code: SphericalCode) -> None:
    rows, _ = batch(code, 2.0)
    rows = rows.detach()[:2].requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: code_logsumexp(x, code), rows, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: code_logsumexp(x, code), rows)
    vmapped = torch.func.vmap(lambda x: code_logsumexp(x[None], code)[0])(rows)
    torch.testing.assert_close(vmapped, code_logsumexp(rows, code))
    hessian = torch.func.hessian(lambda x: code_logsumexp(x, code).sum())(rows)
    shares = torch.softmax(rows @ code.dense(dtype=torch.float64).mT, -1)
    words = code.dense(dtype=torch.float64)
    mean = shares[0] @ words
    expected = words.mT @ torch.diag(shares[0]) @ words - torch.outer(mean, mean)
    torch.testing.assert_close(hessian[0, :, 0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    code = KerdockCode(288, 16)
    features, targets = batch(code, 8.0, dtype)
    loss = code_cross_entropy(features, code, targets)
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        same = code_cross_entropy(features, code, targets)
    assert torch.equal(loss, same)
    exact = code_cross_entropy(features.detach().float(), code, targets)
    assert torch.equal(loss, exact)
    (gradient,) = torch.autograd.grad(loss, features)
    assert gradient.dtype == dtype


def test_soft_targets_make_all_logits() -> None:
    code = OrthoplexCode(16, 8)
    features, _ = batch(code, 2.0)
    soft = torch.softmax(torch.randn(7, 16, dtype=torch.float64), -1)
    loss = code_cross_entropy(features, code, soft, label_smoothing=0.1)
    torch.testing.assert_close(
        loss, F.cross_entropy(features @ code.dense(dtype=torch.float64).mT, soft, label_smoothing=0.1)
    )


def test_nan_shows_and_an_empty_batch_is_none() -> None:
    code = OrthoplexCode(16, 8)
    features, targets = batch(code, 2.0)
    broken = features.detach().clone()
    broken[1, 1] = math.nan
    losses = code_cross_entropy(broken, code, targets, reduction="none")
    assert losses.isnan().tolist() == [False, True] + 5 * [False]
    assert code_cross_entropy(features[:0], code, targets[:0]).item() == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": torch.zeros(2, 7)}, "features must have shape"),
        ({"targets": torch.tensor([0, 16])}, r"targets must be class indices in \[0, 16\)"),
        ({"targets": torch.tensor([0])}, "targets must have the leading shape"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {"features": torch.zeros(2, 8), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(InvalidArgumentError, match=match):
        code_cross_entropy(frame=OrthoplexCode(16, 8), **arguments)


def test_no_matrix_of_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that a step makes has the entries allowed, not B K of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(module, "_CPU_ENTRIES", 2**14)
    code = KerdockCode(4224, 64)
    features, targets = torch.randn(256, 64, requires_grad=True), torch.randint(4224, (256,))
    code.words(targets)  # the signs are made once
    with Watch():
        code_cross_entropy(features, code, targets).backward()
    assert largest <= 2**15


def test_the_matrix_and_the_code_are_one() -> None:
    words = spherical_code(40, 16, kind="kerdock", dtype=torch.float64)
    code = KerdockCode(40, 16)
    features, targets = batch(code, 4.0)
    torch.testing.assert_close(
        code_cross_entropy(features, words, targets), code_cross_entropy(features, code, targets)
    )
