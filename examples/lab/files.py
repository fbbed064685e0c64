"""Files that are either whole or not there: checkpoints, tables, and results that are kept."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from etflayers.errors import InvalidArgumentError

Row = dict[str, Any]  # numbers by name; what does not exist is not there


def write_atomically(path: Path, content: bytes) -> Path:
    """Replace ``path`` by ``content`` so that a kill at any moment leaves the old file or the new one.

    The content goes to a file beside it, onto the disk, and only then, by a rename, under its name. What a
    kill leaves of the file beside it, the next write takes over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":  # the rename itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers and strings, nested in dicts and lists."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, fingerprint: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save` wrote.

    Raises:
        InvalidArgumentError: the checkpoint belongs to a run with other settings.
    """
    state = torch.load(path, map_location=device, weights_only=True)
    before = state["fingerprint"]
    changed = [
        f"{name} was {before.get(name)!r}, is {value!r}"
        for name, value in fingerprint.items()
        if before.get(name) != value
    ]
    if changed:
        raise InvalidArgumentError(
            f"--resume: {path} belongs to a run with other settings ({'; '.join(changed)}): repeat those, or "
            "take another --out"
        )
    return state


def kept(path: Path, fingerprint: Mapping[str, Any], make: Callable[[], Any], *, resume: bool) -> Any:
    """What ``make`` returns, or has returned in an earlier run that may be used."""
    if resume and path.exists():
        return load(path, fingerprint)["result"]
    result = make()
    save(path, {"fingerprint": dict(fingerprint), "result": result})
    return result


def write_json(path: Path, content: Any) -> Path:
    """Numbers that do not exist (NaN, infinity) become null."""
    return write_atomically(path, (json.dumps(_finite(content), indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A column for each name that occurs in a row; what does not exist stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_finite(list(rows)))
    return write_atomically(path, text.getvalue().encode())


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content
