"""Settings of PyTorch that decide what a step computes, as they were when it was first taken.

A step is re-derived in the backward pass, which may run after the ``with`` block that the loop ran in.
Autocast, the kernels of attention and the modes of the modules belong to the loss (``objective``), random
numbers to the step (``problem``); here is the rest, which holds for the whole process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import backends

__all__ = ["Settings"]


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set for a library alone, and PyTorch refuses to answer for all of them
        return None


def _set_matmul_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


def _default_device() -> torch.device:
    # torch.get_default_device of PyTorch 2.6 does not see `with torch.device(...)`.
    return torch.empty(0).device


_KNOWN: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _attribute(backends.cudnn, "enabled"),  # without it recurrent layers have second derivatives on CUDA
    _attribute(backends.cudnn, "deterministic"),
    _attribute(backends.mkldnn, "enabled"),
    (_matmul_precision, _set_matmul_precision),
]
if hasattr(backends.cuda.matmul, "fp32_precision"):  # of one library alone, since PyTorch 2.9
    _KNOWN += [_attribute(place.matmul, "fp32_precision") for place in (backends.cuda, backends.mkldnn)]


@dataclass(frozen=True)
class Settings:
    """Default dtype and device, deterministic algorithms, precision of products, libraries in use."""

    values: tuple[Any, ...]
    device: torch.device

    @classmethod
    def now(cls) -> Settings:
        """Those in force."""
        return cls(tuple(get() for get, _ in _KNOWN), _default_device())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """These inside the block, and afterwards those from before. What does not differ is left alone."""
        before = Settings.now()
        with ExitStack() as stack:
            if before.device != self.device:
                stack.enter_context(self.device)
            for (_, put), value, old in zip(_KNOWN, self.values, before.values, strict=True):
                if value != old:
                    stack.callback(put, old)
                    put(value)
            yield
