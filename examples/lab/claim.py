"""The folder of a run: one run at a time, and no results of another one replaced unasked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from etflayers.checks import require
from etflayers.errors import EtfLayersError, InvalidArgumentError
from lab.files import differences, write_json

try:
    import fcntl
except ImportError:  # on Windows, where two runs in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]

RECORD, LOCK = "run.json", ".lock"
PARTIAL = f".{'[0-9a-f]' * 16}.partial"  # what a killed run was writing, see etflayers.storage


@contextmanager
def claimed(
    folder: Path, study: str, settings: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> Iterator[None]:
    """Hold the folder while a study writes into it, and note in ``run.json`` what that study is.

    Raises:
        InvalidArgumentError: another run is writing there, or has left results there that this one would
            replace: of another study, of other settings, or unfinished ones.
    """
    require(not folder.exists() or folder.is_dir(), f"--out {folder} is a file: take the name of a folder")
    with _locked(folder):
        for place in (folder, folder / "checkpoints"):
            for partial in place.glob(PARTIAL):
                partial.unlink()
        record, before = folder / RECORD, _read(folder / RECORD)
        same_study = before.get("study", study) == study
        changed = differences(before.get("settings", settings), settings)
        if not same_study:
            changed = f"study was {before['study']}, is {study}"
        if resume and same_study:
            require(
                not changed,
                f"--resume: {folder} belongs to a run with other settings ({changed}): repeat those, or take "
                "another --out",
            )
        elif not resume and not overwrite:
            require(
                not changed,
                f"{folder} holds the results of another run ({changed}): take another --out, or add "
                "--overwrite to replace them",
            )
            require(
                before.get("finished", True),
                f"{folder} holds a run that has not come to its end: add --resume to continue it, "
                "--overwrite to start again, or take another --out",
            )
        now = {"study": study, "settings": dict(settings)}
        write_json(record, {**now, "finished": False})
        try:
            yield
        except EtfLayersError:
            if before and not changed:
                write_json(record, before)
            raise
        else:
            write_json(record, {**now, "finished": True})
        finally:
            _remove_if_empty(folder)


def _read(record: Path) -> dict[str, Any]:
    if not record.exists():
        return {}
    try:
        content = json.loads(record.read_text())
        return {"study": content["study"], "settings": dict(content["settings"]), **content}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"{record} is damaged, and nobody knows what its folder holds: remove it, or take another --out"
        ) from error


def _remove_if_empty(folder: Path) -> None:
    """Forget a run that has left nothing."""
    checkpoints = folder / "checkpoints"
    left = {path.name for path in folder.iterdir()} - {RECORD, LOCK}
    if left <= {checkpoints.name} and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        if checkpoints.exists():
            checkpoints.rmdir()
        (folder / RECORD).unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock, which the system takes back from a process that dies."""
    existed, path = folder.exists(), folder / LOCK
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(path) as file:
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            if fcntl is not None:  # Windows does not remove what is open
                path.unlink()
            if not existed and not any(folder.iterdir()):
                folder.rmdir()


def _lock(path: Path) -> TextIO:
    while True:
        file = path.open("a+")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            holder = f"process {path.read_text()} is writing into {path.parent}"
            raise InvalidArgumentError(f"{holder}: wait for it, or take another --out") from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the run that held it has ended, and removed it, since it was opened
