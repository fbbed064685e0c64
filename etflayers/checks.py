"""Checks of arguments, which say what is wrong before anything has changed.

Checks of *values* (NaN features, targets out of range) never cost a host-device synchronization: on the CPU
they raise at once, elsewhere, and under ``torch.compile``, they become an asynchronous assertion on the
device.
"""

from __future__ import annotations

import importlib
import math
import numbers
import operator
from types import ModuleType

import torch
from torch import Tensor

from etflayers._torch import assert_async, inside_transform, is_concrete
from etflayers.errors import (
    EtfLayersError,
    InvalidArgumentError,
    MissingDependencyError,
    NonFiniteError,
)

__all__ = [
    "describe_argument",
    "reads_values",
    "require",
    "require_concrete",
    "require_finite",
    "require_flag",
    "require_floating",
    "require_module",
    "require_number",
    "require_size",
    "require_values",
]


def require(condition: bool, message: str) -> None:
    """Raise :class:`InvalidArgumentError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InvalidArgumentError(message)


def require_size(name: str, value: object, *, at_least: int | None = 1) -> None:
    """Raise unless ``value`` is an integer (of Python or NumPy, no bool, no float) and large enough."""
    is_integer = hasattr(value, "__index__") and not isinstance(value, bool)
    require(
        is_integer and not isinstance(value, Tensor),
        f"{name} must be an integer, got {value!r} ({type(value).__name__})",
    )
    if at_least is not None:
        require(operator.index(value) >= at_least, f"{name} must be at least {at_least}, got {value}")  # type: ignore[arg-type]


def require_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False: a string such as "False" would count as true."""
    require(isinstance(value, bool), f"{name} must be True or False, got {value!r} ({type(value).__name__})")


def require_number(name: str, value: object, *, positive: bool = False) -> None:
    """Raise unless ``value`` is a finite real number, no bool and no tensor: >= 0, or > 0 if ``positive``."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    fits = math.isfinite(number) and (number > 0 if positive else number >= 0)
    require(fits, f"{name} must be a finite number {'>' if positive else '>='} 0, got {value!r}")


def describe_argument(value: object) -> str:
    """What a value is, for a message: a class by its name, so that it is not taken for an instance of it.

    >>> describe_argument("svd"), describe_argument(dict)
    ("'svd'", 'the class dict')
    """
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)


def require_floating(name: str, dtype: torch.dtype) -> None:
    """Raise unless ``dtype`` is a real floating-point type."""
    if not dtype.is_floating_point:
        raise InvalidArgumentError(
            f"{name} must have a real floating-point dtype, got {dtype}: convert it, e.g. with .float()"
        )


def require_module(name: str, *, extra: str) -> ModuleType:
    """Import an optional module, or say which extra of etflayers installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{name!r} is needed here and could not be imported ({error}): pip install 'etflayers[{extra}]'"
        ) from error


def reads_values(tensor: Tensor) -> bool:
    """Whether Python may branch on the values of ``tensor`` at no cost.

    True for an ordinary CPU tensor in eager mode. False on an accelerator (reading would wait for the
    device), under ``torch.compile`` or ``torch.export`` (the branch would break the graph), inside a
    ``torch.func`` transform and for fake or meta tensors (there is no value to read).
    """
    return tensor.device.type == "cpu" and is_concrete(tensor)


def require_concrete(tensor: Tensor, what: str, instead: str) -> None:
    """Raise :class:`InvalidArgumentError` if ``tensor`` has no values yet, because it is being traced."""
    require(
        is_concrete(tensor),
        f"{what} needs the values of its input, which torch.compile and torch.func.vmap do not have while "
        f"they trace it: {instead}",
    )


def require_values(
    condition: Tensor, message: str, error: type[EtfLayersError] = InvalidArgumentError
) -> None:
    """Raise ``error(message)`` unless the scalar boolean tensor ``condition`` is true, without a sync.

    Where the value cannot be read for free it becomes an asynchronous assertion: PyTorch reports it at the
    next synchronization as a ``RuntimeError`` (on CUDA a device-side assert) that carries ``message``. Inside
    ``torch.func`` transforms, for which that assertion has no batching rule, values are not checked.
    """
    if reads_values(condition):
        if not bool(condition):
            raise error(message)
    elif condition.device.type != "meta" and not inside_transform():
        assert_async(condition, message)


def require_finite(tensor: Tensor, message: str) -> None:
    """Raise :class:`NonFiniteError` with ``message`` if the tensor holds NaN or infinity, without a sync."""
    if tensor.numel() == 0:
        return
    readable = reads_values(tensor)
    # The sum is the cheaper look, and enough if it is finite; that of finite numbers may overflow.
    if readable and math.isfinite(tensor.detach().sum()):
        return
    lowest, highest = torch.aminmax(tensor.detach())  # one pass; NaN comes through as NaN
    if readable:
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise NonFiniteError(message)
    else:
        require_values(torch.isfinite(lowest) & torch.isfinite(highest), message, NonFiniteError)
