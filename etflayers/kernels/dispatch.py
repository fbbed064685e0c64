"""Which path a call takes, and why: a Triton kernel, the eager PyTorch operations beside it, or NumPy's.

The choice is a function of the device, the dtype and the sizes, never of a global flag. Each operation
registers what its kernel supports. ``impl="reference"`` and ``impl="triton"`` force a path; a forced kernel
that cannot run is an error, not a silent detour.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from etflayers._torch import assume_constant_result, inside_transform
from etflayers.checks import require
from etflayers.errors import InvalidArgumentError

__all__ = ["Call", "Choice", "Impl", "Support", "describe", "register", "use_triton"]

Impl = Literal["auto", "reference", "triton"]

# tl.dot in float64 and bfloat16 arithmetic begin with compute capability 8.0.
_OLDEST = (8, 0)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads this when a kernel is defined, so a later change means nothing.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Call:
    """What a kernel has to know of a call to say whether it supports it."""

    device: torch.device
    dtype: torch.dtype
    num_classes: int
    in_features: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Choice:
    """The path of a call and the reason for it."""

    impl: Literal["numpy", "reference", "triton"]
    reason: str

    def __str__(self) -> str:
        return f"{self.impl}: {self.reason}"


# None where the kernel runs and is the faster path, otherwise why not.
Support = Callable[[Call], str | None]

_OPS: dict[str, Support] = {}
_NUMPY: dict[str, Support] = {}


def register(op: str, supports: Support, *, numpy: Support | None = None) -> None:
    """Make ``op`` known, and what says why its kernel does not support a call (``None``: it does).

    Args:
        op: name of the operation.
        supports: of its Triton kernel.
        numpy: of its path in NumPy for small problems on a CPU, if it has one.
    """
    _OPS[op] = supports
    if numpy is not None:
        _NUMPY[op] = numpy


def describe(
    op: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_classes: int,
    in_features: int | None = None,
    batch: int | None = None,
    impl: Impl = "auto",
) -> Choice:
    """Say which path a call of ``op`` takes and why.

    Args:
        op: name of the operation, e.g. ``"class_sums"``.
        device: of the features.
        dtype: of the features.
        num_classes: K.
        in_features: d; ``None``: any.
        batch: B, or the number of problems in a batch of them; ``None``: any.
        impl: ``"auto"``, or the path to force.

    Returns:
        The path and the reason.

    Raises:
        InvalidArgumentError: an unknown operation or ``impl``, or ``impl="triton"`` where it cannot run.

    >>> print(describe("class_sums", device="cpu", dtype=torch.float32, num_classes=10))
    reference: Triton kernels run on CUDA devices, not on 'cpu'
    >>> print(describe("polar", device="cpu", dtype=torch.float32, num_classes=10))
    numpy: few classes on a CPU: PyTorch's operations would take as long as their launch
    """
    require(op in _OPS, f"op must be one of {', '.join(map(repr, sorted(_OPS)))}, got {op!r}")
    require(impl in get_args(Impl), f"impl must be 'auto', 'reference' or 'triton', got {impl!r}")
    if impl == "reference":
        return Choice("reference", "asked for")
    call = Call(torch.device(device), dtype, num_classes, in_features, batch)
    if impl == "auto" and call.device.type == "cpu" and op in _NUMPY and _NUMPY[op](call) is None:
        return Choice(
            "numpy", "few classes on a CPU: PyTorch's operations would take as long as their launch"
        )
    obstacle = _missing(call, forced=impl == "triton") or _OPS[op](call)
    if obstacle is None:
        return Choice("triton", "asked for" if impl == "triton" else "the kernel supports this call")
    if impl == "triton":
        raise InvalidArgumentError(
            f"impl='triton' cannot run {op}: {obstacle}; choose impl='auto' or 'reference'"
        )
    return Choice("reference", obstacle)


def use_triton(
    op: str,
    tensor: Tensor,
    *,
    num_classes: int,
    in_features: int | None = None,
    batch: int | None = None,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> bool:
    """Whether a call of ``op`` with ``tensor``, which has its device and dtype, takes the Triton kernel.

    Args:
        op: as in :func:`describe`.
        tensor: whose device and dtype decide.
        dtype: of the data, where ``tensor`` has been computed from them in a wider one.
        num_classes: as in :func:`describe`.
        in_features: as in :func:`describe`.
        batch: as in :func:`describe`.
        impl: as in :func:`describe`.

    Raises:
        InvalidArgumentError: as in :func:`describe`; also ``impl="triton"`` inside a ``torch.func``
            transform.
    """
    if impl == "auto" and tensor.device.type == "cpu":
        return False
    if inside_transform():
        # The kernels have no batching rule.
        require(
            impl != "triton",
            f"impl='triton' cannot run {op} inside torch.func transforms; choose impl='auto' or 'reference'",
        )
        return False
    choice = describe(
        op,
        device=tensor.device,
        dtype=tensor.dtype if dtype is None else dtype,
        num_classes=num_classes,
        in_features=in_features,
        batch=batch,
        impl=impl,
    )
    return choice.impl == "triton"


def _missing(call: Call, *, forced: bool) -> str | None:
    """What the machine lacks for any kernel, or ``None``."""
    interpreted = call.device.type == "cpu" and forced and _INTERPRETED
    if call.device.type != "cuda" and not interpreted:
        return f"Triton kernels run on CUDA devices, not on {call.device.type!r}"  # with or without Triton
    if not _HAS_TRITON:
        return "Triton is not installed: pip install 'etflayers[triton]'"
    if interpreted:
        return None  # slow: for tests
    if torch.version.hip is not None:
        return "the kernels are not tested on ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    capability = _capability(call.device)
    if capability < _OLDEST:
        return "the kernels need compute capability 8.0, this device has {}.{}".format(*capability)
    return None


@assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
