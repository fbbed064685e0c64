"""Files that are either whole or not there, and the state of a run in one of them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

from etflayers.errors import InvalidArgumentError


def write_atomically(path: Path, content: bytes) -> None:
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


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and strings, nested in dicts and lists."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, fingerprint: dict[str, Any], device: torch.device) -> dict[str, Any]:
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


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators, on which layers such as dropout draw."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo what happened to the global generators since :func:`random_state`."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
