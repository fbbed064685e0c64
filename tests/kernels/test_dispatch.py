"""Which path a call takes, and that a forced one is never replaced silently."""

from __future__ import annotations

import pytest
import torch

from etflayers.errors import InvalidArgumentError
from etflayers.functional import class_sums, etf_cross_entropy
from etflayers.kernels import Choice, describe, dispatch, use_triton


@pytest.mark.parametrize("installed", [True, False])
def test_a_cpu_call_takes_the_reference_and_asks_for_nothing_that_would_not_help(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_HAS_TRITON", installed)
    choice = describe("class_sums", device="cpu", dtype=torch.float32, num_classes=10)
    assert str(choice) == "reference: Triton kernels run on CUDA devices, not on 'cpu'"


def test_asking_for_the_reference_is_reason_enough() -> None:
    choice = describe("class_sums", device="cuda", dtype=torch.float32, num_classes=3, impl="reference")
    assert choice == Choice("reference", "asked for")


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose CUDA device, an H100, is asked about but not used."""
    monkeypatch.setattr(dispatch, "_HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (9, 0))
    return monkeypatch


@pytest.mark.parametrize(
    ("op", "dtype", "in_features", "reason"),
    [
        ("class_sums", torch.bfloat16, 8, None),
        ("class_sums", torch.float64, 8, "float64"),
        ("cross_entropy", torch.float16, 10, None),
        ("cross_entropy", torch.float64, 10, "float64"),
        ("cross_entropy", torch.float32, 9, "reflection"),
    ],
)
def test_dtype_and_sizes_decide_on_a_gpu(
    pretended_gpu: pytest.MonkeyPatch, op: str, dtype: torch.dtype, in_features: int, reason: str | None
) -> None:
    choice = describe(op, device="cuda", dtype=dtype, num_classes=10, in_features=in_features)
    assert choice.impl == ("triton" if reason is None else "reference")
    if reason is not None:
        assert reason in choice.reason
        with pytest.raises(InvalidArgumentError, match=reason):
            describe(op, device="cuda", dtype=dtype, num_classes=10, in_features=in_features, impl="triton")


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("etflayers.kernels.dispatch._HAS_TRITON", False, r"etflayers\[triton\]"),
        ("etflayers.kernels.dispatch._capability", lambda device: (7, 5), "this device has 7.5"),
        ("torch.version.hip", "6.0", "ROCm"),
        ("torch.cuda.is_available", lambda: False, "no CUDA device"),
    ],
)
def test_what_a_machine_lacks_is_named(
    pretended_gpu: pytest.MonkeyPatch, attribute: str, value: object, reason: str
) -> None:
    pretended_gpu.setattr(attribute, value)
    options = {"device": "cuda", "dtype": torch.float32, "num_classes": 10}
    assert describe("class_sums", **options).impl == "reference"  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=reason):
        describe("class_sums", **options, impl="triton")  # type: ignore[arg-type]


def test_a_forced_kernel_that_cannot_run_raises() -> None:
    features, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(InvalidArgumentError, match="impl='triton' cannot run class_sums"):
        class_sums(features, targets, 3, impl="triton")
    with pytest.raises(InvalidArgumentError, match="impl='triton' cannot run cross_entropy"):
        etf_cross_entropy(features, targets, 3, impl="triton")
    with pytest.raises(InvalidArgumentError, match=r"inside torch\.func transforms"):
        torch.vmap(lambda f: class_sums(f, targets, 3, impl="triton")[0])(features.expand(2, 4, 3))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"op must be one of .*'class_sums'.* got 'sums'"):
        describe("sums", device="cpu", dtype=torch.float32, num_classes=3)
    with pytest.raises(InvalidArgumentError, match=r"impl must be .* got 'cuda'"):
        use_triton("class_sums", torch.ones(2), num_classes=3, impl="cuda")  # type: ignore[arg-type]
