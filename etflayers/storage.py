"""Tensors and a JSON record in one safetensors file: readable anywhere, and nothing in it is executed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etflayers.checks import require, require_module
from etflayers.errors import InvalidArgumentError

__all__ = ["read_tensors", "write_tensors", "write_whole"]

# In the header of the file, whose values are strings: the record, and the checksum of all there is.
_RECORD, _CHECKSUM = "etflayers", "sha256"
_FORMAT, _WITHOUT_CHECKSUM = 2, 1


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write a file that holds ``tensors`` and, in its header, ``record`` as JSON and a checksum of both.

    Args:
        path: of the file; one that exists is replaced only when the new one is complete.
        tensors: by name.
        record: anything that JSON can hold.

    Raises:
        InvalidArgumentError: a record that JSON cannot hold.
        MissingDependencyError: safetensors is not installed.
        OSError: the file cannot be written, with its name.
    """
    safetensors = require_module("safetensors.torch", extra="distill")
    try:
        text = json.dumps({"format": _FORMAT, **record}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"metadata must be something that JSON can hold: {error}") from error
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # One entry: safetensors writes several in an order that changes from file to file.
    content = safetensors.save(values, {_RECORD: _sealed(text, _checksum(text, values))})
    write_whole(path, content)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` has written.

    Args:
        path: of the file.

    Returns:
        The tensors, on the CPU, and the record.

    Raises:
        OSError: the file cannot be read, with its name; ``FileNotFoundError`` if there is none.
        InvalidArgumentError: the file was not written by this library, or by a later one, or is damaged.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = require_module("safetensors", extra="distill")
    loader = require_module("safetensors.torch", extra="distill")
    # At once: safe_open opens a file twice, and it may be replaced in between.
    content = Path(path).read_bytes()
    try:
        tensors: dict[str, Tensor] = loader.load(content)
        header = _metadata(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InvalidArgumentError(f"{path} is no safetensors file, or a damaged one: {error}") from error
    require(_RECORD in header, f"{path} was not written by etflayers: its header has no {_RECORD!r}")
    record = _parsed(header[_RECORD], path)
    found = record.pop("format", None)
    record.pop(_CHECKSUM, None)
    if found == _WITHOUT_CHECKSUM:
        warnings.warn(
            f"{path} has no checksum, because an earlier version of etflayers wrote it: whether it is "
            "damaged cannot be told; save it again to have one",
            UserWarning,
            stacklevel=3,
        )
        return tensors, record
    require(found == _FORMAT, f"{path} has format {found}, this version reads {_FORMAT}: update etflayers")
    text = json.dumps({"format": found, **record})
    require(
        header[_RECORD] == _sealed(text, _checksum(text, tensors)),
        f"{path} is damaged: its content does not have the checksum that was written with it",
    )
    return tensors, record


def _sealed(text: str, checksum: str) -> str:
    """The JSON object ``text`` with the checksum as its last entry."""
    return f'{text[:-1]}, "{_CHECKSUM}": "{checksum}"}}'


def _metadata(content: bytes) -> dict[str, str]:
    """The strings in the header of a safetensors file, which begins with its length."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]).get("__metadata__") or {}


def _parsed(text: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"{path} is damaged: its record is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise InvalidArgumentError(f"{path} is damaged: its record is no JSON object, but {record!r}")
    return record


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the record and, in the order of their names, of each tensor's description and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file such that its readers, a kill and a power cut find the old content or the new one.

    Args:
        path: of the file; one that exists is replaced.
        content: all of it.

    Raises:
        OSError: the file cannot be written, with its name.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_whole(f"{folder}/file", b"content")
    ...     os.listdir(folder)
    ['file']
    """
    target = Path(path)
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")  # others may be writing the same file
    with _errors_name(target):
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the new name without its content
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        if os.name == "posix":  # the rename itself reaches the disk with the folder
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def _errors_name(target: Path) -> Iterator[None]:
    """Have errors of the operating system name the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
