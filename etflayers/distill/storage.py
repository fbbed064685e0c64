"""Tensors and a JSON record in one safetensors file: readable anywhere, and nothing in it is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from etflayers.checks import require, require_module
from etflayers.errors import InvalidArgumentError

__all__ = ["read_tensors", "write_tensors"]

_KEY = "etflayers"  # in the header of the file, whose values are strings
_FORMAT = 1


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write a file that holds ``tensors`` and, in its header, ``record`` as JSON.

    Args:
        path: of the file; one that exists is replaced only when the new one is complete.
        tensors: by name.
        record: anything that JSON can hold.

    Raises:
        InvalidArgumentError: a record that JSON cannot hold.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = require_module("safetensors.torch", extra="distill")
    try:
        header = json.dumps({"format": _FORMAT, **record}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"metadata must be something that JSON can hold: {error}") from error
    content = safetensors.save({name: t.contiguous() for name, t in tensors.items()}, {_KEY: header})
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name without its content
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` has written.

    Args:
        path: of the file.

    Returns:
        The tensors, on the CPU, and the record.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidArgumentError: the file was not written by this library, or by a later one, or is damaged.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = require_module("safetensors", extra="distill")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except safetensors.SafetensorError as error:
        raise InvalidArgumentError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    if header is None:
        raise InvalidArgumentError(f"{path} was not written by etflayers: its header has no {_KEY!r}")
    record: dict[str, Any] = json.loads(header)
    found = record.pop("format")
    require(found == _FORMAT, f"{path} has format {found}, this version reads {_FORMAT}: update etflayers")
    return tensors, record
