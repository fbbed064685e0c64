"""Files that are either whole or not there: checkpoints, tables, and results that are kept."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from etflayers.checks import require
from etflayers.storage import write_whole

Row = dict[str, Any]  # numbers by name; what does not exist is not there


def write_atomically(path: Path, content: bytes) -> Path:
    """Replace ``path`` by ``content`` so that a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return path


# torch.save writes a zip archive, which may end in a comment, whose length stands in the two bytes before it:
# there goes the checksum of all that comes before, and others read the file as ever.
MARK = b"sha256:"
DIGITS = 64


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers and strings, nested in dicts and lists, with a checksum."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    body = buffer.getvalue()[:-2] + (len(MARK) + DIGITS).to_bytes(2, "little") + MARK
    write_atomically(path, body + hashlib.sha256(body).hexdigest().encode())


def load(path: Path, fingerprint: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save` wrote.

    Raises:
        InvalidArgumentError: a checkpoint of a run with other settings or data, or a damaged one.
    """
    content = path.read_bytes()
    body, digest = content[:-DIGITS], content[-DIGITS:]
    require(
        body.endswith(MARK) and hashlib.sha256(body).hexdigest().encode() == digest,
        f"--resume: {path} is damaged, or older than checksums: remove it, and that run starts anew",
    )
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    changed = differences(state["fingerprint"], fingerprint)
    require(
        not changed,
        f"--resume: {path} belongs to a run with other settings ({changed}): repeat those, or take another "
        "--out",
    )
    return state


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not as it was, in words; nothing if all is."""
    return "; ".join(
        f"{name} was {_shortened(before.get(name))}, is {_shortened(value)}"
        for name, value in now.items()
        if before.get(name) != value
    )


def _shortened(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


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
